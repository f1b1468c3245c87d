"""Rows for training on given completions: what a data set of them is, in which order and shapes it is served."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

import numpy as np

from jaxrl_llm.data.encoded_rows import EncodedRow, EncodedRows, Overlong, read_rows, row_of
from jaxrl_llm.data.interfaces import Row, RowSource
from jaxrl_llm.data.loader import ShuffledLoader


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


EncodedT = TypeVar("EncodedT", bound=EncodedRow)
DatasetT = TypeVar("DatasetT", bound=RowDataset, covariant=True)


class RowFormat(abc.ABC, Generic[EncodedT, DatasetT]):
    """How rows of a source become rows of an objective; a frozen record, and so a group of flags.

    A format says what a row is as token ids and which data set holds them; reading is the same for all.
    """

    _USABLE = "can be used"
    """What a row is that becomes something, for errors."""

    def settled(self, row: Row) -> Self:
        """This format, with what it leaves to the rows (columns that they may have or not) decided by the first one."""
        del row
        return self

    @abc.abstractmethod
    def encoder(self, tokenizer: Any) -> Callable[[Row], Sequence[EncodedT]]:
        """Makes the function from a row to token ids: nothing, where it cannot be used, or one and more.

        The function raises ValueError where a column is missing or is not what it should be.

        Args:
            tokenizer: what `jaxrl_llm.models.checkpoints.tokenizers.Tokenizer` describes.
        """

    @abc.abstractmethod
    def collect(self, encoded: EncodedRows[EncodedT]) -> DatasetT:
        """The data set of what became of the rows."""

    def dataset(
        self,
        source: RowSource,
        tokenizer: Any,
        *,
        max_prompt_length: int,
        max_completion_length: int,
        overlong: Overlong = "raise",
        max_rows: int | None = None,
    ) -> DatasetT:
        """Reads, checks and tokenises all rows, so that what cannot be used is found before training starts.

        Args:
            source: the rows, as `open_source` gives them.
            tokenizer: what `jaxrl_llm.models.checkpoints.tokenizers.Tokenizer` describes; not kept.
            max_prompt_length: Tp, tokens per prompt.
            max_completion_length: Tc, tokens per completion, its end included.
            overlong: what to do with longer ones: `"raise"`, or `"drop"` and count them.
            max_rows: use the first rows only.

        Raises:
            ValueError: there are no rows, or one cannot be used or is too long; names its number.
        """
        form = self.settled(row_of(source, 0)) if len(source) else self
        encoded = read_rows(source, form.encoder(tokenizer), max_rows=max_rows)
        if not any(encoded):
            raise ValueError(f"none of {len(encoded)} rows {self._USABLE}")
        return form.collect(
            EncodedRows[EncodedT].fitting(
                encoded,
                max_prompt_length=max_prompt_length,
                max_completion_length=max_completion_length,
                overlong=overlong,
            )
        )


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
