from __future__ import annotations

from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

from jaxrl_llm.data.prompts import PromptDataset
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import MeshConfig, make_mesh
from jaxrl_llm.training.compilation import CompilationCounter
from jaxrl_llm.training.episodes.evaluate import EvaluationConfig, Evaluator
from jaxrl_llm.training.episodes.scoring import RewardSum

ONE_DEVICE = make_mesh(MeshConfig(), jax.devices()[:1])
KEY = np.asarray(jax.random.key_data(jax.random.key(3)))


@pytest.fixture
def make(tiny: ModuleType):
    """Makes an evaluator of the tiny model on as many prompts as asked for, and the parameters."""

    def make(
        size: int = 5, *, mesh: jax.sharding.Mesh = ONE_DEVICE, rewards: Any = None, rows: int = 4, **config: Any
    ) -> tuple[Evaluator, Any]:
        policy = tiny.make_policy(mesh)
        rows_of_data = [{"prompt": f"{n}+{n % 7}=", "answer": str(n + n % 7)} for n in range(size)]
        evaluator = Evaluator(
            policy.model,
            PromptDataset(rows_of_data, policy.tokenizer, max_prompt_length=6),
            policy.tokenizer,
            RewardSum(rewards or (tiny.shared_characters,)),
            EvaluationConfig(every=1, **config),
            sampling=SamplingConfig(max_tokens=5),
            stop_tokens=policy.stop_tokens,
            mesh=mesh,
            rows=rows,
        )
        return evaluator, policy.params

    return make


def test_greedy_metrics_do_not_depend_on_the_batch(make) -> None:
    expected = None
    for batch_size in (1, 2, 5, 7, None):  # one by one, with a remainder, all at once, more than there are
        evaluator, params = make(batch_size=batch_size)
        metrics, _ = evaluator(params, KEY)
        expected = expected or metrics
        assert metrics == pytest.approx(expected)
    assert expected is not None and expected["eval/reward"] > 0


def test_fewer_prompts_than_devices(make) -> None:
    one, params = make(size=3, samples=2)
    expected, _ = one(params, KEY)
    eight, params = make(size=3, samples=2, mesh=make_mesh(MeshConfig(data=2, fsdp=4)))
    metrics, _ = eight(params, KEY)
    assert metrics == pytest.approx(expected)


def test_each_prompt_counts_once(make) -> None:
    """Values of the reward tell the prompts apart; repeats that fill up the last batch are not counted."""

    def first_digit(prompts: list[str], completions: list[str]) -> list[float]:
        return [float(prompt[0]) for prompt in prompts]

    def length(prompts: list[str], completions: list[str]) -> list[float | None]:
        return [
            None if prompt[0] == "2" else float(len(text)) for prompt, text in zip(prompts, completions, strict=True)
        ]

    evaluator, params = make(size=5, batch_size=3, rewards=(length, first_digit), solved_by="first_digit")
    metrics, first = evaluator(params, KEY)
    assert metrics["eval/rewards/first_digit"] == np.mean([0, 1, 2, 3, 4])
    assert metrics["eval/accuracy"] == 4 / 5  # at least 1
    assert metrics["eval/reward"] == pytest.approx(metrics["eval/rewards/length"] * 4 / 5 + 2)
    assert first.prompts == ["0+0=", "1+1=", "2+2="]
    assert metrics["eval/finished"] in [n / 5 for n in range(6)]


def test_pass_at_k_counts_samples(make) -> None:
    seen: list[list[float]] = []

    def even(prompts: list[str], completions: list[str]) -> list[float]:
        seen.append([float(sum(map(str.isdigit, text)) % 2 == 0) for text in completions])
        return seen[-1]

    evaluator, params = make(size=6, samples=3, rewards=(even,), rows=16)
    metrics, _ = evaluator(params, KEY)
    greedy, drawn = np.array(seen[0]), np.array(seen[1]).reshape(6, 3)
    assert 0 < drawn.mean() < 1
    assert metrics["eval/accuracy"] == pytest.approx(greedy.mean())
    assert metrics["eval/pass@1"] == pytest.approx(drawn.mean())
    assert metrics["eval/pass@3"] == pytest.approx(drawn.any(axis=1).mean())
    assert {name for name in metrics if "pass" in name} == {"eval/pass@1", "eval/pass@3"}
    again, _ = evaluator(params, KEY)  # the same noise, so that evaluations compare
    assert again == metrics


def test_batches_share_one_program(make) -> None:
    evaluator, params = make(size=9, batch_size=2, samples=2)
    with CompilationCounter() as counter:
        evaluator(params, KEY)
    assert counter.counts == {"sample": 2}


@pytest.mark.parametrize(
    ("field", "value", "least"), [("every", -1, 0), ("max_prompts", 0, 1), ("samples", -2, 0), ("batch_size", 0, 1)]
)
def test_impossible_counts(field: str, value: int, least: int) -> None:
    with pytest.raises(ValueError, match=f"evaluation.{field}={value} must be at least {least}"):
        EvaluationConfig(**{field: value})
