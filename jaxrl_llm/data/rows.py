"""Rows for training on given completions: what a data set of them is, in which order and shapes it is served."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np

from jaxrl_llm.data.interfaces import Row, RowSource
from jaxrl_llm.data.loader import ShuffledLoader

Overlong = Literal["raise", "drop"]
EncodedT = TypeVar("EncodedT")


class RowDataset(Protocol):
    """Rows that an `Objective` reads, tokenised and checked once, served by number."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """A flat JSON-able record, equal for equal rows: a run that goes on compares it."""
        ...

    @property
    def dropped(self) -> int:
        """Rows of the source that were too long and are not served."""
        ...

    def __len__(self) -> int: ...

    def batch(self, items: Sequence[int] | np.ndarray, /) -> Any:
        """The rows numbered `items` (0 to `len(self) - 1`, repeats are allowed).

        Returns:
            A named tuple of NumPy arrays, of the same shapes for equally many items: `prompt` `[P, Tp]` int32,
            `prompt_lengths` `[P]` int32, `completion` `[P, G, Tc]` int32, `mask` `[P, G, Tc]` bool, and what else the
            objective reads. For an objective with a reference one field is `ref_logprobs`, `None`. Each row has a token
            in its mask.
        """
        ...


@runtime_checkable
class RowFormat(Protocol):
    """How rows of a source become rows of an objective; a frozen record, and so a group of flags."""

    def dataset(
        self,
        source: RowSource,
        tokenizer: Any,
        *,
        max_prompt_length: int,
        max_completion_length: int,
        overlong: Overlong = "raise",
        max_rows: int | None = None,
    ) -> RowDataset:
        """Reads, checks and tokenises all rows.

        Args:
            source: the rows, as `open_source` gives them.
            tokenizer: what `jaxrl_llm.models.checkpoints.tokenizers.Tokenizer` describes.
            max_prompt_length: Tp, tokens per prompt.
            max_completion_length: Tc, tokens per completion, its end included.
            overlong: what to do with longer ones: `"raise"`, or `"drop"` the row and count it.
            max_rows: use the first rows only.

        Raises:
            ValueError: a row cannot be used; names its number.
        """
        ...


class ServedRows(NamedTuple):
    """A batch, and which rows it holds."""

    items: np.ndarray
    """`[P]` int64, numbers of the rows in the data set."""
    valid: np.ndarray
    """`[P]` bool, False for the repeats that fill up a last batch; their masks are empty."""
    rows: Any
    """What the data set's `batch` returned."""


class RowLoader(ShuffledLoader[ServedRows]):
    """Endless batches of rows, every epoch in another order; see `ShuffledLoader`.

    Args:
        dataset: The rows.
        batch_size: Rows per step.
        seed: Seed of the order, 0 to 2³² - 1.
    """

    def __init__(self, dataset: RowDataset, *, batch_size: int, seed: int) -> None:
        def serve(items: list[int], epoch: int) -> ServedRows:
            del epoch
            return ServedRows(np.asarray(items, np.int64), np.ones(len(items), bool), dataset.batch(items))

        super().__init__(serve, len(dataset), dataset.fingerprint, batch_size=batch_size, seed=seed)


def batches_in_order(dataset: RowDataset, *, batch_size: int) -> Iterator[ServedRows]:
    """Yields every row once, in the order of the source, in batches of one shape.

    The last batch is filled up with repeats from the start, whose masks are emptied, so that they count for nothing.
    """
    for start in range(0, len(dataset), batch_size):
        positions = np.arange(start, start + batch_size)
        items, valid = positions % len(dataset), positions < len(dataset)
        rows = dataset.batch(items)
        yield ServedRows(items, valid, rows._replace(mask=rows.mask & valid[:, None, None]))


class Ragged:
    """Many sequences of different lengths in one array; kept at the size of their content.

    Args:
        sequences: one-dimensional arrays of one type; at least one.
    """

    def __init__(self, sequences: Sequence[np.ndarray]) -> None:
        self.lengths = np.array([len(sequence) for sequence in sequences], np.int32)
        self.values = np.concatenate(sequences)
        self._starts = np.cumsum(self.lengths, dtype=np.int64) - self.lengths

    def padded(self, items: Sequence[int] | np.ndarray, width: int, *, fill: Any) -> np.ndarray:
        """The sequences numbered `items` as `[len(items), width]`, right-padded with `fill`."""
        out = np.full((len(items), width), fill, self.values.dtype)
        for slot, item in enumerate(items):
            start, length = self._starts[item], self.lengths[item]
            out[slot, :length] = self.values[start : start + length]
        return out


def rows_to_read(source: RowSource, max_rows: int | None) -> int:
    """The number of rows that are to be used.

    Raises:
        ValueError: there are none.
    """
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be positive, got {max_rows}")
    number = len(source) if max_rows is None else min(max_rows, len(source))
    if number == 0:
        raise ValueError("the data set has no rows")
    return number


def read_rows(source: RowSource, encode: Callable[[Row], EncodedT], *, max_rows: int | None = None) -> list[EncodedT]:
    """What `encode` makes of each row.

    Raises:
        ValueError: there are no rows, or one is no mapping or cannot be encoded; names its number.
    """
    encoded = []
    for index in range(rows_to_read(source, max_rows)):
        row = source[index]
        if not isinstance(row, Mapping):
            raise ValueError(f"row {index} is a {type(row).__name__}, not a mapping of columns: {row!r:.200}")
        try:
            encoded.append(encode(row))
        except Exception as error:  # the tokenizer's and the template's own errors do not know the row
            raise ValueError(f"row {index}: {error}") from error
    return encoded


def rows_that_fit(
    prompt_lengths: Sequence[int],
    completion_lengths: Sequence[int],
    *,
    max_prompt_length: int,
    max_completion_length: int,
    overlong: Overlong,
) -> np.ndarray:
    """Numbers of the rows that are short enough.

    Args:
        prompt_lengths: tokens of each row's prompt.
        completion_lengths: tokens of each row's longest completion.
        max_prompt_length: Tp.
        max_completion_length: Tc.
        overlong: whether others are an error.

    Raises:
        ValueError: a row is too long and `overlong` is `"raise"`, or none is left; names the row and the numbers.
    """
    if overlong not in ("raise", "drop"):
        raise ValueError(f"overlong is 'raise' or 'drop', got {overlong!r}")
    checks = (("prompt", prompt_lengths, max_prompt_length), ("completion", completion_lengths, max_completion_length))
    fits = np.ones(len(prompt_lengths), bool)
    for _, lengths, limit in checks:
        fits &= np.asarray(lengths) <= limit
    if fits.all() or (overlong == "drop" and fits.any()):
        return np.flatnonzero(fits)
    for what, lengths, limit in checks:
        longer = np.flatnonzero(np.asarray(lengths) > limit)
        if longer.size:
            advice = f"raise max_{what}_length" + (" or set overlong='drop'" if fits.any() else "")
            raise ValueError(
                f"row {longer[0]}: the {what} has {lengths[longer[0]]} tokens, more than max_{what}_length={limit} "
                f"({longer.size} of {fits.size} {what}s are too long, the longest has {max(lengths)}); {advice}"
            )
    raise AssertionError("a row that does not fit is too long in something")
