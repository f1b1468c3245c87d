"""Small updates of parameters in bfloat16: a float32 copy follows float32, rounding at random does on average."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.algorithms.batching import MicroBatches
from jaxrl_llm.algorithms.gradient import Loss, make_gradient_step
from jaxrl_llm.algorithms.offline import make_offline_step
from jaxrl_llm.algorithms.optimizer import OptimizerConfig, make_optimizer, make_schedule
from jaxrl_llm.algorithms.policy_gradient import presets
from jaxrl_llm.algorithms.policy_gradient.critic import Critic
from jaxrl_llm.algorithms.policy_gradient.update import make_update_step
from jaxrl_llm.algorithms.rounding import MasterCopy, RandomRounding, Rounding, as_stored, optimizer_state
from jaxrl_llm.algorithms.scorer import Scorer
from jaxrl_llm.algorithms.state import abstract_train_state, make_train_state
from jaxrl_llm.algorithms.supervised import Demonstrations, SupervisedObjective
from jaxrl_llm.algorithms.trust_region.step import TrustRegionConfig, make_trust_region_step
from jaxrl_llm.models.config import LoraConfig, Params
from jaxrl_llm.models.heads import ScoreModel
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sharding import make_mesh
from jaxrl_llm.types import Rollout, TrainState

CONFIG = OptimizerConfig(learning_rate=1e-6)
ADAMW = make_optimizer(CONFIG, make_schedule(CONFIG, 100))
REWARDS = np.random.default_rng(5).normal(size=(4, 4)).astype(np.float32)
STEPS = 20


def parameters(params: Any, texts: Any) -> Any:
    """The scores of a loss that is a function of the parameters alone."""
    return params


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(leaf, np.float32)) for leaf in jax.tree.leaves(tree)])


def rows_of(rollout: Rollout) -> Demonstrations:
    return Demonstrations(rollout.prompt, rollout.prompt_lengths, rollout.completion, np.asarray(rollout.mask))


def in_bfloat16(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)


def assert_is_the_rounded_copy(params: Params, state: Any) -> None:
    assert isinstance(state, MasterCopy)
    chex.assert_trees_all_equal(params, in_bfloat16(state.master), strict=True)
    chex.assert_type(jax.tree.leaves(state.master), jnp.float32)


@pytest.fixture(scope="module")
def learn(tiny_config, lively_params, make_rollout):
    """Steps at 1e-6 from parameters that bfloat16 has, in both types; the state after them, and where it began."""

    def learn(param_dtype: str, rounding: Rounding = "master", dtype: str = "float32") -> tuple[TrainState, Params]:
        model = Transformer(tiny_config(dtype=dtype, param_dtype=param_dtype, attention_bias=True))
        begun = in_bfloat16(lively_params(Transformer(tiny_config(attention_bias=True))))
        params = jax.tree.map(lambda x: jnp.array(x, param_dtype, copy=True), begun)
        step = jax.jit(make_update_step(model, ADAMW, presets.dapo()), donate_argnums=0)
        state = make_train_state(params, ADAMW, 0, rounding=rounding)
        for seed in range(STEPS):
            state, metrics = step(state, make_rollout(seed=seed), REWARDS)
            assert metrics["frac_steps_skipped"] == 0
        return state, begun

    return learn


@pytest.fixture(scope="module")
def wide(learn) -> np.ndarray:
    """How far each parameter goes in float32."""
    state, begun = learn("float32")
    return flat(state.params) - flat(begun)


def test_a_float32_copy_follows_float32(learn, wide):
    """The copies after 20 steps at 1e-6 are those of float32; rounded to the nearest, next to nothing would move."""
    state, begun = learn("bfloat16")
    assert_is_the_rounded_copy(state.params, state.opt_state)
    moved = flat(state.opt_state.master) - flat(begun)
    assert np.abs(wide).mean() > 3e-6
    # The policy in bfloat16 is another one once parameters have moved: its gradient is nearly the same.
    assert np.abs(moved - wide).mean() < 0.02 * np.abs(wide).mean()
    assert np.mean(moved != 0) > 0.99
    nearest, _ = learn("bfloat16", "nearest")
    assert np.mean(flat(nearest.params) != flat(begun)) < 0.05


def test_rounding_at_random_follows_float32_on_average(learn, wide):
    state, begun = learn("bfloat16", "stochastic")
    assert isinstance(state.opt_state, RandomRounding)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"bfloat16"}
    moved, direction = flat(state.params) - flat(begun), np.sign(wide)
    error = np.std(direction * moved) / np.sqrt(moved.size)
    assert abs(np.mean(direction * moved) - np.mean(np.abs(wide))) < 4 * error
    assert np.mean(direction * moved) > 6 * error  # and that it moves at all is no accident


def test_products_in_bfloat16_do_as_well(learn, wide):
    state, begun = learn("bfloat16", dtype="bfloat16")
    assert_is_the_rounded_copy(state.params, state.opt_state)
    moved = flat(state.opt_state.master) - flat(begun)
    assert np.corrcoef(moved, wide)[0, 1] > 0.95


def test_rounding_at_random_is_right_on_average_and_between_neighbours():
    """3 + 2⁻⁸ lies a quarter of the way from 3 to its neighbour 3 + 2⁻⁶; −0.0 and what bfloat16 has stay."""
    values = jnp.concatenate([jnp.full(4000, 3 + 2.0**-8), jnp.full(4000, -3 - 2.0**-8), jnp.array([1.5, -0.0, 1e18])])
    params, sgd = {"weight": jnp.zeros(values.shape, jnp.bfloat16)}, optax.sgd(1.0)

    def linear(params: Any, rows: Any, _: Any) -> Any:
        return -jnp.sum(params["weight"] * rows[0]), {}

    step = jax.jit(make_gradient_step(Loss(parameters, linear), sgd, MicroBatches()))
    state = optimizer_state(params, sgd, "stochastic", jax.random.key(0))
    (stored, after), _ = step((params, state), values[None], None)
    got = np.asarray(stored["weight"], np.float64)
    up, down = got[:4000], got[4000:8000]
    assert set(up) == {3.0, 3 + 2.0**-6} and set(down) == {-3.0, -3 - 2.0**-6}
    for side in (up, -down):
        assert np.mean(side > 3) == pytest.approx(0.25, abs=0.03)
    np.testing.assert_array_equal(got[8000:8002], [1.5, 0.0])
    assert np.isfinite(got).all()
    (again, _), _ = step((params, after), values[None], None)  # with noise of its own
    assert np.mean(np.asarray(again["weight"]) != np.asarray(stored["weight"])) > 0.2


def test_float32_parameters_have_no_copy(lively_params, tiny_config):
    params = lively_params(Transformer(tiny_config()))
    choices: tuple[Rounding, ...] = ("master", "stochastic", "nearest")
    for rounding in choices:
        state = make_train_state(params, ADAMW, 0, rounding=rounding)
        assert jax.tree.structure(state.opt_state) == jax.tree.structure(ADAMW.init(params))


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_weight_gradients_leave_their_product_in_float32(param_dtype, tiny_config, lively_params, make_rollout):
    """Sums over tokens have more digits than bfloat16, in which they were rounded before; those of biases, too."""
    settings: dict[str, Any] = {"attention_bias": True, "mlp_bias": True, "qk_norm": True, "tie_embeddings": False}
    model = Transformer(tiny_config(dtype="bfloat16", param_dtype=param_dtype, **settings))
    params = lively_params(model)

    loss = Loss(Scorer(model), lambda scores, rows, normalizer: (jnp.mean(scores.logprobs), {}))

    momentum = optax.trace(decay=0.0)  # its state is the gradient
    step = jax.jit(make_gradient_step(loss, momentum, MicroBatches()))
    state = optimizer_state(params, momentum, "nearest", jax.random.key(0))
    rows = rows_of(make_rollout(group=16))
    few = rows._replace(prompt=rows.prompt % 3, completion=rows.completion % 3)  # so that embeddings sum over tokens
    (_, (gradient,)), _ = step((params, state), few, None)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        values = np.asarray(leaf)
        assert values.dtype == np.float32
        nonzero = values[values != 0]
        representable = np.asarray(nonzero.astype(jnp.bfloat16), np.float32) == nonzero
        assert representable.mean() < 0.2, path  # by chance one in 2¹⁶ would be


# ---------------------------------------------------------------- everything that has parameters


def test_only_what_adapters_leave_narrow_has_a_copy(tiny_config, lively_params):
    """Adapters are float32 already; a head beside them is not, and has one."""
    lora = Transformer(tiny_config(param_dtype="bfloat16", lora=LoraConfig(rank=2)))
    params = lively_params(lora)
    assert not isinstance(make_train_state(params, ADAMW, 0).opt_state, MasterCopy)
    with_head = ScoreModel(lora).from_trunk(params, jax.random.key(1))
    state = make_train_state(with_head, ADAMW, 0)
    assert isinstance(state.opt_state, MasterCopy)
    assert set(state.opt_state.master) == {"layers", "score_head"}


def test_a_critic_of_its_own_has_a_copy_of_its_own(tiny_config, lively_params, make_rollout):
    model = Transformer(tiny_config(param_dtype="bfloat16"))
    score_model = ScoreModel(model)
    critic = Critic(score_model, ADAMW)
    params = lively_params(model)
    own = score_model.from_trunk(jax.tree.map(jnp.array, params), jax.random.key(1))
    algorithm = presets.ppo()
    step = jax.jit(make_update_step(model, ADAMW, algorithm, critic=critic), donate_argnums=0)
    copied = jax.tree.map(jnp.array, params)
    state = make_train_state(copied, ADAMW, 0, algorithm=algorithm, critic=critic, critic_params=own)
    state, _ = step(state, make_rollout(), REWARDS, params)
    for part in (state, state.critic):
        assert part is not None
        assert_is_the_rounded_copy(part.params, part.opt_state)
    assert state.critic is not None
    moved = flat(state.critic.opt_state.master) - flat(score_model.from_trunk(params, jax.random.key(1)))
    assert np.mean(moved != 0) > 0.9


def test_an_offline_objective_and_a_skipped_step(tiny_config, lively_params, make_rollout):
    """A loss that is not finite leaves copy and parameters as they are, bit by bit."""
    model = Transformer(tiny_config(param_dtype="bfloat16"))
    rows = rows_of(make_rollout())
    step = jax.jit(make_offline_step(model, ADAMW, SupervisedObjective(), plan=MicroBatches(2)))
    begun = make_train_state(lively_params(model), ADAMW, 0)
    state, _ = step(begun, rows)
    assert_is_the_rounded_copy(state.params, state.opt_state)
    assert np.mean(flat(state.opt_state.master) != flat(begun.opt_state.master)) > 0.9
    broken = state.replace(
        params=state.params | {"final_norm": {"scale": state.params["final_norm"]["scale"] * np.nan}}
    )
    after, metrics = step(broken, rows)
    assert metrics["frac_steps_skipped"] == 1
    chex.assert_trees_all_equal(after.opt_state, state.opt_state)


def test_a_trust_region_starts_from_the_copy_and_moves_it(tiny_config, lively_params, make_rollout):
    model = Transformer(tiny_config(param_dtype="bfloat16"))
    region = TrustRegionConfig(max_kl=1e-4, cg_iterations=2, tries=4)
    step = jax.jit(make_trust_region_step(model, presets.dapo(), region))
    state = make_train_state(lively_params(model), optax.identity(), 0)
    begun = flat(state.opt_state.master)
    state, metrics = step(state, make_rollout(), REWARDS)
    assert_is_the_rounded_copy(state.params, state.opt_state)
    assert metrics["trpo/accepted"] == 1 and 0 < metrics["trpo/kl"] <= 1e-4
    assert np.mean(flat(state.opt_state.master) != begun) > 0.9
    broken = REWARDS.copy()
    broken[0, 0] = np.nan
    after, _ = step(state, make_rollout(), broken)
    chex.assert_trees_all_equal((after.params, after.opt_state), (state.params, state.opt_state))


def test_a_copy_lies_where_its_parameters_do(mesh_config, tiny_config):
    mesh, model = make_mesh(mesh_config), Transformer(tiny_config(param_dtype="bfloat16"))
    state = abstract_train_state(model, ADAMW, mesh)
    assert isinstance(state.opt_state, MasterCopy)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (state.params, state.opt_state.master))
    jax.tree.map(lambda one, other: pytest.fail(f"{one} is not {other}") if one != other else None, *shardings)
    key = abstract_train_state(model, ADAMW, mesh, rounding="stochastic").opt_state.key
    assert key.sharding.is_fully_replicated


def test_what_is_stored_has_the_derivative_of_what_is_not():
    x = jnp.float32(1 + 2.0**-12)
    value, gradient = jax.jit(jax.value_and_grad(lambda x: as_stored(x, jnp.bfloat16) * (1 + 2.0**-12)))(x)
    assert float(value) == 1 + 2.0**-12
    assert float(gradient) == 1 + 2.0**-12
