"""`from jaxrl_llm import load, train, generate`: what a notebook does, and that it raises and never exits."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

from jaxrl_llm import Policy, evaluate, generate, load, save, train
from jaxrl_llm.algorithms.policy_gradient.presets import rloo
from jaxrl_llm.training.run.errors import RunError

PROMPTS = [{"prompt": text} for text in ("ab", "ba", "aab", "bb")]
SMALL: dict[str, Any] = {
    "steps": 2,
    "prompts_per_step": 3,  # × 4 completions, which the eight devices do not divide, and the four shards of rows do
    "num_generations": 4,
    "max_completion_length": 4,
    "max_prompt_length": 8,
    "save_every": 0,
}


def varied(completions: list[Any], **columns: Any) -> list[float]:
    return [float(len(set(completion))) for completion in completions]


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["notebook", "--what-is-no-flag"])
    return tmp_path


@pytest.fixture(scope="module")
def policy(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    checkpoint = tiny.save_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint")
    return load(checkpoint, scan_layers=False, mesh={"fsdp": 4, "tensor": 2})


def differ(one: Any, other: Any) -> bool:
    return any(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def test_a_policy_is_trained_on_rewards_and_generates(policy: Policy, somewhere: Path) -> None:
    before = jax.tree.map(np.array, policy.params)
    result = train(policy, PROMPTS, rewards=varied, algorithm=rloo(), learning_rate=1e-2, run_dir="run", **SMALL)
    assert result.stopped is None and result.folder == Path("run") and (somewhere / "run" / "config.json").exists()
    assert result.metrics["step"].tolist() == [1, 2] and result.metrics["reward"].shape == (2,)
    assert np.isfinite(result.metrics["rewards/varied/mean"]).all()
    assert not differ(before, policy.params) and differ(before, result.policy.params)

    written = json.loads((somewhere / "run" / "config.json").read_text())
    assert policy.source is not None and written["model.path"] == policy.source.path
    assert {axis: written[f"mesh.{axis}"] for axis in ("data", "fsdp", "tensor")} == {"data": 1, "fsdp": 4, "tensor": 2}

    [[one], [other]] = generate(result.policy, ["ab", "ba"])
    saved = load(save(result.policy, "saved"))
    assert [group[0].tokens for group in generate(saved, ["ab", "ba"])] == [one.tokens, other.tokens]
    with pytest.raises(ValueError, match="saved exists already"):
        save(result.policy, "saved")


def test_a_policy_learns_from_itself_told_more(policy: Policy) -> None:
    rows = [row | {"demonstration": row["prompt"][::-1]} for row in PROMPTS]
    told = {"itself": {"max_prompt_length": 128, "template": "{hints}{prompt}"}}
    result = train(policy, rows, method="distill", preset="sdft", algorithm=told, **SMALL)
    assert (result.metrics["distillation/frac_taught"] == 1).all() and "reward" not in result.metrics
    assert (result.metrics["distillation/itself"] > 0).all()


@pytest.mark.parametrize(
    ("method", "rows", "metric"),
    [
        ("sft", [{"prompt": "ab", "completion": "ba"}] * 2, "nll"),
        ("dpo", [{"prompt": "ab", "chosen": "ba", "rejected": "aa"}] * 2, "rewards/margins"),
        ("reward-model", [{"prompt": "ab", "chosen": "ba", "rejected": "aa"}] * 2, "accuracy"),
    ],
)
def test_so_it_is_on_given_rows(policy: Policy, method: Any, rows: list[dict[str, Any]], metric: str) -> None:
    settings: dict[str, Any] = {"rows_per_step": 8, "max_prompt_length": 8, "max_completion_length": 8, "save_every": 0}
    result = train(policy, rows, method=method, steps=1, learning_rate=1e-2, eval_rows=rows, eval_every=1, **settings)
    if method == "reward-model":
        for of_scores in (
            lambda: generate(result.policy, ["ab"]),
            lambda: evaluate(result.policy, PROMPTS, varied),
            lambda: train(result.policy, PROMPTS, rewards=varied, **SMALL),
        ):
            with pytest.raises(ValueError, match="this policy has a head of scores, and writes no text"):
                of_scores()
    assert len(result.metrics[metric]) == len(result.metrics["step"]) == 3
    assert np.isnan(result.metrics["eval/loss"][1]) and np.isfinite(result.metrics["eval/loss"][[0, 2]]).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rewards": ()}, "no reward function given: pass rewards="),
        ({"rewards": "gsm8"}, "no reward is named 'gsm8'; did you mean 'gsm8k'?"),
        ({"method": "gpro"}, "there is no method 'gpro'; did you mean 'grpo'?"),
        ({"preset": "gsppo"}, "no preset is named 'gsppo'; did you mean 'gspo'?"),
        ({"learnin_rate": 1e-5}, "there is no setting learnin_rate; did you mean learning_rate?"),
        ({"learning_rate": "fast"}, "optimizer.learning_rate='fast' must be a number"),
        ({"learning_rate": -1.0}, "optimizer.learning_rate=-1.0 must not be negative"),
        ({"rewards": None}, "rewards are a function, the name of one, or a list of them, not NoneType"),
        ({"data": "prompts.jsonl"}, "rows and eval_rows are what is read: leave data out"),
        ({"algorithm": "grpo"}, "algorithm.kl_coef, …; preset names a published one"),
        ({"steps": np.int64(0)}, "training.steps=0 must be at least 1"),
        ({"method": "trpo", "learning_rate": 1.0}, "optimizer.learning_rate=1.0 would have no effect: a trust region"),
        ({"keep_checkpoints": 1}, "there is no setting keep_checkpoints; did you mean training.keep_checkpoints?"),
        ({"training": {"keep_checkpoints": 1}}, "training.keep_checkpoints=1 would have no effect"),
        ({"dtype": "bfloat16"}, "settings of the model and the mesh belong to load()"),
        ({"method": "sft"}, "method='sft' trains on given rows, and reads no rewards"),
        ({"num_generations": 1}, "training.samples_per_prompt=1"),
        ({"max_prompt_length": 1}, "max_prompt_length"),
    ],
)
def test_what_is_wrong_is_raised(policy: Policy, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        train(policy, PROMPTS, **{"rewards": varied} | SMALL | settings)
    assert message in str(error.value)


def test_a_reward_function_that_fails_is_raised(policy: Policy) -> None:
    def broken(completions: list[Any], **columns: Any) -> list[float]:
        raise KeyError("answer")

    with pytest.raises(RunError, match="broken"):
        train(policy, PROMPTS, rewards=[broken], **SMALL)


def test_a_path_is_no_policy_and_an_evaluation_takes_names(policy: Policy) -> None:
    a_path: Any = "checkpoint"
    for of_path in (
        lambda: train(a_path, PROMPTS, rewards=varied, **SMALL),
        lambda: generate(a_path, ["ab"]),
        lambda: evaluate(a_path, PROMPTS, varied),
    ):
        with pytest.raises(ValueError, match=r"a policy is what load\(path\) gives, not str"):
            of_path()
    with pytest.raises(ValueError, match="no reward is named 'gsm8'; did you mean 'gsm8k'"):
        evaluate(policy, PROMPTS, "gsm8")


def test_a_setting_of_load_that_there_is_not(somewhere: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no setting dtpe; did you mean dtype\?"):
        load("anything", dtpe="bfloat16")
    with pytest.raises(ValueError, match=r"model\.path and model are one setting"):
        load("anything", model="other")
    with pytest.raises(ValueError, match="nowhere"):
        load("./nowhere", dtype="bfloat16")
