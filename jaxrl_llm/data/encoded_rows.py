"""Rows as token ids: read from a source and checked once, kept at the size of their content, served by number."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np

from jaxrl_llm.data.interfaces import Row, RowSource

Overlong = Literal["raise", "drop"]


class EncodedRow(Protocol):
    """What a row becomes: a prompt and one or two completions as token ids."""

    @property
    def prompt(self) -> np.ndarray:
        """int32."""
        ...

    @property
    def longest(self) -> int:
        """Tokens of the longest completion."""
        ...


EncodedT = TypeVar("EncodedT", bound=EncodedRow)
ReadT = TypeVar("ReadT")


@dataclass(frozen=True)
class EncodedRows(Generic[EncodedT]):
    """The rows of a source that can be used and fit, as token ids: what a data set of them is made of."""

    kept: list[EncodedT]
    """At least one."""

    rows: np.ndarray
    """Number of each one's row in the source."""

    num_rows: int
    """Rows that were read."""

    unusable: int
    """Rows that are nothing to train on."""

    overlong: int
    """Number of those that were too long."""

    max_prompt_length: int
    """Tp, tokens per prompt."""

    max_completion_length: int
    """Tc, tokens per completion, its end included."""

    @classmethod
    def fitting(
        cls,
        encoded: Sequence[Sequence[EncodedT]],
        *,
        max_prompt_length: int,
        max_completion_length: int,
        overlong: Overlong = "raise",
    ) -> EncodedRows[EncodedT]:
        """Of all that became of the rows, what is short enough.

        Args:
            encoded: what became of each row: nothing, where it cannot be used, or one and more; at least one in all.
            max_prompt_length: Tp.
            max_completion_length: Tc.
            overlong: what to do with longer ones: `"raise"`, or `"drop"` and count them.

        Raises:
            ValueError: one is too long, or none is left; names its row.
        """
        every = [one for row in encoded for one in row]
        rows = np.repeat(np.arange(len(encoded)), [len(row) for row in encoded])
        lengths = {"prompt": [len(one.prompt) for one in every], "completion": [one.longest for one in every]}
        limits = {"prompt": max_prompt_length, "completion": max_completion_length}
        fitting = rows_that_fit(lengths, limits, overlong=overlong, rows=rows)
        return cls(
            [every[number] for number in fitting],
            rows[fitting],
            num_rows=len(encoded),
            unusable=sum(not row for row in encoded),
            overlong=len(every) - len(fitting),
            max_prompt_length=max_prompt_length,
            max_completion_length=max_completion_length,
        )


class EncodedDataset(Generic[EncodedT]):
    """What data sets of given completions have in common.

    Args:
        encoded: The rows, as a format reads them (`RowFormat.dataset`).
        name: What one of them is called in the fingerprint: `"pairs"`.
        parts: Arrays of each one, in the order in which the fingerprint hashes them; the prompt first.

    Attributes:
        encoded: Those that are served, as token ids.
        rows: Numbers of their rows in the source.
        overlong: Number of those that were too long.
        unusable: Number of rows that are nothing to train on.
        dropped: Both together.
        fingerprint: Number of rows read and of those served, and a hash of every token, mask and label.
        remarks: What a run says of them at its start.
    """

    remarks: tuple[str, ...] = ()

    def __init__(self, encoded: EncodedRows[EncodedT], name: str, parts: Sequence[Ragged]) -> None:
        self.encoded, self.rows = encoded.kept, encoded.rows
        self.overlong, self.unusable = encoded.overlong, encoded.unusable
        self.dropped = encoded.overlong + encoded.unusable
        self.fingerprint: dict[str, Any] = {"rows": encoded.num_rows, name: len(self.encoded), "content": _hash(parts)}
        self._prompt_width, self._width = encoded.max_prompt_length, encoded.max_completion_length
        self._prompts, *self._parts = parts

    def __len__(self) -> int:
        return len(self.encoded)

    def _served_prompts(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The prompts of a batch `[P, Tp]`, and their lengths `[P]`."""
        prompt = self._prompts.padded(numbers, self._prompt_width)
        return {"prompt": prompt, "prompt_lengths": self._prompts.lengths[numbers]}


class Ragged:
    """Many sequences of different lengths in one array; kept at the size of their content.

    Args:
        sequences: one-dimensional arrays of one type; at least one.
    """

    def __init__(self, sequences: Sequence[np.ndarray]) -> None:
        self.lengths = np.array([len(sequence) for sequence in sequences], np.int32)
        self.values = np.concatenate(sequences)
        self._starts = np.cumsum(self.lengths, dtype=np.int64) - self.lengths

    def padded(self, items: Sequence[int] | np.ndarray, width: int, *, fill: Any = 0) -> np.ndarray:
        """The sequences numbered `items` as `[len(items), width]`, right-padded with `fill`.

        What fills up is never read where lengths and masks say what is content.
        """
        out = np.full((len(items), width), fill, self.values.dtype)
        for slot, item in enumerate(items):
            start, length = self._starts[item], self.lengths[item]
            out[slot, :length] = self.values[start : start + length]
        return out


def _hash(parts: Sequence[Ragged]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.lengths.tobytes())
        digest.update(part.values.tobytes())
    return digest.hexdigest()[:16]


def counted(dataset: Any, name: str) -> str:
    """How many there are, how many were dropped and why, and what else is to be said of them: a line for a run's start.

    Args:
        dataset: with a length and `dropped`; `unusable` and `remarks` where it has any; `None`: none.
        name: what they are called: `"prompts"`.
    """
    if dataset is None:
        return "none"
    unusable = getattr(dataset, "unusable", 0)
    reasons = {"too long": dataset.dropped - unusable, "nothing to train on": unusable}
    dropped = [f"{number} dropped as {reason}" for reason, number in reasons.items() if number]
    said = "; ".join([*dropped, *getattr(dataset, "remarks", ())])
    return f"{len(dataset)} {name}" + (f" ({said})" if said else "")


def read_rows(source: RowSource, read: Callable[[Row], ReadT], *, max_rows: int | None = None) -> list[ReadT]:
    """What `read` makes of each row, or of the first `max_rows`.

    Raises:
        ValueError: there are no rows, or one is no mapping or cannot be read; names its number.
    """
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be positive, got {max_rows}")
    number = len(source) if max_rows is None else min(max_rows, len(source))
    if number == 0:
        raise ValueError("the data set has no rows")
    results = []
    for index in range(number):
        row = row_of(source, index)
        try:
            results.append(read(row))
        except Exception as error:  # the tokenizer's and the template's own errors do not know the row
            raise ValueError(f"row {index}: {str(error) or type(error).__name__}") from error
    return results


def row_of(source: RowSource, index: int) -> Row:
    """A row of a source.

    Raises:
        ValueError: it is no mapping of columns.
    """
    row = source[index]
    if not isinstance(row, Mapping):
        raise ValueError(f"row {index} is a {type(row).__name__}, not a mapping of columns: {row!r:.200}")
    return row


def rows_that_fit(
    lengths: Mapping[str, Sequence[int]],
    limits: Mapping[str, int],
    *,
    overlong: Overlong,
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """Numbers of the rows that are short enough.

    Args:
        lengths: tokens of each row's `prompt`, and of its longest `completion` where it has any.
        limits: the most there may be of each, as `max_prompt_length` and `max_completion_length` say.
        overlong: whether others are an error.
        rows: the rows' numbers in the source, for errors; by default as they come.

    Raises:
        ValueError: a row is too long and `overlong` is `"raise"`, or none is left; names the row and the numbers.
    """
    if overlong not in ("raise", "drop"):
        raise ValueError(f"overlong is 'raise' or 'drop', got {overlong!r}")
    too_long = {what: np.asarray(lengths[what]) > limit for what, limit in limits.items()}
    fits = ~np.any(list(too_long.values()), axis=0)
    if fits.all() or (overlong == "drop" and fits.any()):
        return np.flatnonzero(fits)
    what = next(what for what, longer in too_long.items() if longer.any())
    first = int(too_long[what].argmax())
    advice = f"raise max_{what}_length" + (" or set overlong='drop'" if fits.any() else "")
    raise ValueError(
        f"row {first if rows is None else rows[first]}: the {what} has {lengths[what][first]} tokens, more than "
        f"max_{what}_length={limits[what]} ({too_long[what].sum()} of {fits.size} {what}s are too long, the longest "
        f"has {max(lengths[what])}); {advice}"
    )
