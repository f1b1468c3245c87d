"""Random-access sources of rows: files, rows in memory, Hugging Face `datasets`, TensorFlow Datasets.

A source is anything with `len(source)` and `source[i] -> mapping of column names to values`, so a plain list
of dicts is one, and so is a `datasets.Dataset`.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from jaxrl_llm.checks import expand_home, nearest_name
from jaxrl_llm.data.files import import_datasets, is_saved, load_saved, open_file
from jaxrl_llm.data.interfaces import Row, RowSource
from jaxrl_llm.data.memory import rows_in_memory
from jaxrl_llm.data.reasoning import reasoning_gym_rows
from jaxrl_llm.extras import require


def open_source(spec: Any, *, max_rows: int | None = None) -> RowSource:
    """Opens rows from wherever they are.

    | spec | rows |
    |---|---|
    | `train.jsonl`, `.jsonl.gz`, `.json`, `.csv`, `.parquet` | a file |
    | a folder that `datasets` saved (`save_to_disk`) | its rows; of several splits name one: `folder/train` |
    | `hf:openai/gsm8k,config=main,split=train` | Hugging Face `datasets` (downloads) |
    | `tfds:gsm8k,split=train,data_dir=~/tfds` | TensorFlow Datasets, prepared as array_record |
    | `reasoning_gym:chain_sum,size=1000,seed=0` | generated; further options are the task's own |
    | a list of dicts, a `datasets.Dataset`, any `RowSource` | those very rows |
    | a pandas or polars frame, an Arrow table | its rows; what is missing is `None` |
    | a mapping with one split (`DatasetDict`) | that one |
    | a stream (`IterableDataset`, a generator) | its first `max_rows` |

    Args:
        spec: One of the above.
        max_rows: How many rows are going to be read; only streams need it here.

    Raises:
        FileNotFoundError: The file is missing; the message names the path and files near it.
        ValueError: Unknown ending or option, no rows, a malformed line, or rows that are not objects.
    """
    if not isinstance(spec, str | os.PathLike):
        source, name = rows_in_memory(spec, max_rows), f"the given {type(spec).__name__}"
    else:
        name = os.fspath(spec)
        kind, _, rest = name.partition(":")
        if not name.strip():
            raise ValueError("the name of the data is empty: give a file, hf:NAME, tfds:NAME or reasoning_gym:NAME")
        if kind == "hf":
            dataset, options = _parse_options(rest, ("config", "split"))
            source = load_hugging_face(dataset, **options)
        elif kind == "tfds":
            dataset, options = _parse_options(rest, ("split", "data_dir"))
            source = TfdsSource(dataset, **options)
        elif kind == "reasoning_gym":
            source = _open_reasoning_gym(rest)
        else:
            source = open_file(Path(expand_home(name)))
    if len(source) == 0:
        raise ValueError(f"{name} has no rows")
    return source


class TfdsSource:
    """A split of TensorFlow Datasets, read from array_record files without importing TensorFlow.

    Text arrives as `str`, numbers and arrays as Python numbers and lists.

    Args:
        name: Registered or prepared data set, `name[/config][:version]`.
        split: Split, with TFDS's slicing: `train`, `train[:80%]`.
        data_dir: Folder of prepared data sets; TFDS's own default where None. Data that is not there yet is
            downloaded and prepared.

    Raises:
        ValueError: There is no such data set or split.
    """

    def __init__(self, name: str, *, split: str = "train", data_dir: str | os.PathLike[str] | None = None) -> None:
        require("tensorflow_datasets")
        import tensorflow_datasets as tfds

        if not name:
            raise ValueError("tfds: names no data set; write one after it, as in tfds:gsm8k,split=train")
        folder = expand_home(None if data_dir is None else os.fspath(data_dir))
        try:
            # One split was asked for, so it is one sequence.
            self._source = cast(Sequence[Any], tfds.data_source(name, split=split, data_dir=folder))
        except tfds.core.DatasetNotFoundError as error:  # its own message lists all that are registered
            raise ValueError(
                f"tfds:{name} is neither a data set of TensorFlow Datasets nor one prepared in "
                f"{folder or '~/tensorflow_datasets'}"
                f"{nearest_name(name, tfds.list_builders(with_community_datasets=False))}"
            ) from error
        except AssertionError as error:  # a version that the data set has not
            raise ValueError(f"tfds:{name}: {error}") from error

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int, /) -> Row:
        row = self._source[index]
        return {name: _as_python(value, f"row {index}, column {name!r}") for name, value in row.items()}


def load_hugging_face(name: str, *, config: str | None = None, split: str | None = None) -> RowSource:
    """Loads a data set with Hugging Face `datasets`, from the hub or a local folder.

    Args:
        name: Hub id such as `openai/gsm8k`, or a folder, also one that `save_to_disk` wrote.
        config: Configuration (subset) name.
        split: Split, with slicing: `train[:1000]`; by default `train`, or the only one of a saved folder.

    Raises:
        ValueError: no name is given, or it cannot be loaded; says why.
        ImportError: `datasets` is not installed.
    """
    if not name:
        raise ValueError("hf: names no data set; write one after it, as in hf:openai/gsm8k,config=main,split=train")
    folder = Path(expand_home(name))
    if folder.is_dir() and is_saved(folder):
        return load_saved(folder, split)
    datasets = import_datasets(f"hf:{name}")
    try:
        dataset = datasets.load_dataset(str(folder) if folder.is_dir() else name, config, split=split or "train")
    except Exception as error:  # of many kinds: no such name, configuration or split; HTTP, cache, offline mode
        raise ValueError(f"hf:{name} could not be loaded: {type(error).__name__}: {error}") from error
    return rows_in_memory(dataset)


def _open_reasoning_gym(spec: str) -> RowSource:
    task, options = _parse_options(spec, None)
    config = {name: _literal(value) for name, value in options.items()}
    size, seed = config.pop("size", None), config.pop("seed", 0)
    if not isinstance(size, int) or not isinstance(seed, int):
        raise ValueError(
            f"reasoning_gym:{spec} needs size= (and takes seed=), both integers, as in "
            f"'reasoning_gym:{task},size=1000,seed=0'"
        )
    return reasoning_gym_rows(task, size=size, seed=seed, config=config)


def _parse_options(spec: str, known: tuple[str, ...] | None) -> tuple[str, dict[str, str]]:
    """Splits `name,option=value,…`; `known` lists the options there are, None lets any pass."""
    name, *parts = spec.split(",")
    options: dict[str, str] = {}
    for part in parts:
        option, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"expected option=value, got {part!r} in {spec!r}")
        if known is not None and option not in known:
            raise ValueError(
                f"unknown option {option!r} in {spec!r}{nearest_name(option, known)} (options: {', '.join(known)})"
            )
        options[option] = value
    return name, options


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _as_python(value: Any, place: str) -> Any:
    """Turns what TFDS yields (bytes, NumPy values, nested) into plain Python values."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{place} holds bytes that are not UTF-8 text: {value[:40]!r}") from error
    if isinstance(value, np.ndarray | np.generic):
        return _as_python(value.tolist(), place)
    if isinstance(value, Mapping):
        return {name: _as_python(item, place) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_python(item, place) for item in value]
    return value
