"""What is counted over all completions that a run has written: their lengths, and which prompts are solved."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

from jaxrl_llm.training.run.page.curves import rounded
from jaxrl_llm.training.run.page.samples import prompt_name, prompt_text

TIMES, BUCKETS = 48, 32
"""Parts of the run, and of the range of lengths, at most."""
_LISTED = 25
_SOLVED = 1.0
"""The reward from which on a completion solves its prompt, as in evaluations."""


class Lengths:
    """How many completions had how many tokens, over time; parts of both double as there come more."""

    def __init__(self) -> None:
        self.time, self.width = 1, 1
        self.counts: collections.Counter[tuple[int, int, bool]] = collections.Counter()
        """By part of the run, part of the range of lengths, and whether they ended by themselves."""

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds a completion."""
        while row["step"] // self.time >= TIMES:
            self.time *= 2
            self._fold(2, 1)
        while row["tokens"] // self.width >= BUCKETS:
            self.width *= 2
            self._fold(1, 2)
        self.counts[row["step"] // self.time, row["tokens"] // self.width, row["finished"]] += 1

    def _fold(self, times: int, widths: int) -> None:
        counts, self.counts = self.counts, collections.Counter()
        for (time, bucket, finished), count in counts.items():
            self.counts[time // times, bucket // widths, finished] += count

    def data(self) -> dict[str, Any] | None:
        """`time` (steps of a part), `width` (tokens of one), and `counts` as [part, part, ended 0 or 1, how many]."""
        counts = [[time, bucket, int(ended), count] for (time, bucket, ended), count in sorted(self.counts.items())]
        return {"time": self.time, "width": self.width, "counts": counts} if counts else None


class Prompts:
    """Which prompts are never solved, sometimes, always: by the first reward function, from 1 on.

    Args:
        solved_by: another function.
    """

    def __init__(self, solved_by: str | None = None) -> None:
        self.solved_by = solved_by
        self.tallies: dict[Any, _Tally] = {}
        self.any_solved = False

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds a completion."""
        self.solved_by = self.solved_by or next(iter(row["rewards"]), None)
        value = row["rewards"].get(self.solved_by)
        if value is None:
            return
        tally = self.tallies.setdefault(name := prompt_name(row), _Tally(prompt_text(row["prompt"], 240), name))
        tally.samples, tally.last = tally.samples + 1, row["step"]
        tally.solved, tally.total = tally.solved + (value >= _SOLVED), tally.total + value
        self.any_solved |= value >= _SOLVED

    def data(self) -> dict[str, Any] | None:
        """As JSON has it.

        Returns:
            `by`: the function; how many are `never`, `sometimes` and `always` solved; `shares`: how many prompts by
            tenths of their completions that solve them; `lists` of some that are never or always solved, or where none
            is, of those with the least and the greatest mean reward.
        """
        if not self.tallies:
            return None
        every = list(self.tallies.values())
        never = [tally for tally in every if not tally.solved]
        always = [tally for tally in every if tally.solved == tally.samples]
        shares = collections.Counter(min(9, 10 * tally.solved // tally.samples) for tally in every)
        told = {
            "by": self.solved_by,
            "any_solved": self.any_solved,
            "never": len(never),
            "always": len(always),
            "sometimes": len(every) - len(never) - len(always),
            "shares": [shares[part] for part in range(10)],
        }
        if self.any_solved:
            lists = [sorted(some, key=lambda tally: -tally.samples) for some in (never, always)]
        else:
            by_mean = sorted(every, key=lambda tally: tally.total / tally.samples)
            lists = [by_mean, by_mean[::-1]]
        return told | {"lists": [[tally.data() for tally in some[:_LISTED]] for some in lists]}


class _Tally:
    """Of one prompt."""

    def __init__(self, text: str, name: Any) -> None:
        self.text, self.row = text, name if isinstance(name, int) else None
        self.samples, self.solved, self.total, self.last = 0, 0, 0.0, 0

    def data(self) -> dict[str, Any]:
        mean = rounded(self.total / self.samples)
        told = {"text": self.text, "row": self.row, "samples": self.samples, "solved": self.solved}
        return told | {"mean": mean, "last": self.last}
