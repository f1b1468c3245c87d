"""What a policy is told as its own teacher: of each sample a prompt that says more, tokenised on the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxrl_llm.algorithms.distillation.self_teacher import FEEDBACK, SOLUTION, SelfTeacher
from jaxrl_llm.algorithms.interfaces import Algorithm, HintedPrompts
from jaxrl_llm.checks import nearest_name
from jaxrl_llm.data.formats import Prompt
from jaxrl_llm.data.messages import tools_of
from jaxrl_llm.data.prompt_templates import fill_template, template_columns
from jaxrl_llm.data.prompts import PromptDataset
from jaxrl_llm.data.tokens import encode_prompt
from jaxrl_llm.training.episodes.episodes import Episodes
from jaxrl_llm.training.episodes.reading import completion_text

_IN_TEMPLATE = ("prompt", "hints")


def self_teacher_of(algorithm: Algorithm) -> SelfTeacher | None:
    """The policy as its own teacher, if it is one."""
    return getattr(algorithm, "itself", None)


def check_texts(itself: SelfTeacher, *, rewarded: bool) -> None:
    """Checks, before anything is loaded, that hints and template are texts that can be filled.

    Raises:
        ValueError: one is no format string, the template does not hold prompt and hints, or nothing is rewarded.
    """
    if sorted(template_columns(itself.template)) != sorted(_IN_TEMPLATE):
        raise ValueError(
            f"algorithm.itself.template={itself.template!r} must hold {{prompt}} and {{hints}} once each, and no column"
        )
    names = {name for hint in itself.hints for name in template_columns(hint)}
    if SOLUTION in names and not rewarded:
        raise ValueError(
            "algorithm.itself.hints show a {solution}, a sample that was rewarded, and there is no reward: pass "
            "--rewards with names of some, or file.py:function, or take hints of the data (--preset=sdft)"
        )


def check_hints(itself: SelfTeacher, dataset: PromptDataset, tokenizer: Any, *, rewarded: bool) -> None:
    """Checks, before anything is sampled, that what hints are filled with can be had.

    Raises:
        ValueError: a column is missing, or a prompt with what the data tell of it is too long; names the row.
    """
    check_texts(itself, rewarded=rewarded)
    told = [SOLUTION] + [FEEDBACK] * rewarded
    for name in (name for hint in itself.hints for name in template_columns(hint)):
        if name not in (*dataset.column_names, *told):
            lacks_rewards = " (no reward function says any)" if name == FEEDBACK else ""
            raise ValueError(
                f"algorithm.itself.hints: {{{name}}} is no column of the data"
                f"{nearest_name(name, dataset.column_names) or lacks_rewards}; they are {sorted(dataset.column_names)}"
            )
    told_later = {SOLUTION, FEEDBACK} - set(dataset.column_names)
    if all(told_later & set(template_columns(hint)) for hint in itself.hints):
        return
    for item in range(len(dataset)):
        number, columns = dataset.columns_of(item)
        prompt = hinted_prompt(itself, dataset.prompt(item), columns)
        length = 0 if prompt is None else len(encode_prompt(prompt, tokenizer, tools=tools_of(columns, prompt)))
        if length > itself.max_prompt_length:
            raise ValueError(
                f"row {number}: the prompt with what the policy is told as its own teacher has {length} tokens, more "
                f"than algorithm.itself.max_prompt_length={itself.max_prompt_length}: raise it, or shorten the data"
            )


def check_positions(itself: SelfTeacher, positions: int, max_tokens: int) -> None:
    """Checks that a model has positions for the longest prompt with hints and a completion.

    Raises:
        ValueError: it has too few.
    """
    if itself.max_prompt_length + max_tokens > positions:
        raise ValueError(
            f"algorithm.itself.max_prompt_length={itself.max_prompt_length} and sampling.max_tokens={max_tokens} are "
            f"more than the model's {positions} positions: lower one of them"
        )


def hinted_prompt(itself: SelfTeacher, prompt: Prompt, told: Mapping[str, Any]) -> Prompt | None:
    """A prompt with the hints that can be filled with what is told; `None`: there is none."""
    known = {name: value for name, value in told.items() if value not in (None, "")}
    hints = [fill_template(hint, known) for hint in itself.hints if known.keys() >= {*template_columns(hint)}]
    if not hints:
        return None

    def with_hints(text: Any) -> str:
        return fill_template(itself.template, {"prompt": text, "hints": "".join(hints)})

    if isinstance(prompt, str):
        return with_hints(prompt)
    return [*prompt[:-1], {**prompt[-1], "content": with_hints(prompt[-1]["content"])}]


@dataclasses.dataclass(frozen=True, eq=False)
class Hints:
    """Tells a policy that is its own teacher of a step's completions."""

    itself: SelfTeacher
    tokenizer: Any

    def __call__(self, episodes: Episodes) -> HintedPrompts:
        """The prompts of P × G samples."""
        width, shape = self.itself.max_prompt_length, episodes.rewards.shape
        tokens = np.full((*shape, width), self.tokenizer.pad_token_id or 0, np.int32)
        lengths, too_long = np.zeros(shape, np.int32), np.zeros(shape, bool)
        for (p, g), prompt in zip(np.ndindex(*shape), self._prompts(episodes), strict=True):
            if prompt is None:
                continue
            row = {name: values[p] for name, values in episodes.columns.items()}
            ids = encode_prompt(prompt, self.tokenizer, tools=tools_of(row, prompt))
            too_long[p, g] = len(ids) > width
            if not too_long[p, g]:
                tokens[p, g, : len(ids)], lengths[p, g] = ids, len(ids)
        return HintedPrompts(tokens, lengths, too_long)

    def _prompts(self, episodes: Episodes) -> Iterator[Prompt | None]:
        """Those of all samples, prompt-major."""
        group = episodes.rewards.shape[1]
        said = episodes.extra.get(FEEDBACK) or [None] * len(episodes.completion_ids)
        for p, prompt in enumerate(episodes.prompts):
            row = {name: values[p] for name, values in episodes.columns.items()}
            solved = [g for g in range(group) if self._is_solved(episodes.rewards[p, g])]
            for g in range(group):
                others = [other for other in solved if other != g]
                told: dict[str, Any] = {FEEDBACK: said[p * group + g]} if said[p * group + g] else {}
                if others:
                    told[SOLUTION] = self._text(episodes, p, others[0])
                yield hinted_prompt(self.itself, prompt, row | told)

    def _is_solved(self, reward: float) -> bool:
        return self.itself.shows_solutions and reward >= self.itself.solved

    def _text(self, episodes: Episodes, p: int, g: int) -> str:
        """What a sample says, as reward functions read it."""
        sample = p * episodes.rewards.shape[1] + g
        finished, opening = episodes.finished[sample], episodes.openings[p]
        return completion_text(episodes.completion_ids[sample], self.tokenizer, finished=finished, opening=opening)
