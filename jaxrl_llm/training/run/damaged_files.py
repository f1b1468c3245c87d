"""Files of a run that cannot be read any more: which, and what to do about it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

import jax


class DamagedRunError(ValueError):
    """A file of a run is not what was written; the message names it and the way out."""


@contextlib.contextmanager
def reading_checkpoint(folder: str | os.PathLike[str], step: int, steps: Sequence[int]) -> Iterator[None]:
    """Turns what Orbax raises of a checkpoint that it cannot read, which may be anything, into `DamagedRunError`.

    Args:
        folder: of the checkpoints.
        step: the one being read.
        steps: all that there are.
    """
    try:
        yield
    except (PermissionError, MemoryError, jax.errors.JaxRuntimeError):  # these say nothing of the files
        raise
    except Exception as error:  # of any kind: Orbax, TensorStore and JSON each have their own for a broken file
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        instead = "resume from an earlier one" if min(steps) < step else "start anew"
        raise DamagedRunError(
            f"checkpoint {step} in {os.fspath(folder)} is damaged ({cause:.200}); "
            f"delete {os.path.join(folder, str(step))} to {instead}"
        ) from error
