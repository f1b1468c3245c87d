"""Pairwise judges: which of two completions of a prompt is better, asked in both orders."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.advantages import draw_reference
from jaxrl_llm.training.episodes.episodes import Episodes, RewardError


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


def compare(judge: Judge, episodes: Episodes, tokenizer: Any, key: np.ndarray, step: int) -> dict[str, np.ndarray]:
    """Has each sample judged beside one of its group, drawn as the reference, in both orders.

    With several processes each asks the judge for all of it, so that it must give every process the same answers.

    Args:
        judge: the judge.
        episodes: completions of a step.
        tokenizer: decodes them.
        key: root of the run's randomness, uint32 key data.
        step: number of the step, by which the draws differ.

    Returns:
        `is_reference`, `preferred` and `preferred_swapped` of `Feedback`, bool `[P, G]` each.

    Raises:
        RewardError: it did not give one verdict a pair.
    """
    prompts, group = episodes.rewards.shape
    drawn = jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(jnp.asarray(key)), step), 3)
    is_reference = np.asarray(draw_reference(drawn, np.ones((prompts, group), bool)))
    texts = [_completion(ids, episodes.prompts[n // group], tokenizer) for n, ids in enumerate(episodes.completion_ids)]
    of_prompt = np.arange(prompts * group) // group
    references = [texts[p * group + int(is_reference[p].argmax())] for p in of_prompt]
    given = {
        "prompts": [episodes.prompts[p] for p in of_prompt],
        "columns": {name: [values[p] for p in of_prompt] for name, values in episodes.columns.items()},
    }
    preferred = judge(first=texts, second=references, **given)
    swapped = judge(first=references, second=texts, **given)
    for verdicts in (preferred, swapped):
        if len(verdicts) != len(texts):
            raise RewardError(f"the judge gave {len(verdicts)} verdicts for {len(texts)} pairs")
    lost = np.array(swapped, bool).reshape(prompts, group)
    won = np.array(preferred, bool).reshape(prompts, group)
    return {"is_reference": is_reference, "preferred": won, "preferred_swapped": ~lost}


def _completion(ids: list[int], prompt: Any, tokenizer: Any) -> Any:
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
