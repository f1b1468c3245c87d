"""Completions packed into rows of tokens: where they lie, and that loss, gradient and metrics are those of padding."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.algorithms.batching import MicroBatches, UpdateConfig, cut
from jaxrl_llm.algorithms.interfaces import Feedback
from jaxrl_llm.algorithms.offline import make_offline_step
from jaxrl_llm.algorithms.packing import pack
from jaxrl_llm.algorithms.policy_gradient.critic import Critic
from jaxrl_llm.algorithms.policy_gradient.objective import PolicyGradient
from jaxrl_llm.algorithms.policy_gradient.presets import POLICY_GRADIENTS, dppo, grpo, kl_cov, ppo
from jaxrl_llm.algorithms.policy_gradient.update import make_update_step
from jaxrl_llm.algorithms.preference import presets as offline
from jaxrl_llm.algorithms.preference.objective import PreferenceBatch
from jaxrl_llm.algorithms.preference.online import OnlinePreference, make_online_preference_step
from jaxrl_llm.algorithms.preference.unpaired import UnpairedBatch
from jaxrl_llm.algorithms.score_models.process_reward import LabelledSteps, ProcessRewardObjective
from jaxrl_llm.algorithms.score_models.reward_model import Comparisons, RewardModelObjective
from jaxrl_llm.algorithms.scorer import Scorer
from jaxrl_llm.algorithms.state import make_train_state
from jaxrl_llm.algorithms.supervised import Demonstrations, SupervisedObjective
from jaxrl_llm.algorithms.trust_region.step import TrustRegionConfig, make_trust_region_step
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.heads import ScoreModel
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sharding import MeshConfig, make_mesh
from jaxrl_llm.types import Rollout

SGD = optax.sgd(1.0)
TOKENS = 23
"""Of a row: prompts of up to 5 and completions of up to 6 tokens leave room for about three."""


# ---- Where tokens lie ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Texts:
    """Ragged prompts and completions, some of them without tokens."""

    prompt: np.ndarray
    prompt_lengths: np.ndarray
    completion: np.ndarray
    lengths: np.ndarray

    @classmethod
    def random(
        cls, seed: int, prompts: int = 5, group: int = 4, prompt_width: int = 5, width: int = 6, common: int = 0
    ) -> Texts:
        """All prompts begin with the same `common` tokens; if the seed is odd, some may end before."""
        rng = np.random.default_rng(seed)
        prompt = rng.integers(1, 64, (prompts, prompt_width))
        prompt[:, :common] = prompt[0, :common]
        return cls(
            prompt,
            rng.integers(1 if seed % 2 else common + 1, prompt_width + 1, prompts),
            rng.integers(1, 64, (prompts, group, width)),
            rng.integers(0, width + 1, (prompts, group)) * (rng.random((prompts, group)) < 0.8),
        )

    def pack(self, tokens: int, **options: bool) -> Any:
        arrays = (self.prompt, self.prompt_lengths, self.completion, self.lengths)
        return jax.jit(lambda *arrays: pack(*map(jnp.asarray, arrays), tokens=tokens, **options))(*arrays)


def beginning(texts: Texts) -> int:
    """How many tokens all prompts have in common, if each keeps one at least."""
    common = 0
    while all(texts.prompt_lengths > common + 1) and len(set(texts.prompt[:, common])) == 1:
        common += 1
    return common


def plain_rows(texts: Texts, tokens: int, whole_groups: bool) -> list[list[tuple[int, int]]]:
    """Which completions lie in which row, one after the other: the longest of a prompt first, where there is room."""
    rows: list[list[tuple[int, int]]] = []
    common = beginning(texts)

    def used(row: list[tuple[int, int]]) -> int:
        prompts = sum(texts.prompt_lengths[p] - common for p in {p for p, _ in row})
        return common + prompts + sum(texts.lengths[at] for at in row)

    def room(parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
        for row in rows:
            if used([*row, *parts]) <= tokens:
                return row
        rows.append([])
        return rows[-1]

    for p, lengths in enumerate(texts.lengths):
        parts = [(p, int(g)) for g in np.argsort(-lengths, kind="stable") if lengths[g]]
        for some in [parts] if whole_groups and parts else [[part] for part in parts]:
            room(some).extend(some)
    return rows


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("tokens", "whole_groups"), [(11, False), (17, False), (64, False), (29, True), (64, True)])
@pytest.mark.parametrize("begins", [0, 3])
def test_rows_are_those_of_a_loop(seed, tokens, whole_groups, begins):
    texts = Texts.random(seed, common=begins)
    common = beginning(texts)
    assert common <= begins and (common == begins or seed % 2)
    packing = texts.pack(tokens, whole_groups=whole_groups)
    expected = plain_rows(texts, tokens, whole_groups)
    assert packing.count == len(expected)
    for number, completions in enumerate(expected):
        assert {tuple(at) for at in np.argwhere(packing.holds(number))} == set(completions)
        layout = packing.layout(number)
        row, parent = jax.tree.map(lambda x: np.asarray(x)[0], (layout.rows, layout.parent))
        place, seen = common, np.zeros((tokens, tokens), bool)
        np.testing.assert_array_equal(row.tokens[:place], texts.prompt[0, :place])
        np.testing.assert_array_equal(row.depth[:place], np.arange(place))
        seen[:place, :place] = np.tril(np.ones((place, place), bool))
        for p, g in completions:
            start = texts.prompt_lengths[p]
            if (p, g) == next(at for at in completions if at[0] == p):
                prompt = slice(place, place + start - common)
                np.testing.assert_array_equal(row.tokens[prompt], texts.prompt[p, common:start])
                np.testing.assert_array_equal(row.depth[prompt], np.arange(common, start))
                seen[prompt, :common] = True
                seen[prompt, prompt] = np.tril(np.ones((start - common, start - common), bool))
                place += start - common
            length = texts.lengths[p, g]
            own = slice(place, place + length)
            np.testing.assert_array_equal(row.tokens[own], texts.completion[p, g, :length])
            np.testing.assert_array_equal(row.depth[own], start + np.arange(length))
            np.testing.assert_array_equal(parent[own], [prompt.stop - 1, *range(place, place + length - 1)])
            np.testing.assert_array_equal(np.asarray(layout.place)[0, p, g, :length], np.arange(place, place + length))
            assert (np.asarray(layout.place)[0, p, g, length:] == -1).all()
            seen[own, :common] = True
            seen[own, prompt] = True
            seen[own, own] = np.tril(np.ones((length, length), bool))
            place += length
        seen[range(place, tokens), range(place, tokens)] = True  # padding
        key, query = np.meshgrid(np.arange(tokens), np.arange(tokens))
        np.testing.assert_array_equal((key <= query) & (query < row.end[None]), seen)


def test_what_is_packed_is_unpacked():
    texts = Texts.random(3)
    packing = texts.pack(TOKENS)
    layout, held = packing.layout(1), np.asarray(packing.holds(1))
    mask = held[..., None] & (np.arange(6) < texts.lengths[..., None])
    values = np.random.default_rng(0).normal(size=(*texts.completion.shape, 2)).astype(np.float32)
    packed = layout.pack(jnp.asarray(values))
    assert packed.shape == (1, TOKENS, 2) and np.count_nonzero(packed.any(-1)) == mask.sum()
    np.testing.assert_array_equal(layout.unpack(packed), np.where(mask[..., None], values, 0))
    np.testing.assert_array_equal(layout.unpack(layout.targets)[mask], texts.completion[mask])
    gradient = jax.grad(lambda x: jnp.sum(layout.unpack(x) * values))(jnp.zeros_like(packed))
    np.testing.assert_array_equal(gradient, packed)
    back = jax.grad(lambda x: jnp.sum(layout.pack(x) * packed))(jnp.zeros_like(values))
    np.testing.assert_array_equal(back, np.where(mask[..., None], values, 0))


def test_a_row_that_may_be_too_short_raises():
    with pytest.raises(ValueError, match=r"tokens_per_micro_batch=10 .* up to 5 tokens and 6 tokens .* raise it to 11"):
        Texts.random(0).pack(10)
    with pytest.raises(ValueError, match=r"micro_batches=2 with update\.tokens_per_micro_batch=64"):
        UpdateConfig(micro_batches=2, tokens_per_micro_batch=64)
    with pytest.raises(ValueError, match=r"update\.tokens_per_micro_batch=0"):
        MicroBatches(tokens_per_micro_batch=0)


def test_pieces_of_a_batch_that_do_not_fit_are_told_by_what_was_set():
    plan = UpdateConfig(minibatches=2)
    with pytest.raises(ValueError, match=r"samples cannot .* update\.minibatches=2 × update\.micro_batches=1 × 4 row"):
        plan.of_batch.group_split(3, 1, 4)
    with pytest.raises(ValueError, match=r"update\.minibatches=2 × update\.micro_batches=1 × 2 row"):
        plan.of_batch.row_pieces(3, 10, 2)


# ---- Loss, gradient and metrics ------------------------------------------------------------------


@pytest.fixture(scope="module")
def rollout(make_rollout) -> Rollout:
    return make_rollout(prompts=6, group=4, seed=5)


@pytest.fixture(scope="module")
def model(tiny_config) -> Transformer:
    return Transformer(tiny_config(logit_softcap=5.0, num_layers=1))


@pytest.fixture(scope="module")
def params(model, lively_params) -> tuple[Params, Params]:
    """Of the policy, and of its reference."""
    return lively_params(model), lively_params(model, seed=1)


def assert_same(made: list[tuple[Any, dict[str, jax.Array]]], initial: Any) -> None:
    """The change of two states, and their metrics."""
    (padded, metrics), (packed, others) = made
    gradients = [jax.tree.map(lambda old, new: old - new, initial, state) for state in (padded, packed)]
    chex.assert_tree_all_finite(gradients)  # a comparison takes two NaNs for equal
    assert optax.tree.norm(gradients[0]) > 1e-4
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradients[0]))
    chex.assert_trees_all_close(*gradients, rtol=0, atol=1e-5 * max(1.0, largest))
    assert metrics.keys() == others.keys()
    if useful := metrics.pop("perf/frac_tokens_useful", None):
        assert useful < others.pop("perf/frac_tokens_useful")
    chex.assert_trees_all_close(metrics, others, rtol=2e-5, atol=1e-5)


def feedback(algorithm: PolicyGradient, shape: tuple[int, int]) -> Feedback:
    """All that any estimator reads."""
    rng = np.random.default_rng(2)
    needs, is_reference = algorithm.advantage.needs, np.zeros(shape, bool)
    is_reference[:, 1] = True
    verdicts = [rng.random(shape) < 0.5 for _ in range(2)] if "verdicts" in needs else [None, None]
    return Feedback(
        rng.integers(0, 2, shape).astype(np.float32),
        greedy=rng.normal(size=shape[0]).astype(np.float32) if "greedy" in needs else None,
        by_function=rng.normal(size=(*shape, 2)).astype(np.float32) if "by_function" in needs else None,
        is_reference=is_reference if "verdicts" in needs else None,
        preferred=verdicts[0],
        preferred_swapped=verdicts[1],
        reference_rewards=rng.random((shape[0], 3)).astype(np.float32) if "reference_rewards" in needs else None,
    )


PLANS: tuple[dict[str, int], ...] = ({}, {"tokens_per_micro_batch": TOKENS})


def marked(presets: Any, in_ci: tuple[str, ...]) -> list[Any]:
    """All presets by name; those that CI leaves out are marked."""
    return [pytest.param(p, marks=() if p.__name__ in in_ci else pytest.mark.slow, id=p.__name__) for p in presets]


def dppo_of_some_width() -> PolicyGradient:
    return dppo(0.1, 0.2)


ON_POLICY = [*(preset for preset in POLICY_GRADIENTS if preset is not ppo), dppo_of_some_width]


@pytest.mark.parametrize("preset", marked(ON_POLICY, ("grpo", "gspo", "kl_cov")))
def test_on_policy_presets(preset, model, params, rollout):
    """Two minibatches, if the loss has a ratio."""
    algorithm = preset()
    state = make_train_state(params[0], SGD, 0, algorithm=algorithm)
    given, made = feedback(algorithm, rollout.completion_lengths.shape), []
    for pieces in PLANS:
        plan = UpdateConfig(minibatches=1 if algorithm.surrogate.on_policy else 2, **pieces)
        after, metrics = jax.jit(make_update_step(model, SGD, algorithm, plan))(state, rollout, given, params[1])
        made.append((after.params, metrics))
    assert_same(made, params[0])


@pytest.mark.parametrize("mode", ["group-mean-token-mean", "seq-mean-token-sum-norm"])
@pytest.mark.parametrize("tokens", [TOKENS, 29])
def test_groups_in_one_row_or_not(mode, tokens, model, params, rollout):
    """A group fits into 29 tokens, and not into 23: then the loss is taken of the scores of all rows."""
    algorithm = PolicyGradient(aggregation=mode)
    state = make_train_state(params[0], SGD, 0)
    rewards, made = feedback(algorithm, rollout.completion_lengths.shape).rewards, []
    for plan in (UpdateConfig(), UpdateConfig(tokens_per_micro_batch=tokens)):
        after, metrics = jax.jit(make_update_step(model, SGD, algorithm, plan))(state, rollout, rewards)
        made.append((after.params, metrics))
    assert_same(made, params[0])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("preset", [grpo, kl_cov])
def test_all_in_one_row(preset, masked, model, params, rollout):
    """A row that holds whatever may come is computed without a loop, also where nothing is read."""
    algorithm = dataclasses.replace(preset(), mask_truncated=True)
    rollout = rollout.replace(finished=np.full(rollout.finished.shape, not masked))
    state = make_train_state(params[0], SGD, 0, algorithm=algorithm)
    given, made = feedback(algorithm, rollout.completion_lengths.shape), []
    (prompts, width), (*_, group, tokens) = rollout.prompt.shape, rollout.completion.shape
    for row in (TOKENS, prompts * (width + group * tokens)):
        step = jax.jit(make_update_step(model, SGD, algorithm, UpdateConfig(tokens_per_micro_batch=row)))
        after, metrics = step(state, rollout, given, params[1])
        made.append((after.params, metrics))
    (looped, metrics), (found, others) = made
    chex.assert_tree_all_finite(found)
    assert (float(metrics["grad_norm"]) > 1e-2) != masked
    chex.assert_trees_all_close(found, looped, rtol=0, atol=1e-5)
    useful = [float(each.pop("perf/frac_tokens_useful")) for each in (others, metrics)]
    assert useful == [0, 0] if masked else 0 < useful[0] < useful[1] <= 1
    chex.assert_trees_all_close(others, metrics, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("pieces", [{"micro_batches": 8}, {"tokens_per_micro_batch": TOKENS}], ids=str)
def test_tokens_of_the_whole_batch_where_groups_are_cut(pieces, model, params, rollout):
    """Prompts are fewer than pieces or devices, and the loss compares all tokens."""
    algorithm = dataclasses.replace(kl_cov(), kl_coef=0.0)
    state, mesh = make_train_state(params[0], SGD, 0), make_mesh(MeshConfig(fsdp=8))
    rewards, made = feedback(algorithm, rollout.completion_lengths.shape).rewards, []
    for plan in ({}, pieces):
        step = jax.jit(make_update_step(model, SGD, algorithm, UpdateConfig(**plan)))
        with jax.set_mesh(mesh) if "tokens_per_micro_batch" in plan else contextlib.nullcontext():
            made.append(jax.device_get(step(state, rollout, rewards)))
    (expected, metrics), (found, others) = ((after.params, metrics) for after, metrics in made)
    assert float(metrics["grad_norm"]) > 1e-2
    chex.assert_trees_all_close(found, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(others["loss"], metrics["loss"], rtol=1e-5, atol=1e-6)


def test_prompts_with_a_common_beginning(model, params, rollout):
    """A system prompt is computed once in a row, gradient included; each shard has its own."""
    prompt, algorithm, made = np.array(rollout.prompt), PolicyGradient(), []
    prompt[:, :3] = prompt[0, :3]
    rollout = rollout.replace(prompt=prompt, prompt_lengths=np.maximum(rollout.prompt_lengths, 4))
    arrays = (prompt, rollout.prompt_lengths, rollout.completion, rollout.completion_lengths)
    state = make_train_state(params[0], SGD, 0)
    rewards = feedback(algorithm, rollout.completion_lengths.shape).rewards
    for pieces in ({}, {"tokens_per_micro_batch": 40}):
        step = jax.jit(make_update_step(model, SGD, algorithm, UpdateConfig(**pieces)))
        after, metrics = step(state, rollout, rewards)
        made.append((after.params, metrics))
    computed = 40 * pack(*map(jnp.asarray, arrays), tokens=40).count
    needed = rollout.completion_lengths.sum() + (rollout.prompt_lengths - 3).sum() + 3
    np.testing.assert_allclose(made[1][1]["perf/frac_tokens_useful"], needed / computed, rtol=1e-6)
    assert_same(made, params[0])
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, tensor=4))):
        step = jax.jit(make_update_step(model, SGD, algorithm, UpdateConfig(tokens_per_micro_batch=40)))
        on_mesh, _ = step(state, rollout, rewards)
    chex.assert_trees_all_close(jax.device_get(on_mesh.params), made[0][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("own", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_critics(own, model, params, rollout, lively_params):
    scores = ScoreModel(model, lm_head=not own)
    # Completions that are cut off are in no loss, and yet in what advantages are whitened by.
    critic, algorithm = Critic(scores, SGD if own else None), dataclasses.replace(ppo(), mask_truncated=True)
    value_params = lively_params(scores, seed=3)
    policy_params = params[0] if own else params[0] | {"score_head": value_params["score_head"]}
    state = make_train_state(
        policy_params, SGD, 0, algorithm=algorithm, critic=critic if own else None, critic_params=value_params
    )
    rewards, made = feedback(algorithm, rollout.completion_lengths.shape).rewards, []
    for pieces in PLANS:
        plan = UpdateConfig(minibatches=2, **pieces)
        step = jax.jit(make_update_step(model, SGD, algorithm, plan, critic=critic))
        after, metrics = step(state, rollout, rewards, params[1])
        made.append(((after.params, after.critic and after.critic.params), metrics))
    assert_same(made, (policy_params, value_params if own else None))


@pytest.mark.parametrize(
    "fisher", ["gauss_newton", *(pytest.param(name, marks=pytest.mark.slow) for name in ("hessian", "sampled"))]
)
def test_trust_regions(fisher, model, params, rollout):
    """Also with a loss that compares groups, which do not fit into a row."""
    algorithm = PolicyGradient(aggregation="group-mean-token-mean" if fisher == "sampled" else "seq-mean-token-mean")
    region = TrustRegionConfig(fisher=fisher, cg_iterations=3, max_kl=1e-3)
    state = make_train_state(params[0], optax.identity(), 0)
    rewards, made = feedback(algorithm, rollout.completion_lengths.shape).rewards, []
    for pieces in PLANS:
        step = jax.jit(make_trust_region_step(model, algorithm, region, plan=MicroBatches(**pieces)))
        after, metrics = step(state, rollout, rewards)
        made.append((after.params, metrics))
    assert_same(made, params[0])


def test_online_preferences(model, params, rollout):
    state, made = make_train_state(params[0], SGD, 0), []
    rewards = np.random.default_rng(2).normal(size=rollout.completion_lengths.shape).astype(np.float32)
    for pieces in PLANS:
        plan = UpdateConfig(minibatches=2, **pieces)
        step = jax.jit(make_online_preference_step(model, SGD, OnlinePreference(), plan))
        after, metrics = step(state, rollout, rewards, params[1])
        made.append((after.params, metrics))
    assert_same(made, params[0])


def assert_offline_same(
    model: Any, objective: Any, rows: Any, initial: Params, reference: Params | None = None
) -> None:
    state, made = make_train_state(initial, SGD, 0), []
    for pieces in PLANS:
        step = jax.jit(make_offline_step(model, SGD, objective, plan=MicroBatches(**pieces)))
        after, metrics = step(state, rows, reference)
        made.append((after.params, metrics))
    assert_same(made, initial)


def of_rollout(rollout: Rollout, group: int) -> tuple[Any, ...]:
    part = rollout.samples(0, group)
    mask = np.array(part.mask)
    mask[2, -1] = False
    return part.prompt, part.prompt_lengths, part.completion, mask


OFFLINE = [made for made in vars(offline).values() if inspect.isfunction(made) and made.__module__ == offline.__name__]


@pytest.mark.parametrize("preset", marked(OFFLINE, ("dpo", "wpo", "kto")))
def test_offline_preferences(preset, model, params, rollout):
    objective, arrays = preset(), of_rollout(rollout, 2)
    if hasattr(objective, "pair_loss"):
        win_probs = np.random.default_rng(1).uniform(size=(6, 2)).astype(np.float32)
        rows = PreferenceBatch(*arrays, win_probs=win_probs)
    else:
        rows = UnpairedBatch(*arrays, labels=np.arange(12).reshape(6, 2) % 3 == 0)
    assert_offline_same(model, objective, rows, *params)


@pytest.mark.parametrize("objective", [SupervisedObjective(), SupervisedObjective("dft", "seq-mean-token-mean")])
def test_demonstrations(objective, model, params, rollout):
    """Some tokens amid a completion are read and not trained."""
    *texts, mask = of_rollout(rollout, 4)
    mask &= np.arange(6) % 3 != 1
    assert_offline_same(model, objective, Demonstrations(*texts, mask), params[0])


@pytest.mark.parametrize("group", [2, 4])
def test_reward_models(group, model, rollout, lively_params):
    scores = ScoreModel(model)
    rows = Comparisons(*of_rollout(rollout, group))
    assert_offline_same(scores, RewardModelObjective(), rows, lively_params(scores))


def test_process_reward_models(model, rollout, lively_params):
    scores = ScoreModel(model, outputs=2)
    *texts, mask = of_rollout(rollout, 4)
    labels = np.random.default_rng(3).uniform(size=mask.shape).astype(np.float32)
    rows = LabelledSteps(*texts, mask & (np.arange(6) % 2 == 0), labels)
    assert_offline_same(scores, ProcessRewardObjective(), rows, lively_params(scores))


# ---- One program, one result ---------------------------------------------------------------------


def test_one_program_serves_all_lengths(model, params, make_rollout):
    plan = UpdateConfig(tokens_per_micro_batch=TOKENS)
    step = jax.jit(chex.assert_max_traces(make_update_step(model, SGD, PolicyGradient(), plan), n=1))
    state = make_train_state(params[0], SGD, 0)
    for seed in range(3):
        rollout = make_rollout(prompts=6, group=4, seed=seed)
        step(state, rollout, np.random.default_rng(seed).normal(size=(6, 4)).astype(np.float32))


def test_a_batch_without_any_token_changes_nothing(model, params, rollout):
    rows = Demonstrations(rollout.prompt, rollout.prompt_lengths, rollout.completion, np.zeros((6, 4, 6), bool))
    step = jax.jit(
        make_offline_step(model, SGD, SupervisedObjective(), plan=MicroBatches(tokens_per_micro_batch=TOKENS))
    )
    after, metrics = step(make_train_state(params[0], SGD, 0), rows)
    chex.assert_trees_all_equal(after.params, params[0])
    assert float(metrics["loss"]) == float(metrics["grad_norm"]) == 0


def test_scores_of_a_batch_are_those_of_padding(model, params, rollout):
    rows = Demonstrations(rollout.prompt, rollout.prompt_lengths, rollout.completion, np.array(rollout.mask))
    scorer = Scorer(model)

    def scores(params: Params, plan: MicroBatches) -> Any:
        return cut(rows, plan).map(lambda _, texts: scorer(params, texts))

    padded = jax.jit(lambda p: scores(p, MicroBatches()))(params[0])
    packed = jax.jit(lambda p: scores(p, MicroBatches(tokens_per_micro_batch=TOKENS)))(params[0])
    chex.assert_trees_all_close(
        *(jax.tree.map(lambda x: np.where(rows.mask, x, 0), made) for made in (padded, packed)), rtol=0, atol=1e-5
    )
