"""A data set of tokenised prompts, and the batches it is served in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrl_llm.data.encoded_rows import Overlong, Ragged, read_rows, row_of, rows_that_fit
from jaxrl_llm.data.formats import Prompt, PromptFormat
from jaxrl_llm.data.interfaces import Row, RowSource
from jaxrl_llm.data.messages import tools_of
from jaxrl_llm.data.tokens import encode_prompt, opened_thought

# Reward functions receive these beside the columns.
_REWARD_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra")


@dataclass(frozen=True)
class PromptBatch:
    """P prompts, as the sampler and the reward functions need them."""

    tokens: np.ndarray
    """[P, Tp] int32, right-padded."""

    lengths: np.ndarray
    """[P] int32, number of tokens of each prompt."""

    prompts: list[Prompt]
    """Text or messages, for the reward functions."""

    openings: list[str]
    """What each prompt has begun of its completion: a thought (`<think>` and the space behind it), or nothing. It is
    put before the completions that reward functions read."""

    columns: dict[str, list[Any]]
    """Every other column of the rows, None where a row lacks it."""

    indices: np.ndarray
    """[P] int64, each prompt's row number in the source."""

    valid: np.ndarray
    """[P] bool, False for the repeats that fill up the last batch of an evaluation."""

    epoch: int
    """Epoch of the batch's first prompt, from 0; the batch may run on into the next one."""


class PromptDataset:
    """A source's prompts, formatted, checked and tokenised once.

    Every row is read at construction, so that a missing column or a prompt that is too long is found before
    training starts, and so that the order of prompts does not depend on which are dropped. Tokens are kept (4
    bytes each); rows are read again when they are served.

    Args:
        source: The rows, as `open_source` gives them.
        tokenizer: What `jaxrl_llm.models.checkpoints.tokenizers.Tokenizer` describes; not kept.
        max_prompt_length: Tp, tokens per prompt including special ones.
        prompt_format: How a row becomes a prompt; the column `prompt` by default.
        overlong: What to do with longer prompts: `"raise"`, or `"drop"` and count them.
        max_rows: Use the first rows only.

    Attributes:
        column_names: Columns that reach the reward functions, of all rows together.
        dropped: Number of prompts that were too long.
        longest: Tokens of the longest prompt kept.
        fingerprint: Number of rows and of prompts and a hash of every row; equal for equal data.
        remarks: What a run says of them at its start.
        scorable_by: Groups of reward functions that can score every row, as `check_scorable` found.

    Raises:
        ValueError: No rows, a row that gives no prompt (names its number), a prompt that is too long (names
            its row, its length and the limit) or nothing left after dropping.
    """

    def __init__(
        self,
        source: RowSource,
        tokenizer: Any,
        *,
        max_prompt_length: int,
        prompt_format: PromptFormat | None = None,
        overlong: Overlong = "raise",
        max_rows: int | None = None,
    ) -> None:
        self.max_prompt_length = max_prompt_length
        self._source = source
        self._format = prompt_format or PromptFormat()
        self._pad = tokenizer.pad_token_id or 0  # never read: lengths say what is a token
        names, digest = {}, hashlib.sha256()

        def read(row: Row) -> np.ndarray:
            """Tokenises a row, and gathers the columns' names and the hash of the content on the way."""
            prompt = self._format.prompt(row)
            ids = encode_prompt(prompt, tokenizer, tools=tools_of(row, prompt))
            names.update(dict.fromkeys(row))
            digest.update(_stable_text(row).encode("utf-8", "surrogatepass"))
            return np.asarray(ids, np.int32)

        encoded = read_rows(source, read, max_rows=max_rows)
        self.scorable_by: list[tuple[Any, ...]] = []
        self.remarks = self._remarks(encoded)
        names.pop(self._format.consumed_column, None)
        self.column_names = tuple(names)
        clashing = [name for name in _REWARD_ARGUMENTS if name in names]
        if clashing:
            raise ValueError(f"the column {clashing[0]!r} clashes with an argument of reward functions; rename it")
        lengths = {"prompt": [len(ids) for ids in encoded]}
        self._rows = rows_that_fit(lengths, {"prompt": max_prompt_length}, overlong=overlong)
        self._prompts = Ragged([encoded[row] for row in self._rows])
        self._openings = [opened_thought(encoded[row], tokenizer) for row in self._rows]
        self.dropped = len(encoded) - len(self._rows)
        self.longest = int(self._prompts.lengths.max())
        content = digest.hexdigest()[:16]
        self.fingerprint = {"rows": len(encoded), "prompts": len(self._rows), "content": content}

    def __len__(self) -> int:
        return len(self._rows)

    def _remarks(self, encoded: list[np.ndarray]) -> tuple[str, ...]:
        if any(not np.array_equal(ids, encoded[0]) for ids in encoded):
            return ()
        first = self._format.prompt(row_of(self._source, 0))
        if all(self._format.prompt(row_of(self._source, row)) == first for row in range(len(encoded))):
            return ()
        return ("all have the same tokens: does the chat template write the messages?",)

    def prompt(self, item: int) -> Prompt:
        """A prompt as reward functions see it."""
        return self._format.prompt(row_of(self._source, int(self._rows[item])))

    def columns_of(self, item: int) -> tuple[int, dict[str, Any]]:
        """The row number of a prompt in the source, and what reward functions receive of that row."""
        number = int(self._rows[item])
        row = row_of(self._source, number)
        return number, {name: row.get(name) for name in self.column_names}

    def batch(
        self, items: Sequence[int] | np.ndarray, *, epoch: int = 0, valid: np.ndarray | None = None
    ) -> PromptBatch:
        """Returns the prompts numbered `items` (0 to `len(self) - 1`).

        Args:
            items: Numbers of prompts; repeats are allowed.
            epoch: Copied to the batch.
            valid: [P] bool, all True where None.
        """
        numbers = np.asarray(items, np.int64)
        indices = self._rows[numbers]
        rows = [row_of(self._source, int(index)) for index in indices]
        return PromptBatch(
            tokens=self._prompts.padded(numbers, self.max_prompt_length, fill=self._pad),
            lengths=self._prompts.lengths[numbers],
            prompts=[self._format.prompt(row) for row in rows],
            openings=[self._openings[item] for item in numbers],
            columns={name: [row.get(name) for row in rows] for name in self.column_names},
            indices=indices,
            valid=np.ones(len(numbers), bool) if valid is None else valid,
            epoch=epoch,
        )


def _stable_text(value: Any) -> str:
    """Writes a value the same way in every process: no addresses, no set order."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_stable_text(name)}:{_stable_text(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_stable_text, value)) + "]"
    if isinstance(value, set | frozenset):
        return "{" + ",".join(sorted(map(_stable_text, value))) + "}"
    if isinstance(value, np.ndarray):
        return _stable_text(value.tolist())
    return type(value).__name__ if type(value).__repr__ is object.__repr__ else repr(value)
