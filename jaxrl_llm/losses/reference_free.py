"""Preference losses without a reference model: SimPO, CPO, SLiC, ORPO.

What keeps the policy in place is a likelihood term on the chosen completion, or a target margin, or nothing. DPO
without a reference is `dpo_loss` with None for both references.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.losses._pairs import (
    check_lengths,
    check_together,
    divide_by_count,
    divide_by_lengths,
    divide_pairs_by_lengths,
    make_pairs,
    mean_over,
    pair_metrics,
    reduce_pairs,
)
from jaxrl_llm.losses._rows import check_not_negative, check_positive
from jaxrl_llm.losses.preference_terms import cdpo_term, dpo_term, f_divergence_score
from jaxrl_llm.masking import as_float, check_choice, check_same_shape, count_true, fill_masked, masked_sum
from jaxrl_llm.records import Mean, Metrics

OddsLogprob = Literal["mean", "sum"]
NLLOver = Literal["tokens", "sequences"]

LOG_PROBABILITY_LIMIT = -1e-7
"""The odds of a completion are those of this log-probability at most: at 0 they are infinite."""


def simpo_loss(
    chosen_logprobs: ArrayLike,
    rejected_logprobs: ArrayLike,
    chosen_lengths: ArrayLike,
    rejected_lengths: ArrayLike,
    *,
    beta: ArrayLike = 2.0,
    gamma: ArrayLike | None = None,
    gamma_beta_ratio: ArrayLike | None = None,
    alpha: float = 0.0,
    weights: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> tuple[Array, Metrics]:
    """Simple preference optimization: the reward is the mean log-probability per token, with a target margin.

        mean over pairs of  −log σ(r_w − r_l − gamma)        r = beta log π(y) / |y|

    With `alpha`, the reward is AlphaPO's, r = beta (1 − p^(−alpha)) / alpha, where p = π(y)^(1/|y|). TRL's `simpo` is
    a mode of CPO: it adds the likelihood term of `cpo_loss` unless told not to.

    Unlike `dpo_loss`, there is no reference, sums are divided by lengths, and a pair is to win by gamma.

    Args:
        chosen_logprobs: Log-probabilities (sums) of the chosen completions under the policy, `[...]`.
        rejected_logprobs: The same of the rejected completions, `[...]`.
        chosen_lengths: Numbers of tokens of the chosen completions, `[...]`: the `sum` of their mask.
        rejected_lengths: The same of the rejected completions, `[...]`.
        beta: Scale of the reward.
        gamma: Target margin of the reward. None: `gamma_beta_ratio` · beta, or 0.5 if that is None, too.
        gamma_beta_ratio: The target margin in units of beta, the official code's parameter.
        alpha: Shape of the reward, a plain number; 0 for the logarithm.
        weights: As `dpo_loss`.
        mask: As `dpo_loss`.
        normalizer: As `dpo_loss`.

    Returns:
        As `dpo_loss`, where a reward is r.

    Raises:
        ValueError: As `dpo_loss`, on lengths that are not integers, and if both gamma and gamma_beta_ratio are given.

    Source: Meng et al. 2024, "SimPO" (2405.14734). AlphaPO: Gupta et al. 2025, "AlphaPO" (2501.03884).
    """
    check_positive(beta=beta)
    check_not_negative(gamma=gamma, gamma_beta_ratio=gamma_beta_ratio)
    if gamma is not None and gamma_beta_ratio is not None:
        raise ValueError(f"gamma is {gamma} and gamma_beta_ratio is {gamma_beta_ratio}: pass one of them")
    target = 0.5 if gamma is None else gamma
    if gamma_beta_ratio is not None:
        target = gamma_beta_ratio * beta
    pairs = make_pairs(chosen_logprobs, rejected_logprobs, None, None, mask)
    average = divide_pairs_by_lengths(pairs, chosen_lengths, rejected_lengths)
    chosen, rejected = (
        f_divergence_score(log_ratio, f_divergence="alpha", f_alpha=1 - alpha) * beta
        for log_ratio in (average.chosen_log_ratios, average.rejected_log_ratios)
    )
    losses = dpo_term(chosen - rejected - target, beta=1.0)
    loss = mean_over(losses, pairs.mask, weights=weights, normalizer=normalizer)
    return loss, pair_metrics(pairs, chosen, rejected)


def cpo_loss(
    chosen_logprobs: ArrayLike,
    rejected_logprobs: ArrayLike,
    chosen_lengths: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    label_smoothing: ArrayLike = 0.0,
    nll_coef: ArrayLike = 1.0,
    nll_over: NLLOver = "tokens",
    weights: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
    nll_normalizer: ArrayLike | None = None,
) -> tuple[Array, Metrics]:
    """Contrastive preference optimization: DPO under a uniform reference, and the likelihood of the chosen completion.

        mean over pairs of  −log σ(beta (log π(y_w) − log π(y_l)))  +  nll_coef · mean over chosen tokens of  −log π

    With `label_smoothing` ε, the first term is (1 − ε) times that plus ε times that of the pair turned round. Unlike
    `dpo_loss` without a reference, the likelihood term keeps the chosen completion likely.

    Args:
        chosen_logprobs: As `simpo_loss`.
        rejected_logprobs: As `simpo_loss`.
        chosen_lengths: As `simpo_loss`.
        beta: Inverse temperature.
        label_smoothing: The share of labels taken to be wrong, in [0, 0.5).
        nll_coef: Weight of the likelihood term, the paper's alpha.
        nll_over: "tokens", one mean over all chosen tokens; or "sequences", the mean over pairs of the mean over a
            completion's tokens, so that a long one has no more say.
        weights: As `dpo_loss`; not on the likelihood term.
        mask: As `dpo_loss`.
        normalizer: As `dpo_loss`.
        nll_normalizer: Number of chosen tokens (or completions) of the whole batch, if these pairs are a part of it.
            None: those here.

    Returns:
        As `dpo_loss`, where a reward is beta · log π(y), and the metric `nll`, the mean of the likelihood term.

    Raises:
        ValueError: As `dpo_loss`.

    Source: Xu et al. 2024, "Contrastive preference optimization" (2401.08417).
    """
    check_not_negative(nll_coef=nll_coef)
    check_same_shape(chosen_logprobs=chosen_logprobs, chosen_lengths=chosen_lengths)
    check_lengths(chosen_lengths=chosen_lengths)
    pairs = make_pairs(chosen_logprobs, rejected_logprobs, None, None, mask)
    losses = cdpo_term(pairs.margin, beta=beta, label_smoothing=label_smoothing)
    loss, metrics = reduce_pairs(losses, pairs, beta=beta, weights=weights, normalizer=normalizer)
    nll, metrics["nll"] = _mean_nll(chosen_logprobs, chosen_lengths, pairs.mask, nll_over, nll_normalizer)
    return loss + nll_coef * nll, metrics


def slic_loss(
    chosen_logprobs: ArrayLike,
    rejected_logprobs: ArrayLike,
    *,
    margin: ArrayLike = 1.0,
    nll_coef: ArrayLike = 0.1,
    target_logprobs: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
) -> tuple[Array, Metrics]:
    """Sequence likelihood calibration with human feedback: a hinge on log-probabilities, and a likelihood term.

        mean over pairs of  max(0, margin − log π(y_w) + log π(y_l)) − nll_coef · log π(y_target)

    Unlike `hinge_loss`, there is no reference model: the likelihood of a target, per sequence and not per token, keeps
    the policy in place.

    Args:
        chosen_logprobs: As `simpo_loss`.
        rejected_logprobs: As `simpo_loss`.
        margin: Difference of log-probabilities beyond which a pair has no gradient, the paper's δ.
        nll_coef: Weight of the likelihood term, the paper's λ (the default is that of the HALOs code).
        target_logprobs: Log-probabilities of the supervised targets under the policy, `[...]`. None: the chosen ones.
        weights: As `dpo_loss`; not on the likelihood term.
        mask: As `dpo_loss`.
        normalizer: As `dpo_loss`.

    Returns:
        As `dpo_loss`, where a reward is log π(y), and the metric `nll`, the mean over the target *sequences*.

    Raises:
        ValueError: As `dpo_loss`.

    Source: Zhao et al. 2023, "SLiC-HF" (2305.10425).
    """
    check_not_negative(margin=margin, nll_coef=nll_coef)
    pairs = make_pairs(chosen_logprobs, rejected_logprobs, None, None, mask)
    check_same_shape(chosen_logprobs=chosen_logprobs, target_logprobs=target_logprobs)
    targets = pairs.chosen_logprobs if target_logprobs is None else fill_masked(target_logprobs, pairs.mask)
    losses = jnp.maximum(0.0, margin - pairs.margin)
    loss, metrics = reduce_pairs(losses, pairs, beta=1.0, weights=weights, normalizer=normalizer)
    metrics["nll"] = Mean.of(jax.lax.stop_gradient(-targets), pairs.mask)
    return loss + nll_coef * mean_over(-targets, pairs.mask, normalizer=normalizer), metrics


def orpo_loss(
    chosen_logprobs: ArrayLike,
    rejected_logprobs: ArrayLike,
    chosen_lengths: ArrayLike,
    rejected_lengths: ArrayLike,
    *,
    odds_coef: ArrayLike = 0.1,
    odds_logp: OddsLogprob = "mean",
    nll_over: NLLOver = "tokens",
    nll_logprobs: ArrayLike | None = None,
    nll_lengths: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    normalizer: ArrayLike | None = None,
    nll_normalizer: ArrayLike | None = None,
) -> tuple[Array, Metrics]:
    """Odds ratio preference optimization: supervised fine-tuning with a penalty on the odds of the rejected completion.

        mean over tokens of  −log π  +  odds_coef · mean over pairs of  −log σ(log odds(y_w) − log odds(y_l))
        odds(y) = P / (1 − P)        P = π(y)^(1/|y|), the geometric mean of its tokens' probabilities

    One stage, from a base model, without a reference. The likelihood term is over the tokens of the chosen completions,
    or the mean of their means (`nll_over="sequences"`); the authors' code and TRL count the prompt's tokens, too: pass
    their sums and numbers as `nll_logprobs` and `nll_lengths`.

    Unlike `cpo_loss`, the contrast is of odds of mean probabilities, which is weak where both are unlikely.

    Args:
        chosen_logprobs: As `simpo_loss`.
        rejected_logprobs: As `simpo_loss`.
        chosen_lengths: As `simpo_loss`.
        rejected_lengths: As `simpo_loss`.
        odds_coef: Weight of the odds ratio, the paper's λ and TRL's `beta`.
        odds_logp: "mean", or "sum" for P = π(y), of which the odds are P itself unless the completion is short.
        nll_over: As `cpo_loss`.
        nll_logprobs: Sums of log-probabilities over the tokens of the likelihood term, `[...]`. None: the chosen ones.
        nll_lengths: Numbers of these tokens, `[...]`.
        weights: As `dpo_loss`; not on the likelihood term.
        mask: As `dpo_loss`.
        normalizer: As `dpo_loss`.
        nll_normalizer: As `cpo_loss`.

    Returns:
        As `dpo_loss`, where a reward is odds_coef · log P, and the metrics `nll`, the mean of the likelihood term,
        `log_odds_chosen`, the mean log odds ratio, and `log_odds_ratio`, the mean of log σ of it (TRL's names).

    Raises:
        ValueError: As `dpo_loss`, on an unknown `odds_logp`, and on nll_logprobs without nll_lengths.

    Source: Hong et al. 2024, "ORPO" (2403.07691).
    """
    check_not_negative(odds_coef=odds_coef)
    check_choice("odds_logp", odds_logp, OddsLogprob)
    check_together(nll_logprobs=nll_logprobs, nll_lengths=nll_lengths)
    sums = make_pairs(chosen_logprobs, rejected_logprobs, None, None, mask)
    # Divided in either case, so that the lengths are checked.
    average = divide_pairs_by_lengths(sums, chosen_lengths, rejected_lengths)
    logp = average if odds_logp == "mean" else sums
    log_ratio = log_odds(logp.chosen_log_ratios) - log_odds(logp.rejected_log_ratios)
    losses = dpo_term(log_ratio, beta=1.0)
    loss, metrics = reduce_pairs(losses, logp, beta=odds_coef, weights=weights, normalizer=normalizer)
    metrics["log_odds_chosen"] = Mean.of(jax.lax.stop_gradient(log_ratio), sums.mask)
    metrics["log_odds_ratio"] = Mean.of(jax.lax.stop_gradient(-losses), sums.mask)
    if nll_logprobs is None or nll_lengths is None:
        nll_logprobs, nll_lengths = chosen_logprobs, chosen_lengths
    nll, metrics["nll"] = _mean_nll(nll_logprobs, nll_lengths, sums.mask, nll_over, nll_normalizer)
    return nll + odds_coef * loss, metrics


def log_odds(logprobs: ArrayLike) -> Array:
    """The log odds of an event from its log-probability a.

        log(P / (1 − P)) = a − log(1 − exp(a))        P = exp(a)

    Unlike `jax.scipy.special.logit`, which takes P, it keeps its precision where P is near 0 or 1.

    Args:
        logprobs: a ≤ 0, any shape; above −10⁻⁷ it counts as that, and has no gradient.

    Returns:
        The shape of `logprobs`.

    Source: Hong et al. 2024, "ORPO" (2403.07691); M. Mächler 2012, "Accurately computing log(1 − exp(−|a|))".
    """
    a = jnp.minimum(as_float(logprobs), LOG_PROBABILITY_LIMIT)
    likely = a > -jnp.log(2.0)
    near_one = jnp.log(-jnp.expm1(jnp.where(likely, a, -1.0)))
    return a - jnp.where(likely, near_one, jnp.log1p(-jnp.exp(jnp.where(likely, -1.0, a))))


def _mean_nll(
    logprobs: ArrayLike, lengths: ArrayLike, mask: Array, over: NLLOver, normalizer: ArrayLike | None
) -> tuple[Array, Mean]:
    """The mean of −log π over the tokens of the valid rows, or of the rows' means; and the record for the metrics."""
    check_choice("nll_over", over, NLLOver)
    check_same_shape(mask=mask, nll_logprobs=logprobs, nll_lengths=lengths)
    check_lengths(nll_lengths=lengths)
    if over == "tokens":
        total, count = -masked_sum(logprobs, mask), masked_sum(lengths, mask)
    else:
        total = -jnp.sum(divide_by_lengths(fill_masked(logprobs, mask), lengths, mask, "nll_lengths"))
        count = count_true(mask)
    loss = divide_by_count(total, count, normalizer, "nll_normalizer")
    return loss, Mean(jax.lax.stop_gradient(total), count)
