"""The update step against an objective written out with repeated prompts, and what must not change its result."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.algorithms.batching import UpdateConfig
from jaxrl_llm.algorithms.optimizer import OptimizerConfig, make_optimizer, make_schedule
from jaxrl_llm.algorithms.policy_gradient.credit_assignment import OBSERVED, Observed
from jaxrl_llm.algorithms.policy_gradient.estimators import GroupAdvantage
from jaxrl_llm.algorithms.policy_gradient.objective import PolicyGradient
from jaxrl_llm.algorithms.policy_gradient.presets import dapo, dr_grpo, grpo
from jaxrl_llm.algorithms.policy_gradient.update import make_update_step
from jaxrl_llm.algorithms.state import make_train_state
from jaxrl_llm.logprobs import token_scores
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import MeshConfig, make_mesh, parameter_shardings, replicated, state_shardings
from jaxrl_llm.training.compilation import CompilationCounter
from jaxrl_llm.types import Rollout, TrainState

METRICS = {
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "entropy",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "completions/mean_length",
    "completions/min_length",
    "completions/max_length",
    "completions/clipped_ratio",
    "frac_steps_skipped",
    "grad_norm",
    "loss",
    "num_tokens",
    "sampling/logp_gap_mean",
    "sampling/logp_gap_max",
}


def make_rewards(prompts: int = 4, group: int = 4, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(prompts, group)).astype(np.float32)


SGD = optax.sgd(1.0)
"""The change of the parameters is the gradient."""


@functools.cache
def compiled_step(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    algorithm: PolicyGradient,
    plan: UpdateConfig,
    temperature: float,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """One program for all tests that ask for the same."""
    return jax.jit(make_update_step(model, optimizer, algorithm, plan, temperature=temperature))


def step_once(
    model: Transformer,
    params: Params,
    rollout: Rollout,
    rewards: np.ndarray,
    algorithm: PolicyGradient,
    *,
    optimizer: optax.GradientTransformation = SGD,
    reference: Params | None = None,
    temperature: float = 1.0,
    **plan: int,
) -> tuple[Params, dict[str, float]]:
    """What one update subtracts from the parameters, and its metrics."""
    step = compiled_step(model, optimizer, algorithm, UpdateConfig(**plan), temperature)
    state, metrics = step(make_train_state(params, optimizer, 0), rollout, rewards, reference)
    change = jax.tree.map(lambda old, new: np.asarray(old) - np.asarray(new), params, state.params)
    chex.assert_tree_all_finite(change)  # a comparison takes two NaNs for equal
    return change, {name: float(value) for name, value in metrics.items() if not name.startswith("perf/")}


@jax.jit
def nearby(params: Params) -> Params:
    """Parameters of a reference that is not the policy."""
    return jax.tree.map(lambda x: x * 1.05, params)


def plain_advantages(rewards: np.ndarray, scale: str) -> np.ndarray:
    """Row by row from the papers: (R − mean) / (std + 1e-4), or without the division."""
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    return centred if scale == "none" else centred / (rewards.std(axis=1, ddof=1, keepdims=True) + 1e-4)


def plain_loss(
    algorithm: PolicyGradient,
    logprobs: jax.Array,
    old: jax.Array,
    rewards: np.ndarray,
    mask: np.ndarray,
    reference: jax.Array | None = None,
) -> jax.Array:
    """The published objectives, written down without the package."""
    advantages = plain_advantages(rewards, algorithm.advantage.scale)[..., None]
    ratio = jnp.exp(logprobs - old)
    clipped = jnp.clip(ratio, 1 - algorithm.surrogate.clip_low, 1 + algorithm.surrogate.clip_high)
    losses = -jnp.minimum(ratio * advantages, clipped * advantages)
    if reference is not None:
        losses += algorithm.kl_coef * (jnp.exp(reference - logprobs) - (reference - logprobs) - 1)
    losses = jnp.where(mask, losses, 0.0)
    tokens = mask.sum(axis=-1)
    match algorithm.aggregation:
        case "seq-mean-token-mean":
            return jnp.sum(jnp.sum(losses, axis=-1) / np.maximum(tokens, 1)) / np.sum(tokens > 0)
        case "token-mean":
            return jnp.sum(losses) / np.sum(tokens)
        case "seq-mean-token-sum-norm":
            return jnp.sum(losses) / mask.shape[-1] / np.sum(tokens > 0)
    raise AssertionError(algorithm.aggregation)


# ---------------------------------------------------------------- the gradient


@pytest.mark.parametrize(
    ("algorithm", "architecture", "temperature"),
    [
        (grpo(), {}, 1.0),
        (dapo(), {"tie_embeddings": False, "logit_softcap": 3.0, "attention_bias": True}, 0.7),
        (dr_grpo(), {"sliding_windows": (3, None), "qk_norm": True, "remat": "full"}, 1.0),
    ],
    ids=["grpo", "dapo", "dr_grpo"],
)
def test_gradient_is_that_of_repeated_prompts(
    algorithm,
    architecture,
    temperature,
    tiny_config,
    lively_params,
    make_rollout,
    repeated_logprobs,
):
    """Loss, entropy, KL and gradient from the logits of the P·G whole sequences."""
    model = Transformer(tiny_config(**architecture))
    params, rollout, rewards = lively_params(model), make_rollout(), make_rewards()
    reference = nearby(params) if algorithm.needs_reference else None
    gradient, metrics = step_once(
        model, params, rollout, rewards, algorithm, reference=reference, temperature=temperature
    )
    mask = np.asarray(rollout.mask)
    if algorithm.mask_truncated:
        mask = mask & rollout.finished[..., None]

    @jax.jit
    def plain(params: Params) -> tuple[tuple[jax.Array, Any], Params]:
        ref = None if reference is None else repeated_logprobs(model, reference, rollout, temperature)[0]

        def loss(params: Params) -> tuple[jax.Array, Any]:
            logprobs, entropy = repeated_logprobs(model, params, rollout, temperature)
            old = jax.lax.stop_gradient(logprobs)
            gap = jnp.abs(old - rollout.sampler_logprobs)
            means = {"entropy": jnp.mean(entropy, where=mask), "sampling/logp_gap_mean": jnp.mean(gap, where=mask)}
            if ref is not None:
                means["kl"] = jnp.mean(jnp.exp(ref - logprobs) - (ref - logprobs) - 1, where=mask)
            return plain_loss(algorithm, logprobs, old, rewards, mask, ref), means

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, means), expected = plain(params)
    chex.assert_trees_all_close(gradient, expected, rtol=0, atol=1e-5)
    assert all(np.abs(leaf).max() > 1e-5 for leaf in jax.tree.leaves(expected))
    assert metrics["loss"] == pytest.approx(float(loss), abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(float(jax.jit(optax.tree.norm)(expected)), rel=1e-4)
    for name, value in means.items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-4), name
    if algorithm.needs_reference:
        assert metrics["kl"] > 0.01


@pytest.fixture(scope="module")
def whole(tiny_config, lively_params, make_rollout) -> dict[str, Any]:
    """GRPO with its KL term on 4 prompts × 4 samples, in one piece on one device."""
    model = Transformer(tiny_config())
    params = lively_params(model)
    case = {
        "model": model,
        "params": params,
        "rollout": make_rollout(),
        "rewards": make_rewards(),
        "algorithm": grpo(),
        "reference": nearby(params),
    }
    gradient, metrics = step_once(**case)
    return {"case": case, "gradient": gradient, "metrics": metrics}


@pytest.mark.parametrize("micro_batches", [2, 16])
def test_micro_batches_do_not_change_the_gradient(micro_batches, whole):
    """Of 4 prompts × 4 samples, 16 pieces hold a single completion each."""
    gradient, metrics = step_once(**whole["case"], micro_batches=micro_batches)
    chex.assert_trees_all_close(gradient, whole["gradient"], rtol=0, atol=2e-6)
    assert metrics == pytest.approx(whole["metrics"], rel=1e-4, abs=1e-6)


def test_padding_does_not_change_the_gradient(whole):
    """Wider rows, with ids at the padding that are no tokens."""
    rollout: Rollout = whole["case"]["rollout"]
    tail = ((0, 0), (0, 0), (0, 3))
    wide = rollout.replace(
        prompt=np.pad(rollout.prompt, ((0, 0), (0, 4)), constant_values=-9),
        completion=np.pad(np.where(rollout.mask, rollout.completion, 10**6), tail, constant_values=10**6),
        logprobs=np.pad(rollout.logprobs, tail, constant_values=np.nan),
        sampler_logprobs=np.pad(np.where(rollout.mask, rollout.sampler_logprobs, np.nan), tail),
    )
    gradient, metrics = step_once(**{**whole["case"], "rollout": wide})
    chex.assert_trees_all_close(gradient, whole["gradient"], rtol=0, atol=2e-6)
    assert metrics == pytest.approx(whole["metrics"], rel=1e-4, abs=1e-6)


def test_order_does_not_change_the_gradient(whole):
    """Prompts, and samples of a group, in another order: rewards stay with their rows."""
    prompts, samples = np.array([2, 0, 3, 1]), np.array([3, 1, 0, 2])
    rollout: Rollout = whole["case"]["rollout"]
    shuffled = Rollout(
        prompt=rollout.prompt[prompts],
        prompt_lengths=rollout.prompt_lengths[prompts],
        **{name: values[prompts][:, samples] for name, values in rollout.of_samples.items()},
    )
    other = {"rollout": shuffled, "rewards": whole["case"]["rewards"][prompts][:, samples]}
    gradient, metrics = step_once(**{**whole["case"], **other})
    chex.assert_trees_all_close(gradient, whole["gradient"], rtol=0, atol=2e-6)
    assert metrics == pytest.approx(whole["metrics"], rel=1e-4, abs=1e-6)


def test_mesh_does_not_change_the_update(mesh_config, whole):
    """The gradient (the momentum after one step), the parameters and the metrics; the state stays sharded."""
    mesh, case = make_mesh(mesh_config), whole["case"]
    model, optimizer = case["model"], optax.sgd(1.0, momentum=0.9)
    shardings = parameter_shardings(mesh, model.logical_axes(), case["params"])
    abstract = jax.eval_shape(lambda p: make_train_state(p, optimizer, 0), case["params"])
    of_state = state_shardings(mesh, abstract, shardings)
    plan = UpdateConfig(micro_batches=2)  # on 8 row shards each holds one completion of each group
    step = make_update_step(model, optimizer, case["algorithm"], plan)
    compiled = jax.jit(step, donate_argnums=0, out_shardings=(of_state, replicated(mesh)))
    reference = jax.device_put(case["reference"], shardings)
    with jax.set_mesh(mesh), CompilationCounter() as counter:
        state = jax.jit(lambda p: make_train_state(p, optimizer, 0), out_shardings=of_state)(case["params"])
        first = state
        state, metrics = compiled(state, case["rollout"], case["rewards"], reference)
        gradient, params = jax.device_get((state.opt_state[0].trace, state.params))
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == of_state
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.params))
        state, _ = compiled(state, case["rollout"], case["rewards"], reference)
        assert counter.counts["update_step"] == 1
    chex.assert_trees_all_close(gradient, whole["gradient"], rtol=0, atol=1e-5)
    expected = jax.tree.map(lambda old, change: np.asarray(old) - change, case["params"], whole["gradient"])
    chex.assert_trees_all_close(params, expected, rtol=0, atol=1e-5)
    ours = {name: float(value) for name, value in metrics.items() if not name.startswith("perf/")}
    assert ours == pytest.approx(whole["metrics"], rel=1e-4, abs=1e-5)
    split = state.params["layers"]["mlp"]["up"]["weight"]
    assert split.addressable_shards[0].data.size == split.size // (mesh_config.tensor * mesh.shape["fsdp"])


def test_one_compiled_step_follows_the_mesh(whole):
    """Also onto a mesh of the user's own, which has not all our axes."""
    case, optimizer = whole["case"], optax.sgd(1.0)
    step = jax.jit(make_update_step(case["model"], optimizer, case["algorithm"]))
    meshes = [None, make_mesh(), jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))]
    for mesh in meshes:
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            state = make_train_state(case["params"], optimizer, 0)
            state, _ = step(state, case["rollout"], case["rewards"], case["reference"])
        change = jax.tree.map(lambda old, new: np.asarray(old) - np.asarray(new), case["params"], state.params)
        chex.assert_trees_all_close(change, whole["gradient"], rtol=0, atol=1e-5)
    too_few = make_rewards()[:3, :1]
    rollout = jax.tree.map(lambda x: x[:3, :1] if x.ndim > 1 and x.shape[1] == 4 else x[:3], case["rollout"])
    with jax.set_mesh(make_mesh()), pytest.raises(ValueError, match=r"3 prompts × 1 samples .* 8 row shards"):
        jax.eval_shape(step, state, rollout, too_few, case["reference"])


# ---------------------------------------------------------------- before the first update


def test_ratio_is_one_and_kl_zero_before_the_first_update(tiny_config, lively_params):
    """From the sampler's own log-probs, at a temperature, with the policy as its reference."""
    model = Transformer(tiny_config())
    params, mesh = lively_params(model), make_mesh(MeshConfig(), jax.devices()[:1])
    config = SamplingConfig(max_tokens=6, temperature=0.7)
    sampler = Sampler(model, config, group=4, stop_tokens=(1, 2, 3, 4), mesh=mesh)
    prompt = np.random.default_rng(0).integers(0, 64, (4, 5))
    key = np.asarray(jax.random.key_data(jax.random.key(1)))
    rollout = sampler(params, prompt, np.array([1, 5, 3, 4]), key, 0)
    _, metrics = step_once(model, params, rollout, make_rewards(), grpo(), reference=params, temperature=0.7)
    assert metrics["sampling/logp_gap_max"] < 1e-4
    assert metrics["ratio/mean"] == metrics["ratio/max"] == 1
    assert metrics["kl"] == pytest.approx(0, abs=1e-9)
    assert metrics["clip_ratio/region_mean"] == metrics["approx_kl/k3"] == 0
    # With several optimizer steps the old log-probs are computed, and compared with the sampler's.
    _, metrics = step_once(model, params, rollout, make_rewards(), PolicyGradient(), temperature=0.7, epochs=2)
    assert metrics["sampling/logp_gap_max"] < 1e-4
    # Scored at another temperature the gap shows.
    _, metrics = step_once(model, params, rollout, make_rewards(), PolicyGradient())
    assert metrics["sampling/logp_gap_max"] > 0.1


@pytest.mark.parametrize("plan", [UpdateConfig(), UpdateConfig(epochs=2)], ids=["one", "two"])
@pytest.mark.parametrize(
    "truncation", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.3}], ids=lambda truncation: next(iter(truncation))
)
def test_the_gap_to_a_truncating_sampler_is_that_of_the_same_distribution(truncation, plan, tiny_config, lively_params):
    """At temperature 1 the model's own log-probs are compared, at another there is nothing to compare with."""
    model = Transformer(tiny_config())
    params, mesh = lively_params(model), make_mesh(MeshConfig(), jax.devices()[:1])
    config = SamplingConfig(max_tokens=6, **truncation)
    sampler = Sampler(model, config, group=4, stop_tokens=(1,), mesh=mesh)
    key = np.asarray(jax.random.key_data(jax.random.key(1)))
    prompt = np.random.default_rng(0).integers(0, 64, (4, 5))
    rollout = sampler(params, prompt, np.array([1, 5, 3, 4]), key, 0)
    assert np.max(np.where(rollout.mask, rollout.sampler_logprobs - rollout.logprobs, 0)) > 0.1

    def metrics(temperature: float) -> dict[str, jax.Array]:
        settings = {"temperature": temperature, "truncated": True}
        step = jax.jit(make_update_step(model, SGD, PolicyGradient(), plan, **settings))
        return step(make_train_state(params, SGD, 0), rollout, make_rewards())[1]

    assert metrics(1.0)["sampling/logp_gap_max"] < 1e-4
    assert not [name for name in metrics(0.7) if name.startswith("sampling/")]


# ---------------------------------------------------------------- several optimizer steps


RATE = 0.05
"""Large enough that ratios leave the clip range within a step."""


@pytest.fixture(scope="module")
def by_hand(tiny_config, lively_params, make_rollout, repeated_logprobs) -> Callable[..., Params]:
    """Plain SGD steps on the given parts of the batch, one after the other, with old log-probs of the start."""
    model = Transformer(tiny_config())
    params, rollout, rewards = lively_params(model), make_rollout(), make_rewards()
    mask, algorithm = np.asarray(rollout.mask), PolicyGradient()
    old = jax.jit(lambda p: repeated_logprobs(model, p, rollout)[0])(params)

    @jax.jit
    def step(params: Params, selected: jax.Array) -> Params:
        """One step on the prompts that `selected` `[P]` marks: the mean over their sequences."""

        def loss(params: Params) -> jax.Array:
            logprobs = repeated_logprobs(model, params, rollout)[0]
            advantages = plain_advantages(rewards, "group")[..., None]
            ratio = jnp.exp(logprobs - old)
            losses = -jnp.minimum(ratio * advantages, jnp.clip(ratio, 0.8, 1.2) * advantages)
            means = jnp.sum(jnp.where(mask, losses, 0), axis=-1) / mask.sum(axis=-1)
            return jnp.sum(jnp.where(selected[:, None], means, 0)) / (jnp.sum(selected) * rewards.shape[1])

        return jax.tree.map(lambda p, g: p - RATE * g, params, jax.grad(loss)(params))

    def run(parts: list[list[int]]) -> Params:
        current = params
        for part in parts:
            current = step(current, jnp.isin(jnp.arange(4), jnp.array(part)))
        return current

    run.setup = (model, params, rollout, rewards, algorithm)  # type: ignore[attr-defined]
    return run


def distance(a: Params, b: Params) -> float:
    gaps = jax.tree.map(lambda x, y: float(np.abs(np.asarray(x, np.float32) - np.asarray(y, np.float32)).max()), a, b)
    return max(jax.tree.leaves(gaps))


def test_epochs_equal_steps_by_hand(by_hand):
    model, params, rollout, rewards, algorithm = by_hand.setup
    change, metrics = step_once(
        model, params, rollout, rewards, algorithm, optimizer=optax.sgd(RATE), epochs=3, micro_batches=2
    )
    ours = jax.tree.map(lambda old, d: np.asarray(old) - d, params, change)
    every = [0, 1, 2, 3]
    expected = by_hand([every, every, every])
    assert distance(ours, expected) < 2e-5
    assert distance(ours, by_hand([every, every])) > 1e-3
    assert metrics["clip_ratio/region_mean"] > 0.01  # some tokens were clipped: old log-probs matter
    assert metrics["ratio/max"] > 1.2


def test_minibatches_equal_steps_by_hand_on_a_random_partition(by_hand):
    """Two halves in some order, which changes from step to step and repeats with the seed."""
    model, params, rollout, rewards, algorithm = by_hand.setup
    optimizer = optax.sgd(RATE)
    step = jax.jit(make_update_step(model, optimizer, algorithm, UpdateConfig(minibatches=2)))
    halves = [list(pair) for pair in itertools.combinations(range(4), 2)]
    candidates = [by_hand([half, [p for p in range(4) if p not in half]]) for half in halves]

    def partition(number: int) -> int:
        state = make_train_state(params, optimizer, 0).replace(step=jnp.int32(number))
        after, _ = step(state, rollout, rewards)
        assert int(after.step) == number + 1
        distances = [distance(after.params, candidate) for candidate in candidates]
        best = int(np.argmin(distances))
        assert distances[best] < 2e-5
        assert sorted(distances)[1] > 1e-3
        return best

    chosen = [partition(number) for number in range(5)]
    assert len(set(chosen)) > 1
    assert partition(0) == chosen[0]


# ---------------------------------------------------------------- degenerate batches


def assert_no_change(change: Params, metrics: dict[str, float]) -> None:
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(change))
    assert all(np.isfinite(value) for value in metrics.values()), metrics
    assert metrics["grad_norm"] == metrics["loss"] == 0


def test_equal_rewards_change_nothing(tiny_config, lively_params, make_rollout):
    model = Transformer(tiny_config())
    rewards = np.repeat(np.float32([[0.1], [1 / 3], [-7.7], [0]]), 4, axis=1)
    change, metrics = step_once(model, lively_params(model), make_rollout(), rewards, PolicyGradient())
    assert_no_change(change, metrics)
    assert metrics["frac_reward_zero_std"] == 1
    assert metrics["reward_std"] == pytest.approx(0, abs=1e-6)
    assert metrics["reward"] == pytest.approx(float(rewards.mean()), rel=1e-5)


def test_a_group_of_one_changes_nothing(tiny_config, lively_params, make_rollout):
    """Its reward is its baseline. The numbers are finite all the same."""
    model = Transformer(tiny_config())
    change, metrics = step_once(
        model, lively_params(model), make_rollout(group=1), make_rewards(4, 1), PolicyGradient(), micro_batches=2
    )
    assert_no_change(change, metrics)


def test_a_batch_of_which_all_is_masked_changes_nothing(tiny_config, lively_params, make_rollout):
    model = Transformer(tiny_config())
    rollout: Rollout = make_rollout()
    truncated = rollout.replace(completion_lengths=np.full((4, 4), 6, np.int32), finished=np.zeros((4, 4), bool))
    config = OptimizerConfig(learning_rate=0.1)
    adamw = make_optimizer(config, make_schedule(config, 10))
    change, metrics = step_once(
        model, lively_params(model), truncated, make_rewards(), dapo(), optimizer=adamw, micro_batches=2
    )
    assert_no_change(change, metrics)
    assert metrics["completions/clipped_ratio"] == 1


def test_one_token_completions(tiny_config, lively_params, make_rollout, repeated_logprobs):
    model = Transformer(tiny_config())
    params, rollout, rewards = lively_params(model), make_rollout(width=1), make_rewards()
    gradient, _ = step_once(model, params, rollout, rewards, PolicyGradient())

    @jax.jit
    def plain(params: Params) -> Params:
        def loss(params: Params) -> jax.Array:
            logprobs = repeated_logprobs(model, params, rollout)[0]
            return -jnp.mean(plain_advantages(rewards, "group")[..., None] * logprobs)

        return jax.grad(loss)(params)

    chex.assert_trees_all_close(gradient, plain(params), rtol=0, atol=1e-5)


def test_masked_truncated_completions_have_no_part(tiny_config, lively_params, make_rollout):
    """What they hold does not matter; their rewards stay in the group's baseline."""
    model = Transformer(tiny_config())
    params, rollout, rewards = lively_params(model), make_rollout(), make_rewards()
    cut = ~rollout.finished[..., None]
    assert 2 <= cut.sum() <= 14
    other = rollout.replace(completion=np.where(cut, (rollout.completion + 1) % 64, rollout.completion))
    algorithm = dataclasses.replace(PolicyGradient(), mask_truncated=True)
    before, after = (step_once(model, params, rows, rewards, algorithm) for rows in (rollout, other))
    chex.assert_trees_all_close(after[0], before[0], rtol=0, atol=1e-7)
    assert after[1] == pytest.approx(before[1], rel=1e-6)
    unmasked, _ = step_once(model, params, other, rewards, PolicyGradient())
    assert distance(unmasked, before[0]) > 1e-3


# ---------------------------------------------------------------- types, state, compilation


@pytest.mark.parametrize(("dtype", "param_dtype"), [("bfloat16", "float32"), ("bfloat16", "bfloat16")])
def test_half_precision(dtype, param_dtype, whole, tiny_config, lively_params):
    """The gradient points where that of float32 does; parameters keep their type, moments are float32."""
    model = Transformer(tiny_config(dtype=dtype, param_dtype=param_dtype, remat="full"))
    params = lively_params(model)
    case = {**whole["case"], "model": model, "params": params, "reference": nearby(params)}
    config = OptimizerConfig(learning_rate=0.01)
    optimizer = make_optimizer(config, make_schedule(config, 10))
    step = jax.jit(make_update_step(model, optimizer, grpo(), UpdateConfig(micro_batches=2)))
    state, metrics = step(make_train_state(params, optimizer, 0), case["rollout"], case["rewards"], case["reference"])
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {param_dtype}
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert {leaf.dtype.name for leaf in moments} == {"float32"}
    chex.assert_tree_all_finite(state)
    assert all(np.isfinite(value) for value in metrics.values())
    assert distance(state.params, params) > 1e-3
    adam = optax.tree.get(state.opt_state, "mu")
    ours, expected = (jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(t)]) for t in (adam, whole["gradient"]))
    cosine = jnp.vdot(ours, expected) / jnp.linalg.norm(ours) / jnp.linalg.norm(expected)
    assert cosine > 0.98


def test_several_steps_compile_once_with_the_state_donated(tiny_config, lively_params, make_rollout):
    model = Transformer(tiny_config())
    config = OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup_steps=1)
    optimizer = make_optimizer(config, make_schedule(config, 4))
    plan = UpdateConfig(epochs=2, minibatches=2, micro_batches=2)
    step = jax.jit(make_update_step(model, optimizer, PolicyGradient(), plan), donate_argnums=0)
    state = jax.jit(lambda p: make_train_state(p, optimizer, 3))(lively_params(model))
    key = np.asarray(state.key)
    with CompilationCounter() as counter:
        for number in range(3):
            before = state
            state, metrics = step(state, make_rollout(seed=number), make_rewards(seed=number))
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))
        jax.block_until_ready((state, metrics))
    assert counter.counts["update_step"] == 1
    assert int(state.step) == 3
    np.testing.assert_array_equal(state.key, key)


def test_training_raises_the_probability_of_what_is_rewarded(tiny_config, lively_params, make_rollout):
    """The sign of everything: 20 steps on the same rollouts, one completion of each group being good."""
    model = Transformer(tiny_config())
    optimizer, rollout = optax.sgd(0.1), make_rollout()
    rewards = np.zeros((4, 4), np.float32)
    rewards[:, 1] = 1
    step = jax.jit(make_update_step(model, optimizer, PolicyGradient()))
    params = lively_params(model)
    state: TrainState = make_train_state(params, optimizer, 0)
    for _ in range(20):
        state, _ = step(state, rollout, rewards)

    @jax.jit
    def means(params: Params) -> jax.Array:
        hidden = model.hidden(params, rollout)
        logprobs = token_scores(hidden, model.head(params), rollout.completion).logprobs
        return jnp.mean(jnp.sum(jnp.where(rollout.mask, logprobs, 0), axis=-1), axis=0)

    gain = np.asarray(means(state.params) - means(params))
    assert gain[1] > 0.5
    assert gain[1] > gain[[0, 2, 3]].max() + 0.5


# ---------------------------------------------------------------- metrics and errors


def test_metrics_have_the_names_and_values_that_users_know(tiny_config, lively_params, make_rollout):
    model = Transformer(tiny_config())
    params, rollout, rewards = lively_params(model), make_rollout(), make_rewards()
    rewards[1] = 0.5
    _, metrics = step_once(model, params, rollout, rewards, grpo(), reference=params)
    assert metrics.keys() >= METRICS | {"kl"}
    lengths = rollout.completion_lengths
    expected = {
        "reward": rewards.mean(),
        "reward_std": rewards.std(axis=1, ddof=1).mean(),
        "frac_reward_zero_std": 0.25,
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": 1 - rollout.finished.mean(),
        "num_tokens": lengths.sum() + rollout.prompt_lengths.sum(),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-5), name
    _, without = step_once(model, params, rollout, rewards, PolicyGradient())
    assert metrics.keys() - without.keys() == {"kl"}  # no reference, no KL


def test_a_missing_reference_and_a_greedy_policy_raise(tiny_config, lively_params, make_rollout):
    model = Transformer(tiny_config())
    with pytest.raises(ValueError, match="reads a reference"):
        step_once(model, lively_params(model), make_rollout(), make_rewards(), grpo())
    with pytest.raises(ValueError, match="temperature 0"):
        make_update_step(model, optax.sgd(1.0), dapo(), temperature=0.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_reward_that_is_not_finite_costs_its_minibatch_alone(bad, tiny_config, lively_params, make_rollout):
    model = Transformer(tiny_config())
    params, rewards = lively_params(model), make_rewards()
    rewards[2, 1] = bad
    change, metrics = step_once(model, params, make_rollout(), rewards, PolicyGradient(), minibatches=2)
    assert metrics["frac_steps_skipped"] == 0.5
    assert not np.isfinite(metrics["reward"])
    assert distance(change, jax.tree.map(np.zeros_like, change)) > 1e-4


@pytest.mark.parametrize("shape", [(4,), (2, 4), (4, 4, 5)])
def test_rewards_of_another_shape_raise(shape, tiny_config, lively_params, make_rollout):
    model = Transformer(tiny_config())
    with pytest.raises(ValueError, match=rf"rewards has shape \({shape[0]},.* rollout holds \(4, 4\)"):
        step_once(model, lively_params(model), make_rollout(), np.zeros(shape, np.float32), PolicyGradient())


@pytest.mark.parametrize("field", ["epochs", "minibatches", "micro_batches"])
def test_plans_below_one_raise(field):
    with pytest.raises(ValueError, match=rf"update\.{field}=0"):
        UpdateConfig(**{field: 0})


@pytest.mark.parametrize(
    ("plan", "prompts", "group", "shards", "expected"),
    [
        ({}, 4, 4, 1, 1),
        ({}, 4, 4, 8, 2),
        ({}, 1, 8, 8, 8),
        ({"micro_batches": 2}, 4, 4, 8, 4),
        ({"minibatches": 2}, 4, 4, 2, 1),
        ({"minibatches": 4, "micro_batches": 3}, 4, 6, 2, 6),
    ],
)
def test_group_split_is_the_least_that_fills_the_pieces(plan, prompts, group, shards, expected):
    assert UpdateConfig(**plan).group_split(prompts, group, shards) == expected


def test_numbers_that_cannot_be_split_raise_by_name():
    with pytest.raises(ValueError, match=r"6 prompts per step .* update\.minibatches=4"):
        UpdateConfig(minibatches=4).group_split(6, 8, 1)
    with pytest.raises(ValueError, match=r"3 prompts × 2 samples .* update\.micro_batches=4 × 2 row shards"):
        UpdateConfig(micro_batches=4, minibatches=2).group_split(6, 2, 2)
    assert UpdateConfig(micro_batches=8).group_split(4, 4, 1) == 2
    with pytest.raises(ValueError, match="without cutting groups"):
        UpdateConfig(micro_batches=8).group_split(4, 4, 1, whole_groups=True)
    whole_groups = PolicyGradient(advantage=GroupAdvantage(), aggregation="group-mean-token-mean")
    assert whole_groups.needs_whole_groups


# ---- What is told of single completions --------------------------------------------------------------


def observed(whole: dict[str, Any], plan: UpdateConfig) -> dict[str, np.ndarray]:
    """Of the first 6 of 4 prompts × 4 samples."""
    case, seen = whole["case"], Observed(prompts=3, by_token=6)
    step = jax.jit(make_update_step(case["model"], SGD, case["algorithm"], plan, observed=seen))
    state = make_train_state(case["params"], SGD, 0)
    found = step(state, case["rollout"], case["rewards"], case["reference"])[1]
    return {name.removeprefix(OBSERVED): np.asarray(found[name]) for name in found if name.startswith(OBSERVED)}


@pytest.fixture(scope="module")
def of_own_pass(whole) -> dict[str, np.ndarray]:
    """Where a second epoch is to come, the policy before the first one has a pass of its own."""
    return observed(whole, UpdateConfig(epochs=2))


@pytest.mark.parametrize(
    "plan",
    [UpdateConfig(), UpdateConfig(micro_batches=16), UpdateConfig(tokens_per_micro_batch=32)],
    ids=["whole", "pieces", "packed"],
)
def test_scores_of_completions_are_told_from_the_pass_of_the_gradient(plan, whole, of_own_pass):
    told = observed(whole, plan)
    assert told.keys() == of_own_pass.keys() == {"advantages", "old_logprobs", "ref_logprobs", "entropy"}
    assert told["advantages"].shape == (3, 4) and told["entropy"].shape == told["ref_logprobs"].shape
    read = np.asarray(whole["case"]["rollout"].mask)[:2] & (np.arange(8) < 6).reshape(2, 4, 1)
    for name in ("old_logprobs", "entropy"):
        np.testing.assert_allclose(told[name][read], of_own_pass[name][read], rtol=1e-4, atol=1e-5)
        assert np.isnan(told[name][~read]).all() and np.abs(told[name][read]).min() > 1e-4


def test_nothing_is_told_of_completions_unless_asked(whole):
    assert not any(name.startswith(OBSERVED) for name in whole["metrics"])
