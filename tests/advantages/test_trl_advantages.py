"""TRL's own code for advantages, run on the same rewards.

TRL computes them amid a long method that generates and scores; the statements from the sum of the rewards to the
advantages are taken out of it by their names and run as they stand.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxrl_llm.advantages.group import group_advantages, zero_std_groups
from jaxrl_llm.advantages.multi_reward import gdpo_advantages
from jaxrl_llm.advantages.rloo import rloo_advantages
from jaxrl_llm.advantages.shaping import overlong_penalty, rlhf_reward

torch = pytest.importorskip("torch")
trl_rewards = pytest.importorskip("trl.rewards")
grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")
rloo_trainer = pytest.importorskip("trl.trainer.rloo_trainer")

GROUPS, SAMPLES, REWARDS, TIME = 5, 4, 2, 6


def close(value, expected):
    np.testing.assert_allclose(value, np.asarray(expected), rtol=1e-5, atol=2e-6)


def run_trl(module: Any, trainer: Any, **names: Any) -> dict[str, Any]:
    """Runs the statements of `_generate_and_score_completions` that turn `rewards_per_func` into `advantages`."""
    source = textwrap.dedent(inspect.getsource(trainer._generate_and_score_completions))
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)

    def assigned(statement: ast.stmt) -> list[str]:
        return [ast.unparse(t) for t in statement.targets] if isinstance(statement, ast.Assign) else []

    targets = [assigned(statement) for statement in function.body]
    start = targets.index(["unscorable_mask"])
    stop = max(i for i, names in enumerate(targets[: targets.index(["process_slice"])]) if names) + 1
    namespace = {**vars(module), "num_generations": SAMPLES, "device": "cpu", "gather": lambda x: x, **names}
    exec(compile(ast.Module(function.body[start:stop], []), "<trl>", "exec"), namespace)
    return namespace


@pytest.fixture
def data():
    """Rewards of several functions, some of which do not apply (NaN); one sample without any, one constant group."""
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(GROUPS * SAMPLES, REWARDS)).astype(np.float32)
    rewards[3] = np.nan
    rewards[6, 0] = np.nan
    rewards[8:12] = 0.5
    mask = np.arange(TIME) < rng.integers(1, TIME + 1, size=(GROUPS * SAMPLES, 1))
    old, ref = -rng.exponential(size=(2, *mask.shape)).astype(np.float32)
    return SimpleNamespace(rewards=rewards, mask=mask, old=old, ref=ref)


def summed(rewards, weights):
    """What TRL compares: the weighted sum of the rewards that apply."""
    total = np.nansum(rewards * weights, axis=-1).reshape(GROUPS, SAMPLES)
    return total, ~np.isnan(rewards).all(-1).reshape(GROUPS, SAMPLES)


def trl_grpo(data, **settings):
    weights = torch.tensor([1.0, 0.5])
    trainer = SimpleNamespace(reward_weights=weights, reward_funcs=[None] * REWARDS, **settings)
    out = run_trl(grpo_trainer, grpo_trainer.GRPOTrainer, self=trainer, rewards_per_func=torch.tensor(data.rewards))
    return out["advantages"].reshape(GROUPS, SAMPLES), out["is_std_zero"].reshape(GROUPS, SAMPLES)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_grpo(data, scale):
    expected, is_std_zero = trl_grpo(data, multi_objective_aggregation="sum_then_normalize", scale_rewards=scale)
    rewards, scored = summed(data.rewards, [1.0, 0.5])
    close(group_advantages(rewards, scale=scale, mask=scored), expected)
    if scale != "batch":
        np.testing.assert_array_equal(zero_std_groups(rewards, mask=scored), is_std_zero[:, 0])


def test_gdpo(data):
    expected, _ = trl_grpo(data, multi_objective_aggregation="normalize_then_sum", scale_rewards="group")
    rewards = data.rewards.reshape(GROUPS, SAMPLES, REWARDS)
    close(gdpo_advantages(rewards, weights=np.array([1.0, 0.5]), mask=~np.isnan(rewards)), expected)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("clip", [None, 0.7])
def test_rloo(data, normalize, clip):
    bounds = None if clip is None else (-clip, clip)
    trainer = SimpleNamespace(reward_weights=torch.tensor([1.0, 0.5]), reward_clip_range=bounds, beta=0.05)
    trainer.normalize_advantages = normalize
    tensors = {"rewards_per_func": data.rewards, "old_per_token_logps": data.old, "ref_per_token_logps": data.ref}
    tensors = {name: torch.tensor(x) for name, x in tensors.items()} | {
        "completion_mask": torch.tensor(data.mask).int()
    }
    out = run_trl(rloo_trainer, rloo_trainer.RLOOTrainer, self=trainer, **tensors)

    scores, scored = summed(data.rewards, [1.0, 0.5])
    logprobs, mask = data.old.reshape(GROUPS, SAMPLES, TIME), data.mask.reshape(GROUPS, SAMPLES, TIME)
    args = (scores, logprobs, data.ref.reshape(GROUPS, SAMPLES, TIME), mask)
    A = rloo_advantages(*args, score_clip=clip, sample_mask=scored)
    if normalize:  # over the batch, as one group
        A = group_advantages(A.reshape(1, -1), mask=scored.reshape(1, -1))
    close(np.asarray(A).ravel(), out["advantages"])
    rewards = np.asarray(rlhf_reward(*args, score_clip=clip))
    close(rewards[scored], out["rewards"].numpy()[scored.ravel()])


def test_soft_overlong_punishment():
    lengths = list(range(40))
    punish = trl_rewards.get_soft_overlong_punishment(max_completion_len=30, soft_punish_cache=7)
    expected = punish(completion_ids=[[1] * n for n in lengths])
    close(overlong_penalty(lengths, max_length=30, cache=7), expected)
