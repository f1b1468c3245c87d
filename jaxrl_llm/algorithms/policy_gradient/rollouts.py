"""What the learner reads of a rollout: signals for the advantages, rows for the losses, and metrics."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_llm.advantages.group import zero_std_groups
from jaxrl_llm.algorithms.interfaces import Feedback, Signals
from jaxrl_llm.algorithms.policy_gradient.objective import LearnerBatch, PolicyGradient
from jaxrl_llm.masking import masked_var, segment_last
from jaxrl_llm.records import Max, Mean, Metrics
from jaxrl_llm.types import Rollout


def read_rollout(
    algorithm: PolicyGradient, rollout: Rollout, feedback: Feedback
) -> tuple[Signals, LearnerBatch, Metrics]:
    """What the estimator and the losses read of a rollout, as yet without any score, and the rollout's metrics."""
    rollout.check()
    if algorithm.keeps_mask and rollout.kept is None:
        raise ValueError(
            "algorithm.keep_sampling_mask=True reads which tokens each was drawn from, and this rollout has them not: "
            "sample it with Sampler(…, keep_mask=True) and sampling.top_k"
        )
    if algorithm.keeps_experts and rollout.experts is None:
        raise ValueError(
            f"algorithm.routing={algorithm.routing!r} reads which experts computed each token, and this rollout has "
            "them not: sample it with Sampler(…, keep_experts=True), of a model that has experts"
        )
    computed = _num_tokens(rollout)
    if algorithm.needs_greedy and feedback.greedy is None:
        rollout, feedback = _without_greedy(algorithm, rollout, feedback)
    shape, rewards = rollout.completion_lengths.shape, jnp.asarray(feedback.rewards)
    _check_rewards(rewards, rollout)
    for need, given in (
        ("greedy", feedback.greedy),
        ("by_function", feedback.by_function),
        ("verdicts", feedback.preferred),
        ("reference_rewards", feedback.reference_rewards),
        ("roles", feedback.roles),
        ("tasks", feedback.tasks),
    ):
        if need in algorithm.advantage.needs and given is None:
            raise ValueError(f"{type(algorithm.advantage).__name__} reads {need}: pass Feedback with it")
    if feedback.scored is not None and not algorithm.advantage.skips_unscored:
        raise ValueError(f"{type(algorithm.advantage).__name__} needs a reward of each sample: leave scored out")
    token_rewards = rollout.of_tokens(rewards) if rewards.ndim == 3 else None
    total, mask, lengths = rollout.of_completions(rewards), rollout.mask, rollout.completion_lengths
    if token_rewards is not None:  # the last one bears the penalty for length
        shaped = algorithm.shape(token_rewards, lengths[..., None], mask.shape[-1])
        token_rewards = jnp.where(segment_last(mask), shaped, token_rewards)
    signals = Signals(
        rewards=algorithm.shape(total, lengths, mask.shape[-1]),
        token_rewards=token_rewards,
        mask=mask,
        finished=rollout.finished,
        feedback=feedback,
        scored=feedback.scored,
        unshaped=total,
    )
    if algorithm.mask_truncated:
        mask &= rollout.finished[..., None]
    batch = LearnerBatch(
        prompt=rollout.prompt,
        prompt_lengths=rollout.prompt_lengths,
        completion=rollout.completion,
        mask=mask,
        advantages=signals.rewards,
        sampler_logprobs=rollout.sampler_logprobs,
        seeds=jnp.zeros(shape[:1], jnp.uint32),
        model_logprobs=rollout.logprobs,
        kept=rollout.kept if algorithm.keeps_mask else None,
        experts=rollout.experts if algorithm.keeps_experts else None,
        prompt_experts=rollout.prompt_experts if algorithm.keeps_experts else None,
    )
    return signals, batch, rollout_metrics(rollout, total, feedback.scored) | {"num_tokens": computed}


def _check_rewards(rewards: jax.Array, rollout: Rollout) -> None:
    shape = rollout.completion_lengths.shape
    if rewards.shape not in (shape, rollout.completion.shape):
        raise ValueError(
            f"rewards has shape {rewards.shape}, but the rollout holds {shape} prompts and samples: pass one reward "
            f"for each completion, or for each of its tokens, {rollout.completion.shape}"
        )


def _without_greedy(algorithm: PolicyGradient, rollout: Rollout, feedback: Feedback) -> tuple[Rollout, Feedback]:
    """A rollout whose last samples are greedy, without them; their rewards `[P]` are a baseline.

    That is shaped as the samples' rewards are, so that a penalty for length does not fall on one side alone.
    """
    rewards, greedy = jnp.asarray(feedback.rewards), rollout.samples(-1)
    _check_rewards(rewards, rollout)
    if rewards.shape[1] < 2:
        raise ValueError(
            f"rewards has shape {rewards.shape}, but the last sample of each group is the greedy baseline: "
            "pass rewards for two samples or more"
        )
    baseline = algorithm.shape(
        greedy.of_completions(rewards[:, -1:]), greedy.completion_lengths, greedy.completion.shape[-1]
    )
    rest = jax.tree.map(lambda x: x[:, :-1], feedback)
    return rollout.samples(None, -1), rest._replace(greedy=baseline[:, 0])


# ---- Metrics -------------------------------------------------------------------------------------


def sampling_gap(logprobs: jax.Array, batch: LearnerBatch, *, temperature: float, truncated: bool) -> Metrics:
    """How far the learner's log-probs are from the sampler's of the same distribution, per token.

    The learner scores at the sampling temperature and, unless the sampling mask is kept, without truncation. That is
    what the sampler drew from, unless it excluded tokens; then it still reports as much at temperature 1, and at
    another there is nothing to compare with and no metric: a gap would show the mass of what was excluded, not how well
    the two programs agree.
    """
    reported = batch.sampler_logprobs
    if truncated and batch.kept is None:
        reported = batch.model_logprobs if temperature == 1 else None
    if reported is None:
        return {}
    gap = jnp.abs(jnp.where(batch.mask, logprobs - reported, 0.0))
    return {
        "sampling/logp_gap_mean": Mean.of(gap, batch.mask),
        "sampling/logp_gap_max": Max.of(gap, batch.mask),
    }


def rollout_metrics(rollout: Rollout, rewards: jax.Array, scored: jax.Array | None = None) -> Metrics:
    """Metrics of a rollout with its rewards `[P, G]`, of those that are known, whatever the algorithm.

    All are of the samples that are trained on: not of greedy completions that are a baseline, but for `num_tokens`,
    which counts what was computed. Without speculation, tokens per pass are 1, and not told.
    """
    lengths, passes = rollout.completion_lengths, rollout.passes
    known = jnp.ones(rewards.shape, bool) if scored is None else jnp.asarray(scored)
    speculation = {}
    if passes is not None:
        speculation["sampling/tokens_per_pass"] = Mean(jnp.sum(lengths), jnp.sum(passes))
    return speculation | {
        "reward": Mean.of(rewards, known),
        "reward_std": Mean.of(jnp.sqrt(masked_var(rewards, known, axis=1))),
        "frac_reward_zero_std": Mean.of(zero_std_groups(rewards, mask=known)),
        "completions/mean_length": Mean.of(lengths),
        "completions/min_length": Mean.of(jnp.min(lengths)),
        "completions/max_length": Mean.of(jnp.max(lengths)),
        "completions/clipped_ratio": Mean.of(~rollout.finished),
        "num_tokens": _num_tokens(rollout),
    }


def _num_tokens(rollout: Rollout) -> Mean:
    return Mean.of(jnp.sum(rollout.completion_lengths) + jnp.sum(rollout.prompt_lengths))
