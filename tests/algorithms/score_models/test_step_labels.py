"""Steps are labelled by what becomes of completions that start after them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from jaxrl_llm.algorithms.score_models.step_labels import Solution, monte_carlo_labels
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import make_mesh
from jaxrl_llm.training.compilation import CompilationCounter

EOS = 1
KEY = np.zeros(2, np.uint32)


class Counter:
    """In place of a sampler: completion g of a prefix writes its last token plus g, and ends."""

    stop_tokens = (EOS,)
    group = 4

    def __init__(self) -> None:
        self.calls: list[tuple[np.ndarray, np.ndarray, int]] = []

    def __call__(self, params: Any, prompt: np.ndarray, lengths: np.ndarray, key: np.ndarray, step: int) -> Any:
        self.calls.append((prompt.copy(), lengths.copy(), step))
        last = prompt[np.arange(len(lengths)), lengths - 1]
        completion = np.stack(
            [last[:, None] + np.arange(4), np.full((len(last), 4), EOS), np.full((len(last), 4), 77)], -1
        )
        return SimpleNamespace(completion=completion, completion_lengths=np.full((len(last), 4), 2))


SOLUTIONS = [Solution([50, 51], [10, 20, 12, EOS], [0, 2, 3]), Solution([60], [11, EOS], [0, 1])]


def ends_in_13(numbers: list[int], completions: list[list[int]]) -> list[float]:
    """Right if what is written last is 13; of solution 1, always half right when it is the solution itself."""
    assert all(completion[-1] == EOS and 77 not in completion for completion in completions)
    assert all(
        completion[0] == SOLUTIONS[number].completion[0]
        for number, completion in zip(numbers, completions, strict=True)
    )
    whole = [list(SOLUTIONS[number].completion) for number in numbers]
    return [
        0.5 if completion == given and number == 1 else float(completion[-2] == 13)
        for number, completion, given in zip(numbers, completions, whole, strict=True)
    ]


@pytest.mark.parametrize(
    ("kind", "expected"), [("soft", [[0.25, 0.25, 0], [0.25, 0.5]]), ("hard", [[1, 1, 0], [1, 0.5]])]
)
def test_labels_are_the_share_of_right_completions_or_whether_there_is_one(kind, expected):
    """Prefixes end with the step; a complete solution is not gone on with; what fills up a batch is not counted."""
    sampler = Counter()
    labels = monte_carlo_labels(sampler, None, SOLUTIONS, ends_in_13, batch_size=2, key=KEY, kind=kind)  # type: ignore[arg-type]
    assert [label.tolist() for label in labels] == expected
    prefixes = [[50, 51, 10], [50, 51, 10, 20, 12], [60, 11], [50, 51, 10]]
    served = [
        row[:length].tolist()
        for prompt, lengths, _ in sampler.calls
        for row, length in zip(prompt, lengths, strict=True)
    ]
    assert served == prefixes
    assert [step for *_, step in sampler.calls] == [0, 1]  # no noise is used twice
    assert {prompt.shape for prompt, *_ in sampler.calls} == {(2, 5)}


def test_what_does_not_fit_raises():
    with pytest.raises(ValueError, match="has 5 tokens, more than prefix_width=4"):
        monte_carlo_labels(Counter(), None, SOLUTIONS, ends_in_13, batch_size=2, key=KEY, prefix_width=4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="between 0 and 1"):
        monte_carlo_labels(Counter(), None, SOLUTIONS, lambda n, c: [2.0] * len(c), batch_size=2, key=KEY)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kind is one of"):
        monte_carlo_labels(Counter(), None, [], ends_in_13, batch_size=2, key=KEY, kind="mean")  # type: ignore[arg-type]


def test_a_sampler_labels_in_one_program(tiny_config):
    """The label of a prefix is the share of its own completions, whatever batch it is in."""
    model = Transformer(tiny_config())
    sampler = Sampler(
        model, SamplingConfig(max_tokens=3), group=4, stop_tokens=(EOS,), mesh=make_mesh(devices=jax.devices()[:1])
    )
    params = jax.jit(model.init)(jax.random.key(0))
    solutions = [Solution([5, 6], [7, 8, 9], [0, 2]), Solution([5], [8, EOS], [0, 1])]
    seen: list[list[int]] = []

    def even(numbers: list[int], completions: list[list[int]]) -> list[float]:
        seen.extend(completions)
        return [float(sum(completion) % 2 == 0) for completion in completions]

    with CompilationCounter() as counter:
        labels = monte_carlo_labels(sampler, params, solutions, even, batch_size=2, key=KEY)
    assert counter.counts["sample"] == 1
    assert [len(label) for label in labels] == [2, 2]
    after_first = [completion for completion in seen if completion[0] == 7 and completion[1:3] != [8, 9]]
    assert len(after_first) == 4 and all(1 < len(completion) <= 4 for completion in after_first)
    assert labels[0][0] == np.mean([sum(completion) % 2 == 0 for completion in after_first])
