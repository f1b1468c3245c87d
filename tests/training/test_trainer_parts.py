"""What algorithms ask of the trainer beside rewards: critics, greedy baselines, judges, mixed groups, the device."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.algorithms.batching import UpdateConfig
from jaxrl_llm.algorithms.iteration import DeviceReward
from jaxrl_llm.algorithms.policy_gradient import presets
from jaxrl_llm.algorithms.policy_gradient.role_estimators import HierarchicalAdvantage, RAEAdvantage
from jaxrl_llm.algorithms.policy_gradient.surrogates import Clipped
from jaxrl_llm.algorithms.score_models.process_reward import make_process_reward, make_step_scores
from jaxrl_llm.algorithms.trust_region.step import TrustRegionConfig
from jaxrl_llm.cli import finish, make_trainer
from jaxrl_llm.models.checkpoints.pretrained import from_pretrained
from jaxrl_llm.models.heads import ScoreModel
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import MeshConfig, make_mesh
from jaxrl_llm.training.episodes.evaluate import EvaluationConfig
from jaxrl_llm.training.episodes.scoring import RewardSum
from jaxrl_llm.training.episodes.user_functions import RewardError
from jaxrl_llm.training.learner import CriticSource
from jaxrl_llm.training.on_policy import Trainer
from jaxrl_llm.training.run.metrics import comparable_metrics
from jaxrl_llm.types import Rollout

ONE_DEVICE = make_mesh(MeshConfig(), jax.devices()[:1])


def programs(trainer: Trainer) -> dict[str, int]:
    """How often each was compiled, but for the checksums of checkpoints and references: once for all runs alike."""
    return {name: count for name, count in trainer.compilations.counts.items() if name != "_checksums"}


@pytest.fixture
def make(tiny: ModuleType, tmp_path: Path):
    """Makes a trainer of two steps without evaluation; keyword arguments change fields of its records."""

    def make(
        folder: str = "run", *, parts: dict[str, Any] | None = None, rows: list[Any] | None = None, **changes: Any
    ) -> Trainer:
        config = dataclasses.replace(
            tiny.CONFIG, update=UpdateConfig(), evaluation=EvaluationConfig(), run_dir=str(tmp_path / folder)
        )
        training = dataclasses.replace(
            config.training, **{"steps": 2, "checkpoint_every": 0} | changes.pop("training", {})
        )
        config = dataclasses.replace(config, training=training, **changes)
        policy = tiny.make_policy(ONE_DEVICE)
        given = {"train_rows": rows or tiny.TRAIN_ROWS, "eval_rows": tiny.EVAL_ROWS}
        return make_trainer(config, policy, ONE_DEVICE, **given, **parts or {})

    return make


def metrics_of(trainer: Trainer) -> list[dict[str, float]]:
    return comparable_metrics(trainer.setup.folder / "metrics.jsonl")


# ---- Critics and baselines ------------------------------------------------------------------------------


@pytest.mark.parametrize("shares_trunk", [False, True])
def test_ppo_in_two_programs(make, shares_trunk: bool) -> None:
    trainer = make(algorithm=presets.ppo(), critic=CriticSource(shares_trunk=shares_trunk))
    trainer.run()
    assert programs(trainer) == {"sample": 1, "update_step": 1}
    assert (trainer.state.critic is None) == shares_trunk
    last = metrics_of(trainer)[-1]
    assert {"value/explained_variance", "objective/kl", "reward"} <= last.keys()
    assert ("vf/loss" in last) != shares_trunk


def test_a_policy_is_exported_without_the_critics_head(make, tiny: ModuleType) -> None:
    trainer = make(algorithm=presets.ppo(), critic=CriticSource(shares_trunk=True), training={"steps": 1})
    config = dataclasses.replace(tiny.CONFIG, run_dir=str(trainer.setup.folder))
    finish(config, tiny.make_policy(ONE_DEVICE), trainer.run(), seconds=1.0)
    _, params = from_pretrained(trainer.setup.folder / "model")
    np.testing.assert_array_equal(params["embed"]["weight"], trainer.state.params["embed"]["weight"])


def test_ppo_resumes_exactly_with_its_critic_and_its_coefficient(make) -> None:
    advantage = dataclasses.replace(presets.ppo().advantage, kl_target=0.1, kl_horizon=20.0)
    algorithm = dataclasses.replace(presets.ppo(), advantage=advantage)
    whole = make("whole", algorithm=algorithm, training={"steps": 2, "checkpoint_every": 1})
    whole.run()
    make("cut", algorithm=algorithm, training={"steps": 1, "checkpoint_every": 1}).run()
    resumed = make("cut", algorithm=algorithm, training={"steps": 2, "checkpoint_every": 1}, resume=True)
    resumed.run()
    chex.assert_trees_all_equal(whole.state.params, resumed.state.params)
    np.testing.assert_array_equal(whole.state.memory, resumed.state.memory)
    assert metrics_of(whole)[-1] == metrics_of(resumed)[-1]
    assert float(whole.state.memory) != advantage.kl_coef


def test_the_greedy_completion_is_the_baseline_of_remax(make, tiny: ModuleType) -> None:
    trainer = make(algorithm=presets.remax(), training={"steps": 1})
    seen: list[Any] = []
    update = trainer.update
    trainer.update = lambda state, rollout, rewards, reference: (
        seen.append((rollout, rewards)) or update(state, rollout, rewards, reference)
    )
    trainer.run()
    (rollout, rewards) = seen[0]
    assert rollout.completion.shape[:2] == rewards.shape == (4, 5)  # four samples, and the greedy one
    line = metrics_of(trainer)[-1]
    assert rewards[:, :-1].mean() != pytest.approx(rewards.mean(), rel=1e-3)
    for name in ("reward", "rewards/shared_characters/mean"):  # of the samples alone
        assert line[name] == pytest.approx(rewards[:, :-1].mean(), rel=1e-6)
    assert line["completions/mean_length"] == pytest.approx(rollout.completion_lengths[:, :-1].mean())
    assert line["num_tokens"] == rollout.completion_lengths.sum() + rollout.prompt_lengths.sum()  # of all
    assert programs(trainer) == {"sample": 1, "update_step": 1}


def test_one_sample_a_prompt_is_enough_where_nothing_is_compared(make) -> None:
    make(algorithm=presets.remax(), training={"samples_per_prompt": 1}).run()
    with pytest.raises(ValueError, match=r"samples_per_prompt=1 cannot learn: GroupAdvantage compares a sample with"):
        make("other", training={"samples_per_prompt": 1})
    with pytest.raises(ValueError, match=r"samples_per_prompt=2 cannot learn: .*samples-per-prompt=4 or more"):
        make("third", algorithm=presets.gfpo(), training={"samples_per_prompt": 2})


def test_settings_of_a_critic_are_refused_where_there_is_none(make) -> None:
    for critic in (CriticSource(shares_trunk=True), CriticSource(stop_gradient=True)):
        with pytest.raises(ValueError, match=r"critic\.\w+=True would have no effect: GroupAdvantage has no critic"):
            make(critic=critic)


def test_the_reference_draws_once_of_each_prompt(make) -> None:
    """A run that goes on finds what it drew, and ends as one that was not cut."""
    algorithm, seen = presets.a_star_po(), []
    whole = make("whole", algorithm=algorithm, training={"steps": 4, "checkpoint_every": 2})
    update = whole.update
    whole.update = lambda state, rollout, given, reference: (
        seen.append(given.reference_rewards) or update(state, rollout, given, reference)
    )
    whole.run()
    assert {table.shape for table in seen} == {(4, 4)}
    assert programs(whole) == {"sample": 1, "update_step": 1}
    lines = (whole.setup.folder / "reference_rewards.jsonl").read_text().splitlines()
    assert len(lines) == len({json.loads(line)["row"] for line in lines}) == 10
    make("cut", algorithm=algorithm, training={"steps": 2, "checkpoint_every": 2}).run()
    resumed = make("cut", algorithm=algorithm, training={"steps": 4, "checkpoint_every": 2}, resume=True)
    resumed.run()
    chex.assert_trees_all_equal(whole.state.params, resumed.state.params)
    assert metrics_of(whole)[-1] == metrics_of(resumed)[-1]


def test_roles_are_read_of_a_column(make, tiny: ModuleType) -> None:
    rows = [row | {"role": ("low", "high")[n > 4]} for n, row in enumerate(tiny.TRAIN_ROWS)]
    advantage = RAEAdvantage(roles=("low", "high"))
    algorithm = dataclasses.replace(presets.rae(), advantage=advantage)
    trainer = make(algorithm=algorithm, rows=rows, training={"steps": 1})
    seen: list[Any] = []
    update = trainer.update
    trainer.update = lambda state, rollout, given, reference: (
        seen.append((rollout, given)) or update(state, rollout, given, reference)
    )
    trainer.run()
    ((rollout, given),) = seen
    first = [int(tiny.TOKENIZER.decode([int(ids[0])])) for ids in rollout.prompt]
    np.testing.assert_array_equal(given.roles, np.int32(np.array(first) > 4))
    assert trainer.state.memory.shape == (2,)
    assert {"rae/baseline_low", "rae/baseline_high"} <= metrics_of(trainer)[0].keys()

    with pytest.raises(ValueError, match="row 5: the column 'role' holds 'high', and the roles are 0, low: mend"):
        make("other", algorithm=dataclasses.replace(algorithm, advantage=RAEAdvantage(roles=("0", "low"))), rows=rows)
    with pytest.raises(ValueError, match=r"role_column='role' is no column of the data; they are \['answer'\]"):
        make("third", algorithm=presets.rae())
    with pytest.raises(ValueError, match="task_column='tusk' is no column of the data"):
        hierarchical = HierarchicalAdvantage(roles=("low", "high"), episode_roles=("low",), task_column="tusk")
        make("fourth", algorithm=dataclasses.replace(algorithm, surrogate=Clipped(), advantage=hierarchical), rows=rows)


# ---- Judges, reward functions one by one ---------------------------------------------------------------


class LongerIsBetter:
    """Prefers the longer completion, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def __call__(self, **given: Any) -> list[bool]:
        self.asked.append(given)
        return [len(a) > len(b) for a, b in zip(given["first"], given["second"], strict=True)]


def test_brpo_asks_a_judge_in_both_orders(make) -> None:
    judge = LongerIsBetter()
    trainer = make(algorithm=presets.brpo(), parts={"judge": judge}, training={"steps": 1})
    trainer.run()
    one, other = judge.asked
    assert one["first"] == other["second"] and one["second"] == other["first"]
    assert one["columns"]["answer"] == [row for row in one["columns"]["answer"][::4] for _ in range(4)]
    for p in range(4):  # all of a group are compared with one of its own
        (reference,) = set(one["second"][4 * p : 4 * p + 4])
        assert reference in one["first"][4 * p : 4 * p + 4]


def test_a_judge_that_fails_loses_no_step(make, capsys: pytest.CaptureFixture[str]) -> None:
    class Failing(LongerIsBetter):
        def __call__(self, **given: Any) -> list[bool]:
            if len(self.asked) == 3:  # the second order of the second step
                raise ConnectionError("judge API: 503")
            return super().__call__(**given)

    failing = make(algorithm=presets.brpo(), parts={"judge": Failing()}, training={"checkpoint_every": 9})
    with pytest.raises(RewardError, match=r"the judge 'Failing' raised ConnectionError on 16 pairs: judge API: 503"):
        failing.run()
    assert "Failed after step 1 and saved. Go on with the same command and --resume" in capsys.readouterr().out
    assert (failing.setup.folder / "checkpoints" / "1").is_dir()


def test_a_judge_that_is_missing_or_not_read_is_told_at_once(make) -> None:
    with pytest.raises(ValueError, match="BRPOAdvantage reads a judge's verdicts: pass judge="):
        make(algorithm=presets.brpo())
    with pytest.raises(ValueError, match="GroupAdvantage reads no verdicts"):
        make(parts={"judge": LongerIsBetter()})
    with pytest.raises(ValueError, match=r"the judge '<lambda>' must take prompts=, first=, second= and columns="):
        make(algorithm=presets.brpo(), parts={"judge": lambda prompts, first, second: []})


def test_gdpo_reads_the_reward_functions_one_by_one(make, tiny: ModuleType) -> None:
    def length(completions: list[str], **columns: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    rewards = (tiny.shared_characters, length)
    trainer = make(algorithm=presets.gdpo(), rewards=rewards)
    trainer.run()
    other = make("other", algorithm=presets.lite_ppo(), rewards=rewards)
    other.run()
    assert metrics_of(trainer)[0]["reward"] == metrics_of(other)[0]["reward"]
    assert metrics_of(trainer)[0]["grad_norm"] != metrics_of(other)[0]["grad_norm"]


def test_gdpo_leaves_out_what_does_not_apply_and_weighs_as_told(make, tiny: ModuleType) -> None:
    def even_only(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        return [len(c) + 3.0 if int(p[0]) % 2 == 0 else None for p, c in zip(prompts, completions, strict=True)]

    rewards = {"rewards": (tiny.shared_characters, even_only), "reward_weights": (0.5, 2.0)}
    trainer = make(algorithm=presets.gdpo(), training={"steps": 1}, **rewards)
    seen: list[Any] = []
    update = trainer.update
    trainer.update = lambda state, rollout, rewards, reference: (
        seen.append(rewards) or update(state, rollout, rewards, reference)
    )
    trainer.run()
    (feedback,) = seen
    missing = np.isnan(feedback.by_function)
    assert not missing[..., 0].any() and 0 < missing[..., 1].sum() < missing[..., 1].size
    np.testing.assert_array_equal(feedback.weights, [0.5, 2.0])
    assert np.isfinite(metrics_of(trainer)[0]["grad_norm"])


# ---- Dynamic sampling ----------------------------------------------------------------------------------


def mostly_equal(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    """Groups differ only where the prompt's first digit is below 5."""
    return [float(len(text)) * (prompt[0] < "5") for prompt, text in zip(prompts, completions, strict=True)]


def test_dynamic_sampling_fills_a_step_with_groups_that_differ(make) -> None:
    plain = make("plain", rewards=(mostly_equal,), training={"steps": 4})
    plain.run()
    assert max(line["frac_reward_zero_std"] for line in metrics_of(plain)) > 0
    filled = make("filled", rewards=(mostly_equal,), training={"steps": 4, "dynamic_sampling": 8})
    filled.run()
    lines = metrics_of(filled)
    assert all(line["frac_reward_zero_std"] == 0 for line in lines)
    assert max(line["dynamic_sampling/rounds"] for line in lines) > 1
    assert min(line["dynamic_sampling/kept"] for line in lines) < 1
    assert programs(filled) == {"sample": 1, "update_step": 1}


def test_dynamic_sampling_gives_up_after_its_rounds(make) -> None:
    def constant(completions: list[str], **columns: Any) -> list[float]:
        return [1.0] * len(completions)

    trainer = make(rewards=(constant,), training={"dynamic_sampling": 2})
    trainer.run()
    assert metrics_of(trainer)[-1]["frac_reward_zero_std"] == 1
    assert metrics_of(trainer)[-1]["dynamic_sampling/rounds"] == 2


# ---- Rewards on the device -----------------------------------------------------------------------------


def spread(params: Any, rollout: Rollout) -> jax.Array:
    """Different tokens of a completion, per token of the longest."""
    mask = rollout.mask
    seen = jnp.any((rollout.completion[..., None] == jnp.arange(16)) & mask[..., None], axis=2)
    return params["scale"] * jnp.sum(seen, axis=-1) / mask.shape[-1]


def each_token(params: Any, rollout: Rollout) -> jax.Array:
    """A reward for each token that is no 0; at the padding, whatever."""
    return jnp.where(rollout.mask, (rollout.completion > 0) * 1.0, jnp.nan)


SPREAD = DeviceReward("spread", spread, {"scale": np.float32(2.0)})


def test_the_fused_iteration_is_one_program_and_the_same_run(make, tiny: ModuleType) -> None:
    def nothing(completions: list[str], **columns: Any) -> list[float]:
        return [0.0] * len(completions)

    fused = make("fused", rewards=(), parts={"device_rewards": (SPREAD,)})
    fused.run()
    assert programs(fused) == {"iteration": 1}
    apart = make("apart", rewards=(nothing,), parts={"device_rewards": (SPREAD,)})
    apart.run()
    assert programs(apart) == {"sample": 1, "scores": 1, "update_step": 1}
    for one, other in zip(metrics_of(fused), metrics_of(apart), strict=True):
        assert {k: v for k, v in other.items() if "nothing" not in k} == pytest.approx(one, rel=1e-5, abs=1e-6)
    chex.assert_trees_all_close(fused.state.params, apart.state.params, rtol=1e-7, atol=1e-5)
    assert metrics_of(fused)[0]["rewards/spread/mean"] > 0


def test_rewards_of_tokens_and_of_completions_add_up(make, tiny: ModuleType) -> None:
    rewards = (SPREAD, DeviceReward("each_token", each_token, weight=0.5))
    trainer = make(algorithm=presets.ppo(), parts={"device_rewards": rewards}, training={"steps": 1})
    trainer.run()
    line = metrics_of(trainer)[-1]
    parts = line["rewards/shared_characters/mean"] + line["rewards/spread/mean"] + 0.5 * line["rewards/each_token/mean"]
    assert line["reward"] == pytest.approx(parts, rel=1e-5)


@pytest.mark.slow
def test_a_process_reward_model_rewards_ppo_in_one_program(make, tiny: ModuleType) -> None:
    policy = tiny.make_policy(ONE_DEVICE)
    judge = ScoreModel(policy.model, bias=True)
    params = judge.from_trunk(policy.params, jax.random.key(1))
    scores = make_step_scores(judge, separators=(4, 5, 6, 7), max_steps=4)
    reward = DeviceReward("steps", make_process_reward(scores, kind="progress"), params)
    trainer = make(rewards=(), algorithm=presets.ppo(), parts={"device_rewards": (reward,)})
    trainer.run()
    assert programs(trainer) == {"iteration": 1}
    lines = metrics_of(trainer)
    assert all(line["reward"] == pytest.approx(line["rewards/steps/mean"]) != 0 for line in lines)
    assert all(line["grad_norm"] > 0 for line in lines)


def padding_is_rewarded(params: Any, rollout: Rollout) -> jax.Array:
    """No token has a reward; the padding has, and one that differs from row to row."""
    row = jnp.arange(rollout.mask.shape[1])[:, None]
    return jnp.where(rollout.mask, 0.0, 1.0 + row)


def test_rewards_at_the_padding_do_not_count(make) -> None:
    """Neither for dynamic sampling, which would take equal groups for mixed ones, nor for what is told."""
    rewards = {"rewards": (mostly_equal,), "algorithm": presets.reinforce_plus_plus_baseline()}
    training = {"training": {"steps": 2, "dynamic_sampling": 4}}
    parts = {"device_rewards": (DeviceReward("padding", padding_is_rewarded),)}
    plain = make("plain", **rewards, **training)
    plain.run()
    padded = make("padded", **rewards, **training, parts=parts)
    padded.run()
    for one, other in zip(metrics_of(plain), metrics_of(padded), strict=True):
        assert other.pop("rewards/padding/mean") == other.pop("rewards/padding/std") == 0
        assert other == pytest.approx(one, rel=1e-6)
    assert min(line["dynamic_sampling/kept"] for line in metrics_of(padded)) < 1


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
def test_metrics_of_a_greedy_baseline_agree_on_the_device(fused, make) -> None:
    """Of one program as of two, by token as by completion: rewards are those of the samples."""
    rewards = (SPREAD, DeviceReward("each_token", each_token))
    given = {"rewards": ()} if fused else {}
    trainer = make(algorithm=presets.remax(), parts={"device_rewards": rewards}, training={"steps": 1}, **given)
    trainer.run()
    line = metrics_of(trainer)[-1]
    means = [value for name, value in line.items() if name.startswith("rewards/") and name.endswith("/mean")]
    assert len(means) == (2 if fused else 3)
    assert line["reward"] == pytest.approx(sum(means), rel=1e-5)


def test_an_evaluation_of_a_fused_run_has_rewards_of_its_own(make, tiny: ModuleType) -> None:
    evaluation = EvaluationConfig(every=2)
    with pytest.raises(ValueError, match="all rewards are JAX functions: pass eval_rewards"):
        make(rewards=(), parts={"device_rewards": (SPREAD,)}, evaluation=evaluation)
    gold = RewardSum((tiny.shared_characters,))
    trainer = make("gold", rewards=(), parts={"device_rewards": (SPREAD,), "eval_rewards": gold}, evaluation=evaluation)
    assert "eval/rewards/shared_characters" in trainer.run().last_evaluation


def test_what_gives_no_reward_is_told_at_once(make) -> None:
    with pytest.raises(ValueError, match="there is no reward"):
        make(rewards=())
    with pytest.raises(ValueError, match=r"several device rewards are named \['spread'\]"):
        make(parts={"device_rewards": (SPREAD, SPREAD)})
    with pytest.raises(ValueError, match="GDPOAdvantage reads what reward functions say"):
        make(rewards=(), algorithm=presets.gdpo(), parts={"device_rewards": (SPREAD,)})
    with pytest.raises(ValueError, match="dynamic_sampling=2 looks at rewards on the host"):
        make(rewards=(), parts={"device_rewards": (SPREAD,)}, training={"dynamic_sampling": 2})


# ---- A trust region ------------------------------------------------------------------------------------


def test_a_trust_region_takes_the_place_of_the_optimizer(make) -> None:
    algorithm = dataclasses.replace(presets.dapo(), surrogate=Clipped(clip_low=None, clip_high=None))
    region = TrustRegionConfig(max_kl=0.005, cg_iterations=4)
    trainer = make(algorithm=algorithm, trust_region=region)
    trainer.run()
    assert programs(trainer) == {"sample": 1, "trust_region_step": 1}
    assert all(line["trpo/kl"] <= 0.005 * (1 + 1e-5) for line in metrics_of(trainer))
    with pytest.raises(ValueError, match=r"update.minibatches=2 would have no effect: a trust region"):
        make("other", trust_region=region, update=UpdateConfig(minibatches=2))


# ---- Pairs of its own samples ----------------------------------------------------------------------------


@pytest.mark.slow
def test_online_dpo_in_two_programs_resumes_exactly(make) -> None:
    algorithm, saving = presets.online_dpo(), {"steps": 2, "checkpoint_every": 1}
    whole = make("whole", algorithm=algorithm, training=saving)
    whole.run()
    assert programs(whole) == {"sample": 1, "update_step": 1}
    assert {"rewards/accuracies", "reward", "entropy", "num_tokens"} <= metrics_of(whole)[-1].keys()
    make("cut", algorithm=algorithm, training=saving | {"steps": 1}).run()
    resumed = make("cut", algorithm=algorithm, training=saving, resume=True)
    resumed.run()
    chex.assert_trees_all_equal(whole.state.params, resumed.state.params)
    assert metrics_of(whole)[-1] == metrics_of(resumed)[-1]
    with pytest.raises(ValueError, match=r"algorithm.*PolicyGradient"):
        make("cut", training=saving, resume=True)


def test_online_dpo_of_a_device_reward_is_one_program(make) -> None:
    trainer = make(algorithm=presets.online_dpo(), rewards=(), parts={"device_rewards": (SPREAD,)})
    trainer.run()
    assert programs(trainer) == {"iteration": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"samples_per_prompt": 1}}, r"samples_per_prompt=1 cannot learn: OnlinePreference compares"),
        ({"sampling": SamplingConfig(max_tokens=4, temperature=0)}, r"sampling.temperature=0 gives equal samples"),
        ({"trust_region": TrustRegionConfig()}, r"OnlinePreference has no surrogate that a trust region"),
        ({"parts": {"judge": lambda **columns: []}}, r"OnlinePreference reads no verdicts"),
    ],
)
def test_what_online_dpo_cannot_do_is_told_at_once(make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(algorithm=presets.online_dpo(), **changes)


@pytest.mark.parametrize(
    ("rewards", "message"),
    [((), r"the weights of device_rewards, \(0.0,\) are all 0"), (None, r"reward_weights=\(0.0, 0.0\) are all 0")],
    ids=["device rewards alone", "beside others"],
)
def test_rewards_of_which_none_counts_are_refused(make, rewards, message) -> None:
    given = {"rewards": rewards} if rewards is not None else {"reward_weights": (0.0,)}
    reported = DeviceReward("spread", spread, {"scale": np.float32(2.0)}, weight=0.0)
    with pytest.raises(ValueError, match=message):
        make(parts={"device_rewards": (reported,)}, **given)
