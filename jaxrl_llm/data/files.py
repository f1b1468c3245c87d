"""Files of rows: JSON, JSON lines, CSV, Parquet, and folders that `datasets` saved."""

from __future__ import annotations

import csv
import difflib
import gzip
import importlib
import os
import stat
import sys
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxrl_llm.data.arrow import read_parquet
from jaxrl_llm.data.interfaces import Row, RowSource
from jaxrl_llm.data.strict_json import parse_json

FILE_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")
_SAVED = ("state.json", "dataset_dict.json")
"""What `save_to_disk` writes beside the rows of a data set, and of several."""
_DAMAGE = (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error)


def open_file(path: Path) -> RowSource:
    """The rows of a file, or of a folder that `save_to_disk` wrote.

    Raises:
        FileNotFoundError: it is missing; names files near it.
        ValueError: it is no file of rows, or damaged; says where.
    """
    if path.is_dir():
        if is_saved(path):
            return load_saved(path)
        raise ValueError(f"{path} is a folder; name one file of it: {_files_near(path)}")
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no data file {path}; files near it: {_files_near(path)} (data sets that are no files are "
            "written hf:NAME, tfds:NAME or reasoning_gym:NAME)"
        ) from error
    if not stat.S_ISREG(mode):  # a pipe that nobody writes would be read for ever
        raise ValueError(f"{path} is a pipe, socket or device; write the rows to a file, such as rows.jsonl")
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return read_json_lines(path)
    readers = {".json": read_json, ".csv": read_csv, ".parquet": read_parquet}
    if path.suffix not in readers:
        raise ValueError(f"{path} has an unknown ending; known are {', '.join(FILE_ENDINGS)}")
    return readers[path.suffix](path)


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
                    rows.append(_json_row(line.strip(), f"{path}:{number}"))
    except _DAMAGE as error:
        raise ValueError(f"{path} could not be read after {len(rows)} rows: {error}") from error
    return rows


def _json_row(text: str, place: str) -> Row:
    row = parse_json(text, place)
    if not isinstance(row, dict):
        shown = text if len(text) <= 200 else text[:200] + "…"
        raise ValueError(f'{place}: expected an object such as {{"prompt": …}}, got {type(row).__name__}: {shown}')
    return row


def read_json(path: str | os.PathLike[str]) -> list[Row]:
    """Reads a JSON file: an array of objects, by itself or as the one list of an object (`{"data": [...]}`).

    A file of one object per line, which often bears this ending, is read as one.

    Raises:
        ValueError: it is something else, or damaged; names path and place.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} could not be read: {error}") from error
    first = text.partition("\n")[0].rstrip()
    if first != text and first.startswith("{") and first.endswith("}"):
        return read_json_lines(path)
    if not text:
        return []
    value = parse_json(text, str(path))
    if isinstance(value, dict):
        lists = [name for name, inner in value.items() if _is_rows(inner)]
        if len(lists) != 1:
            found = f"the lists of rows {lists}" if lists else f"no list of rows under {list(value)[:9]}"
            raise ValueError(f"{path}: expected an array of objects, found an object with {found}; write one array")
        value = value[lists[0]]
    if not isinstance(value, list):
        raise ValueError(f"{path}: expected an array of objects, got {type(value).__name__}: {text[:200]}")
    for number, row in enumerate(value):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: row {number} is a {type(row).__name__}, not an object: {row!r:.200}")
    return value


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def read_csv(path: str | os.PathLike[str]) -> list[Row]:
    """Reads a CSV file whose first line names the columns; every value is text, as it stands there.

    Raises:
        ValueError: a line has more or fewer values than there are columns, a column has no name or one of another,
            or the file is damaged; names path and line.
    """
    path = Path(path)
    rows: list[Row] = []
    limit = csv.field_size_limit(sys.maxsize)  # 128 KiB otherwise
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, strict=True)
            names = next(lines, [])
            if "" in names or len(set(names)) < len(names):
                raise ValueError(f"{path}:1: each column needs a name of its own, got {names}")
            for values in lines:
                if values and len(values) != len(names):
                    raise ValueError(
                        f"{path}:{lines.line_num}: {len(values)} values for the {len(names)} columns {names}; put "
                        f"values with commas or line breaks in double quotes: {','.join(values)[:200]}"
                    )
                if values:
                    rows.append(dict(zip(names, values, strict=True)))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} could not be read after {len(rows)} rows: {error}") from error
    finally:
        csv.field_size_limit(limit)
    return rows


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote a folder."""
    return any((folder / name).is_file() for name in _SAVED)


def load_saved(folder: Path, split: str | None = None) -> RowSource:
    """The data set that `save_to_disk` wrote to a folder.

    Args:
        folder: of a data set, or of several by their splits.
        split: which of several; may be left out where there is one.

    Raises:
        ValueError: there are several and none is named, or there is no such split, or it cannot be read.
        ImportError: `datasets` is not installed.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in folder.iterdir() if (entry / "state.json").is_file())
        if split is None and len(splits) == 1:
            split = splits[0]
        if split not in splits:
            wanted = "several splits" if split is None else f"no split {split!r}"
            ways = " or ".join(str(folder / name) for name in splits)
            raise ValueError(f"{folder} holds {wanted}; name one of them: {ways}")
        folder = folder / split
    try:
        return import_datasets(str(folder)).load_from_disk(str(folder))
    except ImportError:
        raise
    except Exception as error:  # of many kinds: JSON, Arrow, versions
        raise ValueError(f"{folder} could not be read as a saved data set: {type(error).__name__}: {error}") from error


def import_datasets(wanted: str) -> ModuleType:
    """Hugging Face `datasets`.

    Raises:
        ImportError: it is not installed; names what needs it.
    """
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError(f"{wanted} needs Hugging Face datasets: pip install 'jaxrl-llm[datasets]'") from error


def _files_near(path: Path) -> str:
    """Lists data files in the nearest existing folder, the names most like `path` first."""
    folder = path if path.is_dir() else path.parent
    while not folder.is_dir():
        folder = folder.parent
    names = [entry.name for entry in folder.iterdir() if entry.name.endswith(FILE_ENDINGS)]
    names.sort(key=lambda name: (-difflib.SequenceMatcher(None, name, path.name).ratio(), name))
    return ", ".join(str(folder / name) for name in names[:5]) or f"none in {folder.resolve()}"
