"""Errors that are no bugs, as one line and an exit status."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from safetensors import SafetensorError

from jaxrl_llm.training.offline import OfflineTrainer
from jaxrl_llm.training.on_policy import Trainer
from jaxrl_llm.training.run.damaged_files import DamagedRunError
from jaxrl_llm.training.run.distributed import ending_with_the_others
from jaxrl_llm.training.run.errors import RunError
from jaxrl_llm.training.run.memory import naming_phase
from jaxrl_llm.training.stage import TrainingResult
from jaxrl_llm.training.star.trainer import StarTrainer


@contextlib.contextmanager
def plain_errors(kinds: tuple[type[Exception], ...] = (ValueError, OSError, ImportError, RunError)) -> Iterator[None]:
    """Turns errors that are no bugs into one line on standard error and an exit status; a bug keeps its traceback.

    The status is 2 for what settings, data and damaged files cause, 1 for what the machine refuses (a full disk, a
    folder that may not be written, no memory left) and for runs that diverge, 130 for Ctrl-C.

    Args:
        kinds: which errors; by default those that settings, data and files cause.
    """
    try:
        with naming_phase("start"), ending_with_the_others():
            yield
    except KeyboardInterrupt as interrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from interrupt
    except kinds as error:
        print(f"error: {error}", file=sys.stderr)
        refused = isinstance(error, OSError | SafetensorError) and not isinstance(error, FileNotFoundError)
        status = error.status if isinstance(error, RunError) else 1 if refused else 2
        raise SystemExit(status) from error


def train(trainer: Trainer | OfflineTrainer | StarTrainer) -> TrainingResult:
    """Trains; what stops a run (a reward function that fails) ends the program with one line, the steps before saved.

    So does a file of the run that goes on, if it cannot be read any more.
    """
    with plain_errors((RunError, DamagedRunError, ImportError, OSError)):
        return trainer.run()
