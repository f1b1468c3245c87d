"""Pairwise judges: which of two completions of a prompt is better, asked in both orders."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.advantages import draw_reference
from jaxrl_llm.training.episodes.episodes import Episodes
from jaxrl_llm.training.episodes.reading import completion_of, completion_text
from jaxrl_llm.training.episodes.user_functions import UserFunction, together


class Judge(Protocol):
    """Says for each pair whether the first of two completions is the better one: plain Python on strings.

    A tie is no preference: False in both orders, which BRPO then takes for an inconsistent verdict.
    """

    def __call__(
        self, *, prompts: list[Any], first: list[Any], second: list[Any], columns: dict[str, list[Any]]
    ) -> list[bool]:
        """One verdict a pair.

        Args:
            prompts: text or messages.
            first: completions, text or messages.
            second: those that they are compared with.
            columns: the other columns of the data, one value a pair.
        """
        ...


def check_judge(judge: Judge) -> None:
    """Checks, before anything is sampled, that a judge can be called as one.

    Raises:
        ValueError: it is no function, is async, or does not take what a judge is given.
    """
    function = _function(judge)
    try:
        inspect.signature(judge).bind(prompts=[], first=[], second=[], columns={})
    except TypeError as error:
        raise ValueError(f"{function} must take prompts=, first=, second= and columns=: {error}") from None


def compare(
    judge: Judge,
    episodes: Episodes,
    tokenizer: Any,
    key: np.ndarray,
    step: int,
    *,
    timeout: float | None = None,
) -> dict[str, np.ndarray]:
    """Has each sample judged beside one of its group, drawn as the reference, in both orders.

    With several processes each asks the judge for all of it, so that it must give every process the same answers.

    Args:
        judge: the judge.
        episodes: completions of a step.
        tokenizer: decodes them.
        key: root of the run's randomness, uint32 key data.
        step: number of the step, by which the draws differ.
        timeout: seconds that a call of the judge may take; `None`: any time.

    Returns:
        `is_reference`, `preferred` and `preferred_swapped` of `Feedback`, bool `[P, G]` each.

    Raises:
        RewardError: it raised, or did not give one verdict a pair, in this process or in another.
    """
    prompts, group = episodes.rewards.shape
    drawn = jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(jnp.asarray(key)), step), 3)
    is_reference = np.asarray(draw_reference(drawn, np.ones((prompts, group), bool)))
    texts = [_completion(episodes, n, tokenizer) for n in range(prompts * group)]
    of_prompt = np.arange(prompts * group) // group
    references = [texts[p * group + int(is_reference[p].argmax())] for p in of_prompt]
    given = {
        "prompts": [episodes.prompts[p] for p in of_prompt],
        "columns": {name: [values[p] for p in of_prompt] for name, values in episodes.columns.items()},
    }
    function = _function(judge)

    def verdicts(first: list[Any], second: list[Any]) -> np.ndarray:
        values = function.values(given | {"first": first, "second": second}, first, timeout=timeout)
        truths = [_verdict(function, *row) for row in zip(values, range(len(values)), first, strict=True)]
        return np.array(truths, bool).reshape(prompts, group)

    won, lost = together(lambda: (verdicts(texts, references), verdicts(references, texts)), "the judge")
    return {"is_reference": is_reference, "preferred": won, "preferred_swapped": ~lost}


def _function(judge: Judge) -> UserFunction:
    return UserFunction(judge, "judge", "pair", "True (the first is better) or False")


def _verdict(function: UserFunction, value: Any, index: int, completion: Any) -> bool:
    """No truth value, which scores, strings and NaN have, too, and no 0 or 1, which may number the better one."""
    if isinstance(value, bool | np.bool_) or (getattr(value, "ndim", None) == 0 and str(value.dtype).endswith("bool")):
        return bool(value)
    raise function.refuse(value, index, completion)


def _completion(episodes: Episodes, sample: int, tokenizer: Any) -> Any:
    prompt, ids = sample // episodes.rewards.shape[1], episodes.completion_ids[sample]
    opening, finished = episodes.openings[prompt], episodes.finished[sample]
    text = completion_text(ids, tokenizer, finished=finished, opening=opening)
    return completion_of(episodes.prompts[prompt], text)
