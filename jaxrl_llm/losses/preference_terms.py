"""Losses of one preference pair as functions of a margin, nothing reduced.

The margin is h = log-ratio of the chosen completion − log-ratio of the rejected one, with log-ratio =
log π(y) − log π_ref(y); any other difference of scores will do as well. Shapes in are shapes out, and there is no
mask: apply `fill_masked` to the inputs where padding may be not finite.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax.numpy as jnp
from jax import Array
from jax.nn import log_sigmoid, sigmoid, softplus
from jax.typing import ArrayLike

from jaxrl_llm.losses._pairs import check_label_smoothing
from jaxrl_llm.losses._rows import check_positive
from jaxrl_llm.masking import as_float

FDivergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]

EXPONENT_LIMIT = 40.0
"""Bound on exponents that grow with an unlikely completion: the square of e⁴⁰ is a float32, e⁸⁹ is not."""


def dpo_term(margin: ArrayLike, *, beta: ArrayLike = 0.1) -> Array:
    """The logistic loss of DPO: −log of the Bradley–Terry probability that the chosen completion wins.

        −log σ(beta h) = softplus(−beta h)

    Unlike `hinge_term`, it never stops pushing: its gradient −beta σ(−beta h) only decays.

    Args:
        margin: h, any shape.
        beta: Inverse temperature.

    Returns:
        The shape of `margin`.

    Raises:
        ValueError: On a beta that is not positive.

    Source: Rafailov et al. 2023, "Direct preference optimization" (2305.18290).
    """
    check_positive(beta=beta)
    return softplus(-as_float(margin) * beta)


def cdpo_term(margin: ArrayLike, *, label_smoothing: ArrayLike, beta: ArrayLike = 0.1) -> Array:
    """The logistic loss under labels of which a share is taken to be wrong.

        (1 − label_smoothing) softplus(−beta h) + label_smoothing softplus(beta h)

    Unlike `dpo_term`, it has a minimum at a finite margin, where σ(beta h) = 1 − label_smoothing.

    Args:
        margin: h, any shape.
        label_smoothing: Share of wrong labels, in [0, 0.5).
        beta: Inverse temperature.

    Returns:
        The shape of `margin`.

    Raises:
        ValueError: On a share outside [0, 0.5).

    Source: E. Mitchell 2023, "A note on DPO with noisy preferences".
    """
    check_label_smoothing(label_smoothing)
    flipped = dpo_term(-as_float(margin), beta=beta)
    return dpo_term(margin, beta=beta) * (1 - label_smoothing) + flipped * label_smoothing


def robust_dpo_term(margin: ArrayLike, *, label_smoothing: ArrayLike, beta: ArrayLike = 0.1) -> Array:
    """The logistic loss corrected for wrong labels, so that over them its mean is that of the right ones.

        [(1 − label_smoothing) softplus(−beta h) − label_smoothing softplus(beta h)] / (1 − 2 label_smoothing)

    Unlike `cdpo_term`, which is biased, it takes the flipped loss away, and may be negative.

    Args:
        margin: h, any shape.
        label_smoothing: Share of wrong labels, in [0, 0.5).
        beta: Inverse temperature.

    Returns:
        The shape of `margin`.

    Raises:
        ValueError: On a share outside [0, 0.5).

    Source: Chowdhury et al. 2024, "Provably robust DPO" (2403.00409).
    """
    check_label_smoothing(label_smoothing)
    flipped = dpo_term(-as_float(margin), beta=beta)
    clean = dpo_term(margin, beta=beta) * (1 - label_smoothing)
    return (clean - flipped * label_smoothing) / (1 - 2 * label_smoothing)


def ipo_term(margin: ArrayLike, *, beta: ArrayLike = 0.1, target: ArrayLike | None = None) -> Array:
    """The squared distance of the margin from a target.

        (h − target)²        target = 1 / (2 beta), where beta is the paper's τ

    Unlike `dpo_term`, it pulls a margin beyond the target back.

    Args:
        margin: h, any shape.
        beta: Strength of the regularization to the reference.
        target: Another target; `beta` then plays no part.

    Returns:
        The shape of `margin`.

    Raises:
        ValueError: On a beta that is not positive.

    Source: Azar et al. 2023 (2310.12036).
    """
    check_positive(beta=beta)
    return (as_float(margin) - (0.5 / beta if target is None else target)) ** 2


def hinge_term(margin: ArrayLike, *, beta: ArrayLike = 0.1) -> Array:
    """The hinge loss.

        max(0, 1 − beta h)

    Unlike `dpo_term`, a pair whose margin has reached 1 / beta has no gradient.

    Args:
        margin: h, any shape.
        beta: Inverse temperature.

    Returns:
        The shape of `margin`.

    Raises:
        ValueError: On a beta that is not positive.

    Source: Liu et al. 2023, "Statistical rejection sampling improves preference optimization" (2309.06657).
    """
    check_positive(beta=beta)
    return jnp.maximum(0.0, 1 - as_float(margin) * beta)


def exo_term(margin: ArrayLike, *, beta: ArrayLike = 0.1, label_smoothing: ArrayLike = 1e-3) -> Array:
    """The reverse KL divergence between the policy's choice within the pair and the smoothed label.

        σ(beta h) [log σ(beta h) − log(1 − label_smoothing)] + σ(−beta h) [log σ(−beta h) − log label_smoothing]

    Unlike `cdpo_term`, which is the forward KL up to a constant, it seeks the mode of the label.

    Args:
        margin: h, any shape.
        beta: Inverse temperature.
        label_smoothing: Probability that the label gives the rejected completion, in (0, 0.5).

    Returns:
        The shape of `margin`.

    Raises:
        ValueError: On a probability outside (0, 0.5): at 0 the divergence is infinite.

    Source: Ji et al. 2024, "Towards efficient exact optimization of language model alignment" (2402.00856).
    """
    check_positive(beta=beta, label_smoothing=label_smoothing)
    check_label_smoothing(label_smoothing)
    z = as_float(margin) * beta
    wins = sigmoid(z) * (log_sigmoid(z) - jnp.log1p(-as_float(label_smoothing)))
    return wins + sigmoid(-z) * (log_sigmoid(-z) - jnp.log(as_float(label_smoothing)))


def discopop_term(margin: ArrayLike, *, beta: ArrayLike = 0.05, tau: ArrayLike = 0.05) -> Array:
    """The loss that a language model found: logistic for wrong pairs, exponential for right ones.

        (1 − w) softplus(−z) + w exp(−z)        z = beta h,  w = σ(z / tau)

    Unlike `dpo_term`, it is not convex: around z = 0 the blend w switches, and is differentiated, too, so that from
    z = 0 on the margin is first pulled back.

    Args:
        margin: h, any shape.
        beta: Inverse temperature.
        tau: Width of the switch, below 1.

    Returns:
        The shape of `margin`.

    Raises:
        ValueError: On a beta or tau that is not positive.

    Source: Lu et al. 2024, "DiscoPOP" (2406.08414).
    """
    check_positive(beta=beta, tau=tau)
    z = as_float(margin) * beta
    # w exp(−z) in one exponent: on a very wrong pair it is 0 · ∞ otherwise.
    return sigmoid(-z / tau) * softplus(-z) + jnp.exp(log_sigmoid(z / tau) - z)


def f_divergence_score(log_ratio: ArrayLike, *, f_divergence: FDivergence, f_alpha: float = 0.5) -> Array:
    """The score of a completion when another divergence than the reverse KL ties the policy to the reference.

        reverse_kl:  log u
        forward_kl:  1 − 1/u
        js:          log(2 u / (u + 1))
        alpha:       (u^(f_alpha − 1) − 1) / (f_alpha − 1)

    with u = π(y)/π_ref(y): the derivative f′(u) of the divergence's function. The difference of two scores takes the
    place of the margin h: as an option of `dpo_loss`, or in every loss of h by giving it the two scores as log-probs
    and None as references.

    Unlike `kl_penalty`, it is no penalty on its own: the divergence acts through the implicit reward beta · f′(u).

    Args:
        log_ratio: log u, any shape.
        f_divergence: One of `FDivergence`.
        f_alpha: Of "alpha", a plain number: 1 gives the reverse KL, 0 the forward KL. (The α of the paper is
            1 − f_alpha.)

    Returns:
        The shape of `log_ratio`. Exponents are bounded by 40, beyond which the gradient is 0.

    Raises:
        ValueError: On an unknown divergence.

    Source: Wang et al. 2023, "Beyond reverse KL" (2309.16240).
    """
    log_ratio = as_float(log_ratio)
    match f_divergence:
        case "reverse_kl":
            return log_ratio
        case "forward_kl":
            return -jnp.expm1(jnp.minimum(-log_ratio, EXPONENT_LIMIT))
        case "js":
            return jnp.log(2.0) + log_sigmoid(log_ratio)
        case "alpha" if abs(f_alpha - 1) < 1e-6:  # the limit
            return log_ratio
        case "alpha":
            return jnp.expm1(jnp.minimum((f_alpha - 1) * log_ratio, EXPONENT_LIMIT)) / (f_alpha - 1)
    raise ValueError(f"unknown f_divergence {f_divergence!r}: choose one of {', '.join(get_args(FDivergence))}")
