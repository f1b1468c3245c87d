"""Files of a run that cannot be read any more: which, and what to do about it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

import jax

from jaxrl_llm.training.run.checksums import BrokenSealError

_OF_THE_STORE = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED")
"""How TensorStore begins what says nothing of the files: a bucket does not answer, or not to this user."""


class DamagedRunError(ValueError):
    """A file of a run is not what was written; the message names it and the way out."""


@contextlib.contextmanager
def reading_checkpoint(folder: str | os.PathLike[str], step: int, steps: Sequence[int]) -> Iterator[None]:
    """Turns what Orbax raises of a checkpoint that it cannot read, which may be anything, into `DamagedRunError`.

    Args:
        folder: of the checkpoints.
        step: the one being read.
        steps: all that there are.

    Raises:
        DamagedRunError: it cannot be read, or is not what was saved.
        OSError: the store does not give it out now.
    """
    try:
        yield
    except (PermissionError, MemoryError, jax.errors.JaxRuntimeError):  # these say nothing of the files
        raise
    except Exception as error:  # of any kind: Orbax, TensorStore and JSON each have their own for a broken file
        cause = " ".join(
            (str(error) if isinstance(error, BrokenSealError) else f"{type(error).__name__}: {error}").split()
        )
        if str(error).startswith(_OF_THE_STORE):
            raise OSError(f"checkpoint {step} in {os.fspath(folder)} could not be read: {cause:.200}") from error
        instead = "resume from an earlier one" if min(steps) < step else "start anew"
        raise DamagedRunError(
            f"checkpoint {step} in {os.fspath(folder)} is damaged ({cause:.200}); "
            f"delete {os.path.join(folder, str(step))} to {instead}"
        ) from error
