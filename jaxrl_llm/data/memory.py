"""Rows that a program already has: lists, streams, data sets by their splits, tables and frames."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxrl_llm.data.arrow import ArrowRows, check_distinct
from jaxrl_llm.data.interfaces import RowSource


def rows_in_memory(rows: Any, max_rows: int | None = None) -> RowSource:
    """A source of what is given: rows by number, a stream, the one split of several, a table or frame.

    Args:
        rows: what is given.
        max_rows: how many are going to be read; a stream has no other end.

    Raises:
        ValueError: it holds no rows, several splits or columns of one name, or is a stream of which all are to be read.
    """
    library = type(rows).__module__.partition(".")[0]
    if isinstance(rows, Mapping):
        if len(rows) != 1:
            raise ValueError(
                f"expected rows, got a mapping with the keys {list(rows)}; give one of its splits, as in rows[…]"
            )
        return rows_in_memory(next(iter(rows.values())), max_rows)
    if library == "polars" and hasattr(rows, "to_arrow"):
        return ArrowRows(rows.to_arrow())
    if library == "pyarrow" and hasattr(rows, "slice") and hasattr(rows, "schema"):  # a Table or RecordBatch
        return ArrowRows(rows)
    if library == "pandas" and hasattr(rows, "columns"):
        check_distinct(rows.columns)
        return [{name: _of_pandas(value) for name, value in row.items()} for row in rows.to_dict("records")]
    if not hasattr(rows, "__len__") and isinstance(rows, Iterable):
        if max_rows is None:
            raise ValueError(
                f"a {type(rows).__name__} is a stream without a length: say how many of its rows to read "
                "(data.max_train_prompts, data.max_train_rows, evaluation.max_prompts, evaluation.max_rows), or give "
                "list(rows)"
            )
        rows = list(itertools.islice(rows, max_rows))
    if isinstance(rows, str | bytes) or not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        raise ValueError(f"a source needs len() and [index], which {type(rows).__name__} has not; make it a list")
    if isinstance(rows, list | tuple):
        for index, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise ValueError(f"row {index} is a {type(row).__name__}, not a mapping of columns: {row!r:.200}")
    return rows


def _of_pandas(value: Any) -> Any:
    """A cell as Python has it; `None` where pandas writes NaN, NaT or NA for nothing."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    is_nothing = (isinstance(value, float) and value != value) or type(value).__name__ in ("NAType", "NaTType")
    return None if is_nothing else value
