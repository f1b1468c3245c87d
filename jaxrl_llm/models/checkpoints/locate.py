"""From what a user calls a checkpoint (folder, `.gguf` file, hub id) to a local path; `transformers`, imported."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")


def import_transformers() -> ModuleType:
    """`transformers`, imported without its notice that PyTorch is missing: nothing here needs PyTorch."""
    with _quiet() if "transformers" not in sys.modules else contextlib.nullcontext():
        import transformers
    return transformers


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    switch = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[switch]
        else:
            os.environ[switch] = before


def locate(name: str | os.PathLike[str], *, weights: bool = True, revision: str | None = None) -> Path:
    """The local folder or `.gguf` file of a checkpoint, downloaded first if `name` is a hub id.

    The network is used only when `name` is no existing path and has the form `organisation/name`.

    Args:
        name: a folder, a `.gguf` file, or a hub id.
        weights: whether the weights are needed, or only configuration and tokenizer.
        revision: branch, tag or commit of a hub id.

    Raises:
        ValueError: there is no such path, and `name` is no hub id; or the download failed.
    """
    path = Path(name).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        _check_no_run(path)
        return path
    if path.is_file():
        raise ValueError(f"{path} is a file, but neither a model folder nor a .gguf file")
    text = os.fspath(name)
    if not _HUB_ID.fullmatch(text) or text.endswith((".gguf", ".safetensors", ".json")):
        raise ValueError(f"{text} does not exist; give a folder, a .gguf file, or a hub id such as 'Qwen/Qwen3-0.6B'")
    if Path(text.split("/")[0]).is_dir():
        raise ValueError(f"{text} does not exist, but the folder {text.split('/')[0]!r} does: a misspelt local path?")
    return _download(text, weights=weights, revision=revision)


def _check_no_run(path: Path) -> None:
    """Refuses the folder of a run, or of its checkpoints, and names the models that are in it."""
    run = path.parent if path.name == "checkpoints" else path
    if not (run / "checkpoints").is_dir() or any(run.glob("*.safetensors")):
        return
    steps = sorted(int(step.name) for step in (run / "checkpoints").iterdir() if step.name.isdigit())
    models = [run / "model"] if (run / "model" / "config.json").is_file() else []
    models += [run / "checkpoints" / str(step) for step in steps[-1:]]
    raise ValueError(f"{path} is the folder of a run: give {' or '.join(map(str, models)) or 'a model'}")


def _download(name: str, *, weights: bool, revision: str | None) -> Path:
    # Imported here: most runs read local files, and need no HTTP stack.
    from huggingface_hub import snapshot_download

    patterns = [*_TOKENIZER_FILES, *(["*.safetensors"] if weights else [])]
    try:
        # Subfolders and "consolidated" files hold the same weights in other formats.
        folder = snapshot_download(
            name, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"]
        )
    except Exception as error:  # of many kinds: HTTP, cache, offline mode
        raise ValueError(
            f"{name} is no local folder, and could not be had from the hub: {type(error).__name__}: "
            + " ".join(str(error).split())
        ) from error
    return Path(folder)
