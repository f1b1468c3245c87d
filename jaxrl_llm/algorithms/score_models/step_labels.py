"""Labels of steps without people: how often the policy, going on from there, gets it right (Math-Shepherd)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from jaxrl_llm.models.config import Params
from jaxrl_llm.sampling.engine import Sampler

StepLabelKind = Literal["soft", "hard"]


class Solution(NamedTuple):
    """A prompt, one solution of it, and where the solution's steps end."""

    prompt: Sequence[int]
    """Token ids."""
    completion: Sequence[int]
    """Token ids."""
    step_ends: Sequence[int]
    """Indices in the completion of the steps' last tokens, ascending."""


def monte_carlo_labels(
    sampler: Sampler,
    params: Params,
    solutions: Sequence[Solution],
    score: Callable[[list[int], list[list[int]]], Sequence[float]],
    *,
    batch_size: int,
    key: np.ndarray,
    kind: StepLabelKind = "soft",
    prefix_width: int | None = None,
) -> list[np.ndarray]:
    """Labels each step by what becomes of completions that start after it.

    From the prefix that ends with a step the policy writes N = `sampler.group` completions. The label is the share of
    right ones ("soft"), or whether there is any ("hard"). Where the solution is complete nothing is left to be
    written, and the label is its own score.

    Args:
        sampler: of the policy; N completions of a prefix, its stop tokens end a solution.
        params: the policy's parameters.
        solutions: what is to be labelled.
        score: from numbers of solutions and whole completions of their prompts (prefix and what was sampled) to how
            right these are, 0 to 1.
        batch_size: prefixes that are sampled from at a time.
        key: root of the randomness, uint32 key data.
        kind: "soft" or "hard".
        prefix_width: tokens of the longest prompt and prefix; `None`: the longest there is. Equal widths share one
            compiled program.

    Returns:
        Float32 labels 0 to 1 for each solution, one for each of its steps.

    Raises:
        ValueError: a prefix is longer than `prefix_width`, or a score is outside 0 to 1.

    Source: Wang et al. 2023, "Math-Shepherd" (2312.08935).
    """
    if kind not in get_args(StepLabelKind):
        raise ValueError(f"kind is one of {get_args(StepLabelKind)}, got {kind!r}")
    prefixes = [
        (number, place, list(solution.completion[: end + 1]))
        for number, solution in enumerate(solutions)
        for place, end in enumerate(solution.step_ends)
    ]
    done = [prefix for prefix in prefixes if prefix[2][-1] in sampler.stop_tokens]
    to_sample = [prefix for prefix in prefixes if prefix[2][-1] not in sampler.stop_tokens]
    labels = [np.zeros(len(solution.step_ends), np.float32) for solution in solutions]
    for number, place, prefix in done:
        labels[number][place] = _checked(score([number], [prefix]))[0]

    rows = [[*solutions[number].prompt, *prefix] for number, _, prefix in to_sample]
    width = max(map(len, rows), default=0) if prefix_width is None else prefix_width
    if rows and max(map(len, rows)) > width:
        raise ValueError(f"a prompt and prefix has {max(map(len, rows))} tokens, more than prefix_width={width}")
    for batch, start in enumerate(range(0, len(rows), batch_size)):
        chosen = [(start + place) % len(rows) for place in range(batch_size)]  # repeats fill up the last one
        tokens, lengths = _padded([rows[row] for row in chosen], width)
        rollout = sampler(params, tokens, lengths, key, batch)
        completion, written = np.asarray(rollout.completion), np.asarray(rollout.completion_lengths)
        for slot, row in enumerate(chosen[: len(rows) - start]):
            number, place, prefix = to_sample[row]
            whole = [
                [*prefix, *tokens[:length].tolist()]
                for tokens, length in zip(completion[slot], written[slot], strict=True)
            ]
            right = _checked(score([number] * len(whole), whole))
            labels[number][place] = right.mean() if kind == "soft" else right.max() > 0.5
    return labels


def _padded(rows: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.zeros((len(rows), width), np.int32)
    for slot, row in enumerate(rows):
        tokens[slot, : len(row)] = row
    return tokens, np.array([len(row) for row in rows], np.int32)


def _checked(scores: Sequence[float]) -> np.ndarray:
    right = np.asarray(scores, np.float32)
    if not ((right >= 0) & (right <= 1)).all():
        raise ValueError(f"scores of solutions must be between 0 and 1, got {right}")
    return right
