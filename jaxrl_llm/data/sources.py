"""Random-access sources of rows: files, rows in memory, Hugging Face `datasets`, TensorFlow Datasets.

A source is anything with `len(source)` and `source[i] -> mapping of column names to values`, so a plain list
of dicts is one, and so is a `datasets.Dataset`.
"""

from __future__ import annotations

import ast
import difflib
import gzip
import importlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from jaxrl_llm.checks import nearest_name
from jaxrl_llm.data.interfaces import Row, RowSource
from jaxrl_llm.data.reasoning import reasoning_gym_rows

FILE_ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")


def open_source(spec: str | os.PathLike[str] | RowSource) -> RowSource:
    """Opens rows from wherever they are.

    | spec | rows |
    |---|---|
    | `train.jsonl`, `train.jsonl.gz`, `train.parquet` | a file |
    | `hf:openai/gsm8k,config=main,split=train` | Hugging Face `datasets` (downloads) |
    | `tfds:gsm8k,split=train,data_dir=~/tfds` | TensorFlow Datasets, prepared as array_record |
    | `reasoning_gym:chain_sum,size=1000,seed=0` | generated; further options are the task's own |
    | a list of dicts, a `datasets.Dataset`, any `RowSource` | those very rows |

    Args:
        spec: One of the above.

    Raises:
        FileNotFoundError: The file is missing; the message names the path and files near it.
        ValueError: Unknown ending or option, no rows, a malformed line, or rows that are not objects.
    """
    if not isinstance(spec, str | os.PathLike):
        source, name = _rows_in_memory(spec), f"the given {type(spec).__name__}"
    else:
        name = os.fspath(spec)
        kind, _, rest = name.partition(":")
        if kind == "hf":
            dataset, options = _parse_options(rest, ("config", "split"))
            source = load_hugging_face(dataset, **options)
        elif kind == "tfds":
            dataset, options = _parse_options(rest, ("split", "data_dir"))
            source = TfdsSource(dataset, **options)
        elif kind == "reasoning_gym":
            source = _open_reasoning_gym(rest)
        else:
            source = _open_file(Path(spec).expanduser())
    if len(source) == 0:
        raise ValueError(f"{name} has no rows")
    return source


def read_json_lines(path: str | os.PathLike[str]) -> list[Row]:
    """Reads a file of one JSON object per line, gzipped if it ends in `.gz`; blank lines are skipped.

    The whole file is read, so that a malformed line is found before training starts; for data larger than
    memory use Parquet or array_record.

    Raises:
        ValueError: A line is not JSON or not an object (names path, line and text), or the file is damaged.
    """
    path = Path(path)
    rows: list[Row] = []
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    rows.append(_parse_line(line, f"{path}:{number}"))
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} could not be read after {len(rows)} rows: {error}") from error
    return rows


def _parse_line(line: str, place: str) -> Row:
    line = line.strip()
    text = line if len(line) <= 200 else line[:200] + "…"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not valid JSON ({error.msg}, column {error.colno}): {text}") from error
    if not isinstance(row, dict):
        raise ValueError(f'{place}: expected an object such as {{"prompt": …}}, got {type(row).__name__}: {text}')
    return row


class ParquetSource:
    """The rows of a Parquet file, held as Arrow columns.

    Args:
        path: The file.

    Raises:
        ValueError: The file is not Parquet.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        import pyarrow
        import pyarrow.parquet

        try:
            self._table = pyarrow.parquet.read_table(path)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{os.fspath(path)} could not be read as Parquet: {error}") from error

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int, /) -> Row:
        return self._table.slice(index, 1).to_pylist()[0]


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
        import tensorflow_datasets as tfds

        folder = None if data_dir is None else os.path.expanduser(data_dir)
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


def load_hugging_face(name: str, *, config: str | None = None, split: str = "train") -> RowSource:
    """Loads a data set with Hugging Face `datasets`, from the hub or a local folder.

    Args:
        name: Hub id such as `openai/gsm8k`, or a folder.
        config: Configuration (subset) name.
        split: Split, with slicing: `train`, `train[:1000]`.

    Raises:
        ImportError: `datasets` is not installed.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError(f"hf:{name} needs Hugging Face datasets: pip install 'jaxrl-llm[datasets]'") from error
    return datasets.load_dataset(name, config, split=split)


def _open_file(path: Path) -> RowSource:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name one file of it: {_files_near(path)}")
    if not path.exists():
        raise FileNotFoundError(
            f"no data file {path}; files near it: {_files_near(path)} (data sets that are no files are "
            "written hf:NAME, tfds:NAME or reasoning_gym:NAME)"
        )
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return read_json_lines(path)
    if path.suffix == ".parquet":
        return ParquetSource(path)
    raise ValueError(f"{path} has an unknown ending; known are {', '.join(FILE_ENDINGS)}")


def _files_near(path: Path) -> str:
    """Lists data files in the nearest existing folder, the names most like `path` first."""
    folder = path if path.is_dir() else path.parent
    while not folder.is_dir():
        folder = folder.parent
    names = [entry.name for entry in folder.iterdir() if entry.name.endswith(FILE_ENDINGS)]
    names.sort(key=lambda name: (-difflib.SequenceMatcher(None, name, path.name).ratio(), name))
    return ", ".join(str(folder / name) for name in names[:5]) or f"none in {folder.resolve()}"


def _rows_in_memory(rows: Any) -> RowSource:
    if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        raise ValueError(f"a source needs len() and [index], which {type(rows).__name__} has not; make it a list")
    if isinstance(rows, Mapping):
        raise ValueError(f"expected rows, got a mapping with the keys {list(rows)}; choose one of them (a split?)")
    if isinstance(rows, list | tuple):
        for index, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise ValueError(f"row {index} is a {type(row).__name__}, not a mapping of columns: {row!r:.200}")
    return rows


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
