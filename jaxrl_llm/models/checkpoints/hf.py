"""Hugging Face folders: `config.json` and safetensors files, read by slice and written atomically."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxrl_llm.models.checkpoints.mxfp4 import PACKED
from jaxrl_llm.models.checkpoints.weights import Index, Layout, Leaf, leaves
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.entries import shown
from jaxrl_llm.models.stack import Stack
from jaxrl_llm.sharding import on_host

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"

_FLOATS = ("F64", "F32", "F16", "BF16")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: the file is missing or broken, or an object in it has a key twice or a number that is not finite;
            names the file.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if not path.is_file():  # a pipe would be waited for without end
        raise ValueError(f"{path} is no plain file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError(f"{path} is not valid JSON: nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = sorted({key for key, count in Counter(key for key, _ in pairs).items() if count > 1})
        raise ValueError(f"an object has a key twice: {shown(twice)}")
    for key, item in pairs:
        if isinstance(item, float) and not math.isfinite(item):
            raise ValueError(f"{key}={item} is no finite number")
    return value


class SafetensorsSource:
    """The tensors of a folder: `model.safetensors`, or the shards that its index names."""

    def __init__(self, folder: Path, file: str = WEIGHTS):
        """Opens the files and reads their headers.

        Args:
            folder: where they are.
            file: the name of the file where there is but one.

        Raises:
            ValueError: no safetensors files, a shard that lies elsewhere, is missing, truncated or corrupt, a tensor
                that is not in the file where the index places it, or in two, or that is no float and none of
                `mxfp4`'s bytes; each is named.
        """
        self._files: dict[str, Any] = {}
        self._places: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        index = folder / f"{file}.index.json"
        if index.exists():
            placed = _read_index(index)
        elif (folder / file).exists():
            placed = {}
        else:
            raise ValueError(f"{folder} holds neither {file} nor {index.name}{_hint(folder)}")
        for shard in sorted(set(placed.values())) or [file]:
            if not (folder / shard).exists():
                raise ValueError(
                    f"{folder / shard} is missing, but {index.name} names it: the checkpoint is incomplete"
                )
            self._open(folder / shard)
        for tensor, shard in placed.items():
            if self._places.get(tensor) != shard:
                raise ValueError(f"{folder / shard} has no tensor {tensor!r}, where {index.name} places it")

    def _open(self, path: Path) -> None:
        if not path.is_file():
            raise ValueError(f"{path} is no plain file")
        try:
            file = safe_open(path, framework="numpy")
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or corrupt: {error}") from error
        for name in file.keys():  # noqa: SIM118 (no mapping)
            view = file.get_slice(name)
            if view.get_dtype() not in _FLOATS and not (view.get_dtype() == "U8" and name.endswith(PACKED)):
                raise ValueError(
                    f"{path}: tensor {name!r} is {view.get_dtype()}; only {', '.join(_FLOATS)} are read: "
                    "use the unquantised checkpoint"
                )
            if name in self._places:
                raise ValueError(f"{path}: tensor {name!r} is in {self._places[name]}, too: one of them must go")
            self.shapes[name] = tuple(view.get_shape())
            self._files[name], self._places[name] = file, path.name

    def read(self, name: str, index: Index) -> np.ndarray:
        """The slice `index` of a tensor; the rest of the file is not read."""
        return self._files[name].get_slice(name)[index]


def _read_index(index: Path) -> dict[str, str]:
    """The shard of each tensor, all of them files of the index's own folder."""
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise ValueError(f"{index}: weight_map={shown(placed)} must be an object, from each tensor to its file")
    for tensor, shard in placed.items():
        # A name alone: what the index says must not reach beyond the checkpoint's folder.
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or Path(shard).name != shard:
            raise ValueError(
                f"{index}: weight_map[{shown(tensor)}]={shown(shard)} must be the name of a .safetensors file in the "
                "same folder"
            )
    for shard in sorted(set(placed.values())):
        target, home = (index.parent / shard).resolve(), index.parent.resolve()
        # The hub's cache links each file of a snapshot to its blobs.
        blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
        if target.parent not in (home, blobs):
            raise ValueError(
                f"{index.parent / shard} is a link to {target}: a shard must lie in the checkpoint's folder"
            )
    return placed


def _hint(folder: Path) -> str:
    for pattern, advice in (
        ("*.gguf", "give the path of the .gguf file itself"),
        ("*.bin", "pickled weights are not read: convert them with transformers' save_pretrained"),
        ("*.pt*", "pickled weights are not read: convert them with transformers' save_pretrained"),
    ):
        found = sorted(path.name for path in folder.glob(pattern))
        if found:
            return f", but {', '.join(found[:3])}: {advice}"
    return ""


# ---------------------------------------------------------------- writing


def overwrite_problem(folder: Path, *, overwrite: bool, marker: str = CONFIG) -> str | None:
    """Why nothing must be written to `folder`, or `None`: only folders of its kind, with `marker`, are replaced."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / marker).is_file():
        kind = "model folder" if marker == CONFIG else "folder of adapters"
        return f"{folder} exists and holds no {marker}: it is no {kind}, and will not be overwritten"
    return None if overwrite else f"{folder} exists already; choose another folder, or set overwrite=True"


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` at the end, if nothing failed.

    An existing folder stays as it was until the new one is complete. It is moved aside, not deleted, before
    the new one takes its name, so that a kill at any moment leaves one of the two whole; what it leaves beside it,
    the next writer of the folder puts in its place or removes.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _finish_replacement(folder)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        yield staging
        readable = 0o777 & ~_umask()  # mkdtemp and safetensors keep what they make to the user alone
        staging.chmod(readable)
        for path in staging.rglob("*.safetensors"):
            path.chmod(readable & 0o666)
        old = staging.with_suffix(".old")
        if folder.exists():
            os.rename(folder, old)
        os.rename(staging, folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _finish_replacement(folder: Path) -> None:
    """Does what a writer that was killed had still to do."""
    beside = [path for path in folder.parent.iterdir() if path.suffix in (".partial", ".old")]
    left = [path for path in beside if path.stem[:-8] == f".{folder.name}."]  # mkdtemp adds eight characters
    for path in left:
        if path.suffix == ".partial" and path.with_suffix(".old").exists() and not folder.exists():
            os.rename(path, folder)  # whole: the old one had made room for it
    for path in left:
        shutil.rmtree(path, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_weights(
    folder: Path | None,
    params: Params,
    names: Mapping[str, str],
    stack: Stack,
    *,
    max_shard_bytes: int | None = 5 * 10**9,
    file: str = WEIGHTS,
) -> None:
    """Writes the parameters as safetensors, in shards where they are large.

    Every process takes part, for parameters that are spread over processes are gathered one at a time; the
    one that is given a folder writes.

    Args:
        folder: an existing folder, or `None` on the processes that do not write.
        params: the tree of parameters.
        names: parameter → tensor name.
        stack: says which layers have a parameter.
        max_shard_bytes: a file holds at most this much, unless one tensor alone is larger; `None`: all are in one.
        file: its name where there is but one.
    """
    plan = _plan_shards(leaves(params, names, stack), max_shard_bytes)
    arrays = dict(zip([leaf.path for leaf in leaves(params, names, stack)], jax.tree.leaves(params), strict=True))
    placed: dict[str, str] = {}
    gathered: dict[str, np.ndarray] = {}
    for number, shard in enumerate(plan, start=1):
        needed = {leaf.path for parts in shard.values() for leaf, _ in parts}
        gathered = {path: gathered[path] if path in gathered else on_host(arrays[path]) for path in sorted(needed)}
        if folder is None:
            continue
        name = file if len(plan) == 1 else f"model-{number:05}-of-{len(plan):05}.safetensors"
        save_file(
            {tensor: _joined(parts, gathered) for tensor, parts in shard.items()},
            folder / name,
            {"format": "pt"},
        )
        placed |= dict.fromkeys(shard, name)
    if folder is not None and len(plan) > 1:
        size = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves(params, names, stack))
        write_json(folder / WEIGHTS_INDEX, {"metadata": {"total_size": size}, "weight_map": placed})


_Parts = list[tuple[Leaf, int]]
"""The parameters that a tensor holds, one below the other, and which of its tensors it is to each of them."""


def _plan_shards(tree: list[Leaf], max_bytes: int | None) -> list[dict[str, _Parts]]:
    """The tensors of each file."""
    tensors: dict[str, _Parts] = {}
    for leaf in tree:
        for number, tensor in enumerate(leaf.tensors):
            tensors.setdefault(tensor, []).append((leaf, number))
    shards: list[dict[str, _Parts]] = [{}]
    room = max_bytes = sys.maxsize if max_bytes is None else max_bytes
    for tensor, parts in tensors.items():
        leaf = parts[0][0]
        size = int(np.prod(leaf.tensor_shape)) * leaf.dtype.itemsize
        if size > room and shards[-1]:
            shards.append({})
            room = max_bytes
        shards[-1][tensor] = sorted(parts, key=lambda part: (part[0].first_row, part[0].layout.first))
        room -= size
    return shards


def _joined(parts: _Parts, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    found = [arrays[leaf.path].reshape(len(leaf.tensors), *leaf.own_shape)[number] for leaf, number in parts]
    layout = parts[0][0].layout
    if layout == Layout():
        return np.ascontiguousarray(found[0] if len(found) == 1 else np.concatenate(found))
    return np.ascontiguousarray(layout.tensor(found))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object, indented, keys sorted."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
