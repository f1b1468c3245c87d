"""What reward functions are told of the run, and what they tell it beside rewards."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence, Set
from typing import Any

import jax

Sums = dict[str, tuple[float, int]]
"""Metrics by name: the sum of what was told, and how often; of several processes or batches they add up."""

_PLAIN = (str, bool, int, float, type(None))


@dataclasses.dataclass(frozen=True)
class TrainerState:
    """How far the run is: the fields of `transformers.TrainerState` that a reward may depend on.

    An evaluation without training is at step 0 of 0.
    """

    global_step: int = 0
    """Steps done: 0 while the samples of the first one are scored."""
    max_steps: int = 0
    """The last step."""
    epoch: float = 0.0
    """Passes over the data done."""
    num_train_epochs: float = 0.0
    """Passes over the data at the last step."""
    is_world_process_zero: bool = dataclasses.field(default_factory=lambda: jax.process_index() == 0)
    """Whether this is process 0."""

    def __getattr__(self, name: str) -> Any:
        fields = [field.name for field in dataclasses.fields(self)]
        raise AttributeError(f"trainer_state has no {name!r} here; it has {', '.join(fields)}")


class Told:
    """What reward functions tell by `log_metric` and `log_extra` while they score N samples.

    What comes when scoring has ended, from a call that was left to itself, is not heard.

    Args:
        count: N.
    """

    def __init__(self, count: int) -> None:
        self._count, self._open = count, True
        self.metrics: Sums = {}
        self.extra: dict[str, list[Any]] = {}

    @property
    def arguments(self) -> dict[str, Any]:
        """What reward functions are given to tell it by."""
        return {"log_metric": self.log_metric, "log_extra": self.log_extra}

    def log_metric(self, name: str, value: float) -> None:
        """Reports a number of this call as a metric of the step; several of one name are averaged.

        Raises:
            ValueError: The name is no text, or the value no number.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"log_metric({name!r:.80}, …): a metric's name is text")
        if isinstance(value, str | bytes):
            raise ValueError(f"log_metric({name!r}, {value!r:.80}): a metric is a number")
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"log_metric({name!r}, {value!r:.80}): a metric is a number") from None
        if self._open:
            self.metrics = added(self.metrics, {name: (number, 1)})

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Writes a value beside each of the call's completions; of two lists for one column the last one counts.

        Raises:
            ValueError: The column's name is no text, or there is not one value a sample.
        """
        if not isinstance(column, str) or not column:
            raise ValueError(f"log_extra({column!r:.80}, …): a column's name is text")
        if isinstance(values, str | bytes | Mapping | Set) or not hasattr(values, "__len__"):
            raise ValueError(f"log_extra({column!r}, …) needs a list of {self._count} values, got {values!r:.80}")
        if len(values) != self._count:
            raise ValueError(
                f"log_extra({column!r}, …) needs a list of {self._count} values, one a sample, got {len(values)}"
            )
        if self._open:
            self.extra[column] = [plain(value) for value in values]

    def close(self) -> None:
        """Nothing is heard any more."""
        self._open = False


def plain(value: Any) -> Any:
    """A value as JSON has it: numbers of NumPy and JAX as Python's, lists and objects likewise, others as text."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Mapping):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    try:
        return operator.index(value)
    except TypeError:
        return str(value)


def added(sums: Sums, more: Sums) -> Sums:
    """Both together."""
    both = dict(sums)
    for name, (total, count) in more.items():
        before, times = both.get(name, (0.0, 0))
        both[name] = before + total, times + count
    return both


def means(sums: Sums) -> dict[str, float]:
    """The metrics."""
    return {name: total / count for name, (total, count) in sums.items()}
