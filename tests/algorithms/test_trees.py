"""Training on trees: loss, gradient and metrics are those of the separate sequences; each token is computed once."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import chex
import jax
import numpy as np
import optax
import pytest

from jaxrl_llm.algorithms.batching import MicroBatches, cut
from jaxrl_llm.algorithms.offline import make_offline_evaluation, make_offline_step, make_reference_pass
from jaxrl_llm.algorithms.policy_gradient.given import GivenAdvantages
from jaxrl_llm.algorithms.policy_gradient.objective import LearnerBatch, PolicyGradient
from jaxrl_llm.algorithms.policy_gradient.presets import dapo, dr_grpo, gspo, kl_cov
from jaxrl_llm.algorithms.preference.objective import PreferenceBatch
from jaxrl_llm.algorithms.preference.presets import aot, dpo
from jaxrl_llm.algorithms.preference.unpaired import KTOObjective, UnpairedBatch
from jaxrl_llm.algorithms.score_models.process_reward import LabelledSteps, ProcessRewardObjective
from jaxrl_llm.algorithms.score_models.reward_model import Comparisons, RewardModelObjective, make_score_pass
from jaxrl_llm.algorithms.state import make_train_state
from jaxrl_llm.algorithms.supervised import Demonstrations, SupervisedObjective
from jaxrl_llm.data.trees import PackedTrees, pack_trees
from jaxrl_llm.losses import sft_loss
from jaxrl_llm.models.config import LayerKind, Params
from jaxrl_llm.models.heads import ScoreModel
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sharding import MeshConfig, make_mesh

SGD = optax.sgd(1.0)
TOKENS, ROWS = 48, 8
"""Of a row, in which about a third of the conversations find room; some rows stay empty."""


@dataclasses.dataclass(frozen=True)
class Conversations:
    """A system prompt, 4 prompts, 4 first turns each, 2 second turns each: 32 sequences; the model's words are trained.

    Between the two turns are the user's, the same for both second turns.
    """

    sequences: list[np.ndarray]
    trained: list[np.ndarray]

    @classmethod
    @functools.cache
    def made(cls, seed: int = 0) -> Conversations:
        rng = np.random.default_rng(seed)

        def words(least: int, most: int) -> np.ndarray:
            return rng.integers(1, 64, rng.integers(least, most + 1)).astype(np.int32)

        def spoken(*turns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            """Every second turn from the third one on is the model's."""
            marks = [np.full(len(turn), number in (2, 4)) for number, turn in enumerate(turns)]
            return np.concatenate(turns), np.concatenate(marks)

        system, made = words(6, 6), []
        for _ in range(4):
            prompt = words(2, 4)
            for _ in range(4):
                answer, reply = words(1, 4), words(1, 2)
                made += [spoken(system, prompt, answer, reply, words(1, 4)) for _ in range(2)]
        return cls(*(list(part) for part in zip(*made, strict=True)))

    @property
    def distinct(self) -> int:
        """Beginnings of sequences: the tokens of their trie."""
        return len({tuple(s[: n + 1].tolist()) for s in self.sequences for n in range(len(s))})

    def trees(self, tokens: int = TOKENS, rows: int | None = ROWS, group: int = 1) -> PackedTrees:
        return pack_trees(self.sequences, self.trained, tokens=tokens, rows=rows, group=group)

    def separate(self, group: int = 1) -> dict[str, Any]:
        """Prompts `[n, Tp]` and completions: each sequence by itself; of a group what the prompts lack is repeated."""
        first = [int(np.argmax(marks)) for marks in self.trained]
        first = [min(first[n // group * group : n // group * group + group]) for n in range(len(first))]
        spans = list(zip(self.sequences, self.trained, first, strict=True))
        prompts = [sequence[:start] for sequence, _, start in spans[::group]]
        own = [sequence[start:] for sequence, _, start in spans]
        return {
            "prompt": padded(prompts),
            "prompt_lengths": np.array([len(prompt) for prompt in prompts], np.int32),
            "completion": padded(own).reshape(len(prompts), group, -1),
            "mask": padded([marks[start:] for _, marks, start in spans]).reshape(len(prompts), group, -1),
        }

    def of_separate(self, values: list[np.ndarray]) -> np.ndarray:
        """Values of all tokens, `[n, 1, Tc]`."""
        return padded([v[int(np.argmax(m)) :] for v, m in zip(values, self.trained, strict=True)])[:, None]


def padded(arrays: list[np.ndarray]) -> np.ndarray:
    out = np.zeros((len(arrays), max(map(len, arrays))), arrays[0].dtype)
    for row, array in zip(out, arrays, strict=True):
        row[: len(array)] = array
    return out


@pytest.fixture(scope="module")
def model(tiny_config) -> Transformer:
    """A window shorter than a conversation, and a layer without rotary positions."""
    kinds = (LayerKind(5), LayerKind(rope=None))
    return Transformer(dataclasses.replace(tiny_config(logit_softcap=5.0), layer_kinds=kinds))


@pytest.fixture(scope="module")
def params(model, lively_params) -> Params:
    return lively_params(model)


def with_attention(model: Transformer, implementation: str) -> Transformer:
    return Transformer(dataclasses.replace(model.config, attention=implementation))


def step_once(
    model: Any, params: Params, objective: Any, rows: Any, plan: MicroBatches | None = None, reference: Any = None
) -> tuple[Params, dict[str, jax.Array]]:
    """The gradient, and the metrics."""
    step = jax.jit(make_offline_step(model, SGD, objective, plan))
    state, metrics = step(make_train_state(params, SGD, 0), rows, reference)
    return jax.tree.map(lambda old, new: old - new, params, state.params), metrics


def assert_same(trees: Any, separate: Any) -> None:
    (gradient, metrics), (expected, others) = trees, separate
    chex.assert_tree_all_finite(gradient)
    assert optax.tree.norm(expected) > 1e-2
    chex.assert_trees_all_close(gradient, expected, rtol=1e-5, atol=1e-5)
    metrics, others = ({k: v for k, v in of.items() if k != "perf/frac_tokens_useful"} for of in (metrics, others))
    chex.assert_trees_all_close(metrics, others, rtol=1e-5, atol=1e-5)


# ---- Each objective ------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
def test_supervised(implementation, model, params):
    """Each token once: a row that holds them all has the trie's tokens."""
    made, objective = Conversations.made(), SupervisedObjective(aggregation="seq-mean-token-mean")
    trees = made.trees(tokens=192, rows=None)
    assert trees.num_tokens == made.distinct < 0.5 * sum(map(len, made.sequences))
    of_trees = step_once(with_attention(model, implementation), params, objective, Demonstrations(**trees.texts))
    assert_same(of_trees, step_once(model, params, objective, Demonstrations(**made.separate())))
    np.testing.assert_allclose(of_trees[1]["perf/frac_tokens_useful"], made.distinct / 192, rtol=1e-6)


def test_logprobs_are_those_of_each_sequence_by_itself(model, params):
    """The plainest way: all logits of one sequence."""
    made = Conversations.made(1)
    trees = made.trees()
    found = jax.jit(make_reference_pass(model))(params, Demonstrations(**trees.texts))
    (loss, _), every = sft_loss(found, trees.mask), trees.by_sequence(found)
    logprobs = jax.nn.log_softmax(jax.jit(model.logits)(params, padded(made.sequences)))
    total = 0.0
    for number, (sequence, marks) in enumerate(zip(made.sequences, made.trained, strict=True)):
        at = np.flatnonzero(marks)
        expected = np.asarray(logprobs)[number, at - 1, sequence[at]]
        np.testing.assert_allclose(every[number][at - at[0]], expected, rtol=0, atol=1e-5)
        total += expected.sum()
    np.testing.assert_allclose(loss, -total / sum(map(np.sum, made.trained)), rtol=1e-5)


def clipped() -> PolicyGradient:
    return dataclasses.replace(dapo(), kl_coef=0.1, entropy_coef=0.01, mask_truncated=False, overlong=None)


@pytest.mark.parametrize(("preset", "by_token"), [(gspo, False), (clipped, True)])
def test_policy_gradients(preset, by_token, model, params, lively_params):
    """Rows in four pieces; log-probs of an earlier policy, by tokens, are those that the sampler would bring."""
    made, rng = Conversations.made(), np.random.default_rng(0)
    trees, separate, number = made.trees(), made.separate(), len(made.sequences)
    score = jax.jit(make_reference_pass(model, temperature=0.7))
    near = jax.tree.map(lambda x: x * (1 + 0.02 * rng.normal(size=x.shape).astype(np.float32)), params)
    old = np.asarray(score(near, Demonstrations(**separate)))
    at_trees = trees.of_sequences(old[:, 0])[..., : trees.mask.shape[-1]]
    advantages: Any = rng.normal(size=number)
    if by_token:
        advantages = [rng.normal(size=len(s)).astype(np.float32) for s in made.sequences]
    algorithm = preset()

    def batch(texts: dict[str, Any], given: Any, logprobs: Any) -> LearnerBatch:
        seeds: Any = np.zeros(len(logprobs), np.uint32)
        return LearnerBatch(**texts, advantages=given, sampler_logprobs=logprobs, old_logprobs=logprobs, seeds=seeds)

    of_trees, of_separate = trees.of_sequences, lambda values: np.asarray(values, np.float32)[:, None]
    if by_token:
        of_trees, of_separate = trees.of_tokens, made.of_separate
    batches = (
        batch(trees.texts, of_trees(advantages), at_trees),
        batch(separate, of_separate(advantages), old),
    )
    reference = lively_params(model, seed=1) if algorithm.kl_coef else None
    objective = GivenAdvantages(algorithm, temperature=0.7)
    plans = (MicroBatches(tokens_per_micro_batch=2 * TOKENS), None)
    results = [
        step_once(model, params, objective, rows, plan, reference) for rows, plan in zip(batches, plans, strict=True)
    ]
    assert float(results[0][1]["clip_ratio/region_mean"]) > 0
    assert_same(*results)


@pytest.mark.parametrize("form", ["trees", "packed"])
def test_answers_are_learned_beside_what_was_said(form, model, params):
    """ECHO: of the tokens between two turns the policy is to say nothing, and to know them."""
    made, rng = Conversations.made(), np.random.default_rng(0)
    answered = [np.zeros_like(marks) for marks in made.trained]
    for marks, own in zip(made.trained, answered, strict=True):
        first, last = np.flatnonzero(marks)[[0, -1]]
        own[first:last] = ~marks[first:last]
    assert any(map(np.any, answered))
    both = dataclasses.replace(made, trained=[a | b for a, b in zip(made.trained, answered, strict=True)])
    advantages: Any = rng.normal(size=len(made.sequences))

    def batch(texts: dict[str, Any], given: Any, tokens: Any) -> LearnerBatch:
        said, own = (np.asarray(tokens(marks), bool) for marks in (made.trained, answered))
        zeros, seeds = np.zeros(said.shape, np.float32), np.zeros(len(said), np.uint32)
        rows: Any = texts | {"mask": said, "observations": own, "sampler_logprobs": zeros, "seeds": seeds}
        return LearnerBatch(**rows, advantages=given)

    separate = batch(both.separate(), np.asarray(advantages, np.float32)[:, None], both.of_separate)
    plan, rows = MicroBatches(tokens_per_micro_batch=2 * TOKENS), separate
    if form == "trees":
        trees: Any = both.trees()
        rows = batch(trees.texts, trees.of_sequences(advantages), trees.of_tokens)
    objective = GivenAdvantages(PolicyGradient(), observation_coef=0.3)
    found = step_once(model, params, objective, rows, plan)
    assert_same(found, step_once(model, params, objective, separate))
    policy = step_once(model, params, GivenAdvantages(PolicyGradient()), separate)[1]
    logprobs = np.asarray(jax.jit(make_reference_pass(model))(params, Demonstrations(**both.separate())))
    of_answers = zip(logprobs[:, 0], np.asarray(separate.observations)[:, 0], strict=True)
    nll = [-row[own].mean() for row, own in of_answers if own.any()]
    np.testing.assert_allclose(found[1]["loss"] - policy["loss"], 0.3 * np.mean(nll), rtol=1e-4)
    with pytest.raises(ValueError, match=r"observation_coef=0.3 learns what was answered: pass rows with observations"):
        objective.normalizer(separate._replace(observations=None))


def test_a_constant_that_would_be_the_width_of_a_batch_is_refused():
    with pytest.raises(ValueError, match=r"max_length=None .* set max_length"):
        GivenAdvantages(dr_grpo())
    assert GivenAdvantages(dataclasses.replace(dr_grpo(), max_length=64)).algorithm.max_length == 64


def test_tokens_of_all_pieces_are_compared(model, params):
    """A surrogate that looks at the whole batch sees it, whatever the pieces."""
    made, rng = Conversations.made(), np.random.default_rng(0)
    trees, objective = made.trees(), GivenAdvantages(dataclasses.replace(kl_cov(), kl_coef=0.0))
    near = jax.tree.map(lambda x: x * 1.03, params)
    old = jax.jit(make_reference_pass(model))(near, Demonstrations(**trees.texts))
    advantages: Any = trees.of_sequences(rng.normal(size=len(made.sequences)))
    seeds: Any = np.zeros(len(trees.mask), np.uint32)
    rows = LearnerBatch(**trees.texts, advantages=advantages, sampler_logprobs=old, old_logprobs=old, seeds=seeds)
    assert_same(*(step_once(model, params, objective, rows, MicroBatches(pieces)) for pieces in (4, 1)))


@pytest.mark.parametrize("preset", [dpo, pytest.param(aot, marks=pytest.mark.slow)])
def test_preferences(preset, model, params, lively_params):
    """Pairs are the two second turns of a conversation; those of AOT are compared with all others."""
    made, reference = Conversations.made(), lively_params(model, seed=1)
    trees, separate = made.trees(group=2), made.separate(group=2)
    assert_same(
        step_once(model, params, preset(), PreferenceBatch(**trees.texts), MicroBatches(4), reference),
        step_once(model, params, preset(), PreferenceBatch(**separate), None, reference),
    )


@pytest.mark.slow
def test_unpaired(model, params, lively_params):
    made, reference = Conversations.made(), lively_params(model, seed=1)
    trees, labels = made.trees(), np.arange(32) % 3 == 0
    objective = KTOObjective(baseline="other_side")
    assert_same(
        step_once(
            model, params, objective, UnpairedBatch(**trees.texts, labels=trees.of_sequences(labels)), None, reference
        ),
        step_once(model, params, objective, UnpairedBatch(**made.separate(), labels=labels[:, None]), None, reference),
    )


def test_a_baseline_of_mismatched_completions(model, params, lively_params):
    """Each sample with the completion at 1 that its baseline is made of: both are in the trees."""
    made, reference = Conversations.made(), lively_params(model, seed=1)
    trees, labels = made.trees(group=2), np.arange(32).reshape(16, 2) % 3 == 0
    objective = KTOObjective()
    of_trees = UnpairedBatch(**trees.texts, labels=trees.of_sequences(labels.ravel()))
    of_separate = UnpairedBatch(**made.separate(group=2), labels=labels)
    assert_same(
        step_once(model, params, objective, of_trees, MicroBatches(4), reference),
        step_once(model, params, objective, of_separate, None, reference),
    )


@pytest.mark.parametrize("outputs", [1, 2], ids=["answers", "steps"])
def test_score_models(outputs, model, lively_params):
    made, group = Conversations.made(), 3 - outputs
    scores, trees, separate = ScoreModel(model, outputs=outputs), made.trees(group=group), made.separate(group)
    params = lively_params(scores)
    if outputs == 1:
        objective, rows = RewardModelObjective(), (Comparisons(**trees.texts), Comparisons(**separate))
    else:
        labels = [
            np.random.default_rng(n).uniform(size=len(s)).astype(np.float32) for n, s in enumerate(made.sequences)
        ]
        objective = ProcessRewardObjective()
        rows = (
            LabelledSteps(**trees.texts, labels=trees.of_tokens(labels)),
            LabelledSteps(**separate, labels=made.of_separate(labels)),
        )
    assert_same(*(step_once(scores, params, objective, one) for one in rows))


def test_scores_of_answers(model, lively_params):
    """Of what is scored and not trained, too, the layout is read."""
    made, scores = Conversations.made(), ScoreModel(model)
    params, trees = lively_params(scores), made.trees(group=2)
    score = jax.jit(make_score_pass(scores))
    found = score(params, Comparisons(**trees.texts))
    expected = np.ravel(score(params, Comparisons(**made.separate(group=2))))
    np.testing.assert_allclose(trees.by_sequence(found), expected, rtol=1e-5, atol=1e-5)


# ---- Pieces and devices --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "plan"),
    [
        (None, MicroBatches(4)),
        (None, MicroBatches(tokens_per_micro_batch=3 * TOKENS)),
        (MeshConfig(fsdp=8), MicroBatches(2)),
        (MeshConfig(fsdp=2, tensor=4), MicroBatches(tokens_per_micro_batch=TOKENS)),
        (MeshConfig(fsdp=2, context=4), MicroBatches(2)),
    ],
)
def test_pieces_and_devices_change_nothing(config, plan, model, params, whole):
    rows, expected = whole
    model = with_attention(model, "blockwise")
    mesh = None if config is None else make_mesh(config)
    placed = params if mesh is None else jax.device_put(params, model.shardings(mesh))
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        made = step_once(model, placed, SupervisedObjective(), rows, plan)
    assert_same(jax.device_get(made), expected)


@pytest.fixture(scope="module")
def whole(model, params) -> tuple[Demonstrations, Any]:
    """Trees in some of 16 rows, and their gradient in one piece."""
    rows = Demonstrations(**Conversations.made().trees(rows=16).texts)
    return rows, step_once(model, params, SupervisedObjective(), rows)


def test_rows_that_hold_nothing_are_not_computed(whole):
    rows, _ = whole
    in_use = int(np.any(~np.asarray(rows.layout.rows.is_padding), axis=1).sum())
    assert in_use < 8
    pieces = jax.jit(lambda rows: cut(rows, MicroBatches(tokens_per_micro_batch=TOKENS)).useful)(rows)
    assert float(pieces.count) == in_use * TOKENS and float(pieces.total) == Conversations.made().trees().num_tokens


def test_one_program_serves_trees_of_any_shape(model, params):
    step = jax.jit(chex.assert_max_traces(make_offline_step(model, SGD, SupervisedObjective(), MicroBatches(2)), n=1))
    state = make_train_state(params, SGD, 0)
    for seed in range(3):
        made = Conversations.made(seed)
        trees = pack_trees(made.sequences, made.trained, tokens=TOKENS, rows=ROWS, groups_per_row=16, width=12)
        _, metrics = step(state, Demonstrations(**trees.texts))
        assert np.isfinite(float(metrics["loss"])) and float(metrics["grad_norm"]) > 0


def test_held_out_trees(model, params):
    made = Conversations.made()
    evaluate = jax.jit(make_offline_evaluation(model, SupervisedObjective()))
    of_trees, separate = (
        evaluate(params, Demonstrations(**texts))[0] for texts in (made.trees().texts, made.separate())
    )
    np.testing.assert_allclose(of_trees, separate, rtol=1e-5)


def test_turns_train_once_each(model, params):
    """With parents a turn is trained where it was spoken: its context and its words are a sequence by itself."""
    rng = np.random.default_rng(0)
    turns = [rng.integers(1, 64, rng.integers(1, 6)) for _ in range(9)]
    parents, speaks = [-1, 0, 1, 1, 3, 0, 5, 5, -1], [False, False, True, True, True, False, True, True, False]
    trained = [np.full(len(turn), own) for turn, own in zip(turns, speaks, strict=True)]
    contexts: list[np.ndarray] = []
    for turn, parent in zip(turns, parents, strict=True):
        contexts.append(np.concatenate([contexts[parent] if parent >= 0 else turn[:0], turn]))
    spoken = np.flatnonzero(speaks)
    separate = Demonstrations(
        prompt=padded([contexts[parents[n]].astype(np.int32) for n in spoken]),
        prompt_lengths=np.array([len(contexts[parents[n]]) for n in spoken], np.int32),
        completion=padded([turns[n].astype(np.int32) for n in spoken])[:, None],
        mask=padded([trained[n] for n in spoken])[:, None],
    )
    trees = pack_trees(turns, trained, parents=parents, tokens=64)
    assert trees.num_tokens == sum(map(len, turns[:-1]))
    assert_same(
        *(step_once(model, params, SupervisedObjective(), x) for x in (Demonstrations(**trees.texts), separate))
    )


def test_what_cannot_be_dealt_raises():
    rows = Demonstrations(**Conversations.made().trees().texts)
    with pytest.raises(ValueError, match=r"8 rows of tokens cannot be dealt to update\.micro_batches=3 × 1 row"):
        cut(rows, MicroBatches(3))
    with pytest.raises(ValueError, match=r"tokens_per_micro_batch=47 is less than the 48 tokens of a row"):
        cut(rows, MicroBatches(tokens_per_micro_batch=47))
    with (
        jax.set_mesh(make_mesh(MeshConfig(fsdp=8))),
        pytest.raises(ValueError, match=r"micro_batches=2 × 8 row shards"),
    ):
        cut(rows, MicroBatches(2))
