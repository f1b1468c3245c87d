"""Completions of a run to be looked at: of a few steps, spread over all of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jaxrl_llm.training.run.formatting import clip
from jaxrl_llm.training.run.page.curves import rounded

PROMPT_CHARACTERS, COMPLETION_CHARACTERS, TOKENS = 1200, 1600, 512
"""What is shown of a prompt, a completion, and of the tokens of one that are told one by one."""
PROMPTS, SAMPLES, BY_TOKEN = 4, 16, 4
"""Prompts of a step, completions of each, and those of a step whose tokens are shown one by one."""

Row = Mapping[str, Any]


class KeptSteps:
    """Rows of the first step, the last, and of those between every n-th, where n doubles as there come more.

    Args:
        limit: how many at most, beside the last one.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.stride, self.seen = limit, 1, 0
        self.kept: dict[int, list[Row]] = {}
        """Rows by number of the step among those that have some."""
        self.current: list[Row] = []

    def add(self, row: Row) -> None:
        """Adds a row of the last step or of a later one."""
        if self.current and self.current[0]["step"] != row["step"]:
            self._settle()
        self.current.append(row)

    def _settle(self) -> None:
        if self.seen % self.stride == 0:
            self.kept[self.seen] = self.current
        self.seen, self.current = self.seen + 1, []
        if len(self.kept) > self.limit:
            self.stride *= 2
            self.kept = {number: rows for number, rows in self.kept.items() if number % self.stride == 0}

    @property
    def steps(self) -> list[list[Row]]:
        """The rows of each step."""
        return [*self.kept.values(), *([self.current] if self.current else [])]


def groups_of(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The completions of each prompt of a step: `prompt`, `row` of the data, and `samples`."""
    groups: list[dict[str, Any]] = []
    by_token = 0
    for row in rows:
        if not groups or row["sample"] == 0:
            groups.append({"prompt": prompt_text(row["prompt"]), "row": row["row"], "samples": []})
        if len(groups) > PROMPTS:
            return groups[:PROMPTS]
        if len(groups[-1]["samples"]) < SAMPLES:
            groups[-1]["samples"].append(_sample(row, by_token=by_token < BY_TOKEN))
            by_token += "by_token" in groups[-1]["samples"][-1]
    return groups


def _sample(row: Row, *, by_token: bool) -> dict[str, Any]:
    told = {name: row[name] for name in ("reward", "rewards", "advantage", "logprob", "tokens", "finished")}
    told |= {"text": clip(row["completion"], COMPLETION_CHARACTERS)}
    if extra := row.get("extra"):
        told["extra"] = {name: clip(str(value), 160) for name, value in extra.items()}
    tokens = {name.removeprefix("token_"): values[:TOKENS] for name, values in row.items() if _is_shown(name)}
    return told | ({"by_token": tokens} if tokens and by_token else {})


def _is_shown(name: str) -> bool:
    return name.startswith("token_") and name != "token_ids"


def held_out_over_time(steps: Iterable[list[Row]], prompts: int = 12) -> list[dict[str, Any]]:
    """What held-out prompts got, evaluation by evaluation: `prompt`, and `answers` with `step`, `reward`, `text`."""
    found: dict[Any, dict[str, Any]] = {}
    for rows in steps:
        for row in rows:
            name = prompt_name(row)
            if name not in found and len(found) == prompts:
                continue
            told = found.setdefault(name, {"prompt": prompt_text(row["prompt"]), "answers": []})
            text = clip(row["completion"], 600)
            told["answers"].append({"step": row["step"], "reward": rounded(row["reward"]), "text": text})
    return list(found.values())


def prompt_name(row: Row) -> Any:
    """What tells a prompt from others: its row in the data, or else its text."""
    return row["row"] if row["row"] is not None else prompt_text(row["prompt"])


def prompt_text(prompt: str | list[dict[str, Any]], limit: int = PROMPT_CHARACTERS) -> str:
    """A prompt, or a conversation with its roles, as a text to be looked at."""
    if isinstance(prompt, str):
        return clip(prompt, limit)
    if len(prompt) == 1:
        return clip(str(prompt[0].get("content")), limit)
    return clip("\n".join(f"[{message.get('role')}] {message.get('content')}" for message in prompt), limit)
