"""Rows held as Arrow columns: Parquet files and Arrow tables."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from jaxrl_llm.data.interfaces import Row
from jaxrl_llm.extras import require

if TYPE_CHECKING:  # most runs read JSON
    import pyarrow


class ArrowRows:
    """The rows of an Arrow table, as plain Python values.

    A column of Arrow has one type, so that each message has an entry for whatever any other has, `None` where it had
    none: `check_messages` and `tools_of` leave these out.

    Args:
        table: The columns.

    Raises:
        ValueError: Two columns bear one name.
    """

    def __init__(self, table: pyarrow.Table) -> None:
        check_distinct(table.schema.names)
        self._table = table

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int, /) -> Row:
        return self._table.slice(index, 1).to_pylist()[0]


def read_parquet(path: str | os.PathLike[str]) -> ArrowRows:
    """The rows of a Parquet file.

    Raises:
        ValueError: the file is damaged, or not Parquet (names the row group and its rows), or two of its columns bear
            one name.
    """
    require("pyarrow")
    import pyarrow
    import pyarrow.parquet

    name = os.fspath(path)
    with open(path, "rb") as file:  # what may not be read is told as of other files
        try:
            parquet = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{name} could not be read as Parquet, its footer is damaged or missing ({_said(error)}): "
                "write or fetch the file again"
            ) from error
        groups, first = [], 0
        for number in range(parquet.num_row_groups):
            size = parquet.metadata.row_group(number).num_rows
            try:
                group = parquet.read_row_group(number)
                group.validate(full=True)  # text is UTF-8, offsets lie within their columns
                if group.num_rows != size:
                    raise pyarrow.ArrowInvalid(f"{group.num_rows} rows where the footer says {size}")
            except (pyarrow.ArrowException, OSError, UnicodeDecodeError, MemoryError) as error:
                raise ValueError(
                    f"{name} could not be read: row group {number} of {parquet.num_row_groups} (rows {first} to "
                    f"{first + size - 1}) is damaged ({_said(error)}): write or fetch the file again"
                ) from error
            groups.append(group)
            first += size
    try:
        return ArrowRows(pyarrow.concat_tables(groups) if groups else parquet.schema_arrow.empty_table())
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def check_distinct(columns: Iterable[Any]) -> None:
    """Raises ValueError where two columns bear one name: a row would have the last of them alone."""
    if repeated := [name for name, times in collections.Counter(columns).items() if times > 1]:
        raise ValueError(f"there are several columns {repeated[0]!r}, and only one can be meant; rename the others")


def _said(error: BaseException) -> str:
    """The first line of an error of Arrow."""
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
