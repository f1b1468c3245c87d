"""What papers say of their algorithms can be seen here, beside the same algorithm without its distinguishing part.

- DAPO's higher upper clip keeps entropy that GRPO's symmetric clip loses (Yu et al. 2025, 2503.14476), since it is
  rare tokens that the upper clip holds back.
- GRPO's division by a completion's own length makes wrong answers longer and right ones shorter; Dr. GRPO's constant
  does neither (Liu et al. 2025, 2503.20783).
- GSPO clips whole completions, GRPO single tokens (Zheng et al. 2025, 2507.18071).
- The gradients of RLOO (Ahmadian et al. 2024, 2402.14740) and of ReMax (Li et al. 2023, 2310.10505) have a lower
  variance than that of REINFORCE (Williams 1992), and the same mean.

Of the other claims, TRPO's bound on the divergence is tested in `tests/algorithms/trust_region/test_step.py`, dynamic
sampling, which leaves no group without a signal, in `tests/training/test_trainer_parts.py`, KTO's learning from
unbalanced labels and ORPO's from no reference in `tests/integration/test_preference_learning.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from jaxrl_llm.advantages import EmaBaseline
from jaxrl_llm.algorithms.batching import UpdateConfig
from jaxrl_llm.algorithms.interfaces import Advantage, Credit, Feedback, Signals
from jaxrl_llm.algorithms.policy_gradient.objective import LearnerBatch, PolicyGradient
from jaxrl_llm.algorithms.policy_gradient.presets import dr_grpo, gspo, reinforce, remax, rloo
from jaxrl_llm.algorithms.policy_gradient.presets import grpo as grpo_with_kl
from jaxrl_llm.algorithms.policy_gradient.sequence_surrogates import SequenceClipped
from jaxrl_llm.algorithms.policy_gradient.shaped_estimators import ReinforceAdvantage
from jaxrl_llm.algorithms.policy_gradient.surrogates import Clipped
from jaxrl_llm.algorithms.policy_gradient.update import make_update_step
from jaxrl_llm.algorithms.state import make_train_state
from jaxrl_llm.logprobs import TokenScores
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.rows import PaddedLayout
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import make_mesh
from jaxrl_llm.types import Rollout

pytestmark = pytest.mark.whole_run

VOCABULARY = 16


def grpo(**changes: object) -> PolicyGradient:
    """GRPO without its KL, which has nothing to do with what is shown here."""
    return dataclasses.replace(grpo_with_kl(), kl_coef=0.0, **changes)


SYMMETRIC, HIGHER = grpo(), grpo(surrogate=Clipped(clip_high=0.28))
"""They differ in nothing else."""


def loss_of_tokens(
    algorithm: PolicyGradient,
    logprobs: jax.Array,
    old_logprobs: jax.Array | None,
    advantages: jax.Array,
    mask: np.ndarray,
) -> jax.Array:
    """The algorithm's loss of completions `[P, G, T]`, as a function of the log-probs of their tokens."""
    prompts, nothing = len(mask), jnp.zeros(mask.shape, jnp.int32)
    batch = LearnerBatch(
        prompt=nothing[:, 0],
        prompt_lengths=jnp.ones(prompts, jnp.int32),
        completion=nothing,
        mask=jnp.asarray(mask),
        advantages=advantages,
        sampler_logprobs=logprobs,
        seeds=jnp.zeros(prompts, jnp.uint32),
        old_logprobs=old_logprobs,
    )
    scores = TokenScores(logprobs, jnp.zeros(mask.shape))
    return algorithm.loss(scores, batch, algorithm.normalizer(batch.mask))[0]


def advantages_of(algorithm: PolicyGradient, rewards: np.ndarray, mask: np.ndarray) -> jax.Array:
    signals = Signals(
        rewards=jnp.asarray(rewards),
        token_rewards=None,
        mask=jnp.asarray(mask),
        finished=jnp.ones(rewards.shape, bool),
        feedback=Feedback(rewards),
    )
    return algorithm.advantage(signals, algorithm.advantage.start()).advantages


# ---- DAPO's higher clip keeps entropy ----------------------------------------------------------------


def chance_after_one_batch(algorithm: PolicyGradient, chance: float) -> float:
    """What becomes of the chance of a token that did well, after as many optimizer steps as one likes."""
    start = jnp.log(jnp.array([chance, 1 - chance]))
    one_token = np.ones((1, 1, 1), bool)

    def loss(logits: jax.Array) -> jax.Array:
        logprob = jax.nn.log_softmax(logits)[:1].reshape(1, 1, 1)
        return loss_of_tokens(algorithm, logprob, start[:1].reshape(1, 1, 1), jnp.ones((1, 1)), one_token)

    step = jax.grad(loss)
    logits = jax.lax.fori_loop(0, 8000, lambda _, logits: logits - 0.002 * step(logits), start)
    return float(jax.nn.softmax(logits)[0])


def test_the_upper_clip_holds_rare_tokens_back_and_common_ones_never():
    """The paper's own example: of 0.01 a batch makes at most 0.012, of 0.9 as much as it likes."""
    assert chance_after_one_batch(SYMMETRIC, 0.01) == pytest.approx(0.012, rel=0.01)
    assert chance_after_one_batch(HIGHER, 0.01) == pytest.approx(0.0128, rel=0.01)
    assert chance_after_one_batch(SYMMETRIC, 0.9) > 0.95
    assert chance_after_one_batch(SYMMETRIC, 0.9) == chance_after_one_batch(HIGHER, 0.9)


def inclined(model: Transformer, context: np.ndarray, seed: int) -> Params:
    """A policy that says token 0 seven times in ten, and any other as often as another."""
    params = jax.jit(model.init)(jax.random.key(seed))
    nothing = np.zeros((1, 1, 1), np.int32)
    hidden = model.hidden(params, PaddedLayout.of(context[:1], np.ones(1, np.int32), nothing))[0, 0, 0]
    logits = jnp.zeros(VOCABULARY).at[0].set(np.log(0.7 / 0.3 * (VOCABULARY - 1)))
    head = params["lm_head"]["weight"]
    head += jnp.outer(logits - head @ hidden, hidden / (hidden @ hidden))
    return params | {"lm_head": {"weight": head}}


def collapse(train, model: Transformer, algorithm: PolicyGradient, seed: int) -> tuple[float, float]:
    """Entropy and share of right answers in the last ten steps.

    Eight of sixteen tokens are right, so that a policy has no reason to keep to one of them. Rewards are noisy, as they
    are where most tokens have no part in the outcome; a batch is used for sixteen optimizer steps, so that clips bind.
    """
    context, numbers, right = np.full((32, 1), 1), np.random.default_rng(seed), []

    def reward(rollout: Rollout) -> np.ndarray:
        is_right = np.asarray(rollout.completion[..., 0]) < VOCABULARY // 2
        right.append(np.mean(is_right))
        return np.float32(is_right + 4 * numbers.standard_normal(is_right.shape))

    history = train(
        algorithm,
        model,
        reward=reward,
        params=inclined(model, context, seed),
        prompts=context,
        max_tokens=1,
        stop_tokens=(),
        plan=UpdateConfig(epochs=16),
        learning_rate=1e-3,
        steps=30,
        seed=seed,
    )
    assert np.mean(right[:2]) < 0.9, right
    return float(np.mean([metrics["entropy"] for metrics in history[-10:]])), float(np.mean(right[-10:]))


@pytest.mark.slow
def test_a_higher_upper_clip_keeps_entropy(tiny_config, train):
    model = Transformer(tiny_config(vocab_size=VOCABULARY, num_layers=1, tie_embeddings=False))
    entropy, right = collapse(train, model, SYMMETRIC, seed=0)
    entropy_higher, right_higher = collapse(train, model, HIGHER, seed=0)
    assert min(right, right_higher) > 0.95
    assert entropy_higher > 1.2 * entropy


# ---- Dr. GRPO does not lengthen wrong answers --------------------------------------------------------


def test_how_hard_a_wrong_token_is_pushed_depends_on_its_completions_length_with_grpo_alone():
    lengths = np.array([[3, 1, 2, 4, 8]])
    mask = np.arange(8) < lengths[..., None]
    rewards = np.float32([[1, 0, 0, 0, 0]])
    logprobs = -jnp.asarray(np.random.default_rng(0).exponential(size=mask.shape), jnp.float32)

    def push(algorithm: PolicyGradient) -> list[np.ndarray]:
        """On each wrong completion's tokens: how much a step of the gradient lowers their log-probs."""
        advantages = advantages_of(algorithm, rewards, mask)
        of_logprobs = jax.grad(lambda logprobs: loss_of_tokens(algorithm, logprobs, None, advantages, mask))(logprobs)
        return [np.asarray(of_logprobs[0, g, :length]) for g, length in list(enumerate(lengths[0]))[1:]]

    by_own_length, by_constant = push(grpo()), push(dr_grpo())
    assert min(np.min(tokens) for tokens in (*by_own_length, *by_constant)) > 0
    for tokens, of_constant, length in zip(by_own_length, by_constant, lengths[0, 1:], strict=True):
        np.testing.assert_allclose(tokens, by_own_length[0][0] / length, rtol=1e-6)
        np.testing.assert_allclose(of_constant, by_constant[0][0], rtol=1e-6)


@dataclasses.dataclass(frozen=True)
class AfterTheAnswer(Advantage):
    """What an estimator says, on all tokens but the first: what the answer is stays as it is."""

    inner: Advantage

    def __call__(self, signals: Signals, memory: tuple[()]) -> Credit:
        credit = self.inner(signals, memory)
        later = jnp.arange(signals.mask.shape[-1]) > 0
        return credit._replace(advantages=jnp.where(later, credit.advantages[..., None], 0.0))


def lengths_of(train, model: Transformer, algorithm: PolicyGradient, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean lengths of wrong and of right completions at each step.

    The first token alone decides whether a completion is right. It is not trained, so that there remain as many wrong
    ones as right ones; what is trained is how long they go on.
    """
    wrong, right = [], []

    def reward(rollout: Rollout) -> np.ndarray:
        is_right, lengths = np.asarray(rollout.completion[..., 0]) % 2 == 0, np.asarray(rollout.completion_lengths)
        wrong.append(np.mean(lengths[~is_right]))
        right.append(np.mean(lengths[is_right]))
        return np.float32(is_right)

    algorithm = dataclasses.replace(algorithm, advantage=AfterTheAnswer(algorithm.advantage))
    settings = {"group": 32, "max_tokens": 10, "stop_tokens": (0, 1, 2, 3), "learning_rate": 2e-3, "seed": seed}
    train(algorithm, model, reward=reward, **settings)
    return np.array(wrong), np.array(right)


@pytest.mark.slow
def test_wrong_answers_become_longer_than_right_ones_with_grpo_and_not_with_dr_grpo(tiny_config, train):
    model = Transformer(tiny_config(vocab_size=VOCABULARY, num_layers=1))
    by_own_length = dataclasses.replace(dr_grpo(), aggregation="seq-mean-token-mean")
    gaps = []
    for algorithm in (grpo(), by_own_length, dr_grpo()):
        wrong, right = lengths_of(train, model, algorithm, seed=0)
        assert abs(np.mean(wrong[:3] - right[:3])) < 0.5
        gaps.append(np.mean(wrong[-20:] - right[-20:]))
    assert min(gaps[:2]) > 1.5, gaps
    assert abs(gaps[2]) < 0.75, gaps


# ---- GSPO clips whole completions --------------------------------------------------------------------


@pytest.mark.parametrize("clip", [(0.2, 0.2), (3e-4, 4e-4)], ids=["GRPO's range", "GSPO's range"])
def test_gspo_clips_whole_completions_and_grpo_single_tokens(clip):
    """In the middle of the optimizer steps on a batch, when the policy has moved away from the one that sampled."""
    low, high = clip
    assert gspo().surrogate == SequenceClipped(clip_low=3e-4, clip_high=4e-4)
    by_completion = dataclasses.replace(gspo(), surrogate=SequenceClipped(clip_low=low, clip_high=high))
    by_token = grpo(surrogate=Clipped(clip_low=low, clip_high=high))
    rng = np.random.default_rng(0)
    mask = np.arange(8) < rng.integers(2, 9, (8, 8, 1))
    rewards = np.float32(rng.integers(0, 2, (8, 8)))
    advantages = advantages_of(by_token, rewards, mask)
    log_ratio = high * (rng.normal(size=(8, 8, 1)) + rng.normal(size=mask.shape))
    logprobs = -rng.exponential(size=mask.shape)
    old = jnp.asarray(logprobs - log_ratio, jnp.float32)

    def pushed(algorithm: PolicyGradient) -> np.ndarray:
        """The tokens that have a gradient."""
        gradient = jax.grad(lambda logprobs: loss_of_tokens(algorithm, logprobs, old, advantages, mask))
        tokens = np.asarray(gradient(jnp.asarray(logprobs, jnp.float32))) != 0
        assert not np.any(tokens & ~mask)
        return tokens

    def partly(tokens: np.ndarray) -> np.ndarray:
        """The completions of which some tokens have a gradient, and others do not."""
        return np.any(tokens, axis=-1) & np.any(mask & ~tokens, axis=-1)

    tokens = pushed(by_completion)
    assert not np.any(partly(tokens))
    assert np.mean(partly(pushed(by_token))) > 0.2
    # Clipped are the completions whose geometric mean ratio has gone too far to where the advantage drives it.
    ratio = np.exp(np.sum(log_ratio, axis=-1, where=mask) / np.sum(mask, axis=-1))
    clipped = np.where(rewards == 1, ratio > 1 + high, ratio < 1 - low)
    assert 0.1 < np.mean(clipped) < 0.9
    np.testing.assert_array_equal(~np.any(tokens, axis=-1), clipped)


# ---- RLOO and ReMax have gradients of lower variance than REINFORCE's --------------------------------

BATCHES, PROMPTS, GROUP = 64, 8, 8


def gradients_at(model: Transformer, seed: int) -> Callable[[PolicyGradient], np.ndarray]:
    """The gradients `[batches, parameters]` that an update follows, at one policy, of many batches of samples.

    A point for a first token that is even, and up to three more for the prompt alone. The same samples for all.
    """
    params = jax.jit(model.init)(jax.random.key(seed))
    sampler = Sampler(
        model,
        SamplingConfig(max_tokens=3),
        group=GROUP,
        stop_tokens=(0, 1, 2, 3),
        mesh=make_mesh(devices=jax.devices()[:1]),
        greedy=True,
    )
    prompts = np.tile(np.arange(PROMPTS)[:, None], (BATCHES, 1))
    key = jax.random.key_data(jax.random.key(seed + 1))
    rollout = sampler(params, prompts, np.ones(len(prompts), np.int32), key, 0)
    rewards = np.float32(np.asarray(rollout.completion[..., 0]) % 2 == 0) + np.float32(prompts % 4)
    batches = jax.tree.map(lambda x: x.reshape(BATCHES, PROMPTS, *x.shape[1:]), (rollout, rewards))
    optimizer = optax.sgd(1.0)  # whose step is the gradient

    def of(algorithm: PolicyGradient) -> np.ndarray:
        state = make_train_state(params, optimizer, seed=0, algorithm=algorithm)
        if isinstance(state.memory, EmaBaseline):  # one that has run for long
            state = state.replace(memory=EmaBaseline(jnp.float32(np.mean(rewards)), jnp.float32(1)))
        update = make_update_step(model, optimizer, algorithm)

        def gradient(batch: tuple[Rollout, jax.Array]) -> jax.Array:
            rollout, rewards = batch
            if not algorithm.needs_greedy:
                rollout, rewards = rollout.samples(None, -1), rewards[:, :-1]
            after, _ = update(state, rollout, rewards, params)
            return ravel_pytree(jax.tree.map(jnp.subtract, params, after.params))[0]

        return np.asarray(jax.jit(lambda batches: jax.lax.map(gradient, batches))(batches))

    return of


def total_variance(gradients: np.ndarray) -> float:
    """The trace of the covariance."""
    return float(np.sum(np.var(gradients, axis=0, ddof=1)))


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def test_rloo_and_remax_have_less_variance_than_reinforce_and_the_same_mean(tiny_config):
    gradients = gradients_at(Transformer(tiny_config(vocab_size=VOCABULARY, num_layers=1)), seed=0)
    plain = gradients(dataclasses.replace(reinforce(), advantage=ReinforceAdvantage()))
    # The mean reward of all prompts, though it is the best constant, says nothing of a prompt by itself.
    running, leave_one_out, greedy = gradients(reinforce()), gradients(rloo()), gradients(remax())
    assert total_variance(leave_one_out) < 0.1 * total_variance(plain)
    assert total_variance(greedy) < 0.2 * total_variance(plain)
    assert total_variance(leave_one_out) < 0.4 * total_variance(running)
    mean = np.mean(leave_one_out, axis=0)
    assert cosine(mean, np.mean(greedy, axis=0)) > 0.9
    assert cosine(mean, np.mean(running, axis=0)) > 0.8
    assert cosine(mean, np.mean(plain, axis=0)) > 0.3
