"""HA-DW: advantages re-weighted by how hard a prompt is compared with the history of the run."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.advantages.statistics import group_labels, group_statistics
from jaxrl_llm.masking import as_float, check_same_shape, fill_masked, mask_or_all


class DifficultyAnchor(NamedTuple):
    """How well the policy did in recent batches: the state of HA-DW, which a checkpoint holds.

        C⁺ = (1 − η) C⁻ + η · accuracy,   η = max(min_rate, eta · std(the last `window` anchors))

    C⁻ of a batch is C⁺ of the batch before; of the first one, its own accuracy. Until `window` anchors are there,
    η = eta. Each batch reads `prior` and then makes one update: `update`, or `update_moving_average`, the paper's
    "hard" variant, in which C⁺ is the mean accuracy of the last `window` batches. One run uses one of the two.
    The paper has no `min_rate`: there a slow anchor slows itself, and all but stands while the accuracy rises; 0.1
    keeps up with it. Unlike `EmaBaseline`, how fast it moves depends on how much it has moved.

    Source: Yang et al. 2026, "Your group-relative advantage is biased" (2601.08521).
    """

    value: Array
    """C⁺ of the last batch, float32."""
    history: Array
    """`[window]` float32, the latest last: anchors (`update`) or accuracies (`update_moving_average`)."""
    count: Array
    """Batches seen, int32."""

    @classmethod
    def init(cls, window: int = 10) -> DifficultyAnchor:
        """The state before the first batch."""
        if window < 1:
            raise ValueError(f"window is {window}: it must be at least 1")
        return cls(jnp.float32(0), jnp.zeros(window, jnp.float32), jnp.int32(0))

    def prior(self, accuracy: ArrayLike) -> Array:
        """C⁻ for the batch with this mean accuracy, a float32 scalar."""
        return jnp.where(self.count == 0, as_float(accuracy), self.value)

    def deviation(self) -> Array:
        """The standard deviation (of the population) of the history."""
        return jnp.std(self.history)

    def update(self, accuracy: ArrayLike, *, eta: float = 1.0, min_rate: float = 0.0) -> DifficultyAnchor:
        """Takes the mean accuracy of a batch in, after its use.

        Args:
            accuracy: of the batch.
            eta: factor on the deviation of the anchors.
            min_rate: least η, in [0, 1]; η itself is cut to 1. At 0, as published, a slow anchor slows itself.
        """
        is_full = self.count >= self.history.size
        rate = jnp.clip(eta * jnp.where(is_full, self.deviation(), 1.0), min_rate, 1.0)
        prior = self.prior(accuracy)
        value = prior + rate * (as_float(accuracy) - prior)
        return DifficultyAnchor(value, self._append(value), self.count + 1)

    def update_moving_average(self, accuracy: ArrayLike) -> DifficultyAnchor:
        """Takes the mean accuracy of a batch in, after its use."""
        history = self._append(as_float(accuracy))
        held = jnp.arange(history.size, 0, -1) <= self.count + 1
        value = jnp.sum(jnp.where(held, history, 0.0)) / jnp.sum(held)
        return DifficultyAnchor(value, history, self.count + 1)

    def _append(self, value: Array) -> Array:
        return jnp.roll(self.history, -1).at[-1].set(value)


def hadw_weights(
    advantages: ArrayLike,
    accuracies: ArrayLike,
    anchor: ArrayLike,
    *,
    scale: float = 1.3,
    mask: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    group_size: int | None = None,
) -> Array:
    """HA-DW's factors on advantages, by the prompt's difficulty.

        scale · exp( −sign(A) · sign(d) · |d| ),   d = mean accuracy of the group − anchor

    The factor is above `scale` for success on a hard prompt and failure on an easy one, below it otherwise. Unlike
    a scale by the group's deviation, it compares the prompt with the run's history. It goes on top of any group
    estimator.

    Args:
        advantages: One for each sample, `[..., G]` with a group along the last axis; or any shape with `group_ids`.
        accuracies: Correctness of the samples in [0, 1], of that shape: rewards, if they are in [0, 1].
        anchor: `DifficultyAnchor.prior` of the batch, a scalar; a constant.
        scale: λ of the paper, best between 1.3 and 1.5.
        mask: Bool, of that shape: False for samples that could not be scored.
        group_ids: Labels of that shape; equal ones form a group.
        group_size: G of flat arrays, in which the samples of a prompt lie one after another; in place of labels.

    Returns:
        The shape of `advantages`; `scale` where the advantage is 0, and where masked.

    Raises:
        ValueError: On unequal shapes or a mask that is not bool.

    Source: Yang et al. 2026, "Your group-relative advantage is biased" (2601.08521).
    """
    group_ids = group_labels(group_ids, group_size, accuracies=accuracies)
    mask = mask_or_all(mask, advantages=advantages)
    check_same_shape(advantages=advantages, accuracies=accuracies)
    difference = group_statistics(accuracies, mask, group_ids).mean - jax.lax.stop_gradient(as_float(anchor))
    sign = jax.lax.stop_gradient(jnp.sign(fill_masked(advantages, mask)))
    return scale * jnp.exp(-sign * difference)


def hadw_advantages(
    advantages: ArrayLike,
    accuracies: ArrayLike,
    anchor: ArrayLike,
    *,
    scale: float = 1.3,
    mask: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    group_size: int | None = None,
) -> Array:
    """Advantages times the weights of HA-DW.

        A · scale · exp( −sign(A) · (mean accuracy of the group − anchor) )

    Unlike `hadw_weights`, it is the product.

    Args:
        advantages: As `hadw_weights`.
        accuracies: As `hadw_weights`.
        anchor: As `hadw_weights`.
        scale: As `hadw_weights`.
        mask: As `hadw_weights`.
        group_ids: As `hadw_weights`.
        group_size: As `hadw_weights`.

    Returns:
        The shape of `advantages`, 0 where masked.

    Raises:
        ValueError: As `hadw_weights`.

    Source: Yang et al. 2026, "Your group-relative advantage is biased" (2601.08521).
    """
    group_ids = group_labels(group_ids, group_size, accuracies=accuracies)
    weights = hadw_weights(advantages, accuracies, anchor, scale=scale, mask=mask, group_ids=group_ids)
    return weights * fill_masked(advantages, mask_or_all(mask, advantages=advantages))


def mean_accuracy_of_mixed_groups(accuracy: ArrayLike, num_samples: int) -> Array:
    """What the mean of a group is on average, if the groups that are all right or all wrong are left out.

        p (1 − p⁽ᴳ⁻¹⁾) / (1 − (1 − p)ᴳ − pᴳ)        G = num_samples, p = accuracy

    It is above p for hard prompts (p < ½) and below it for easy ones: the bias that HA-DW is to undo. Unlike the
    plain mean, it is conditional on a group with a signal.

    Args:
        accuracy: Probability p that a sample is right, in [0, 1], any shape.
        num_samples: Samples in a group, at least 2.

    Returns:
        The shape of `accuracy`; at 0 and 1 the limits 1 / G and 1 − 1 / G.

    Raises:
        ValueError: If a group has fewer than two samples.

    Source: Yang et al. 2026, "Your group-relative advantage is biased" (2601.08521).
    """
    if num_samples < 2:
        raise ValueError(f"num_samples is {num_samples}: a group of fewer than 2 is never mixed")
    p = as_float(accuracy)
    # By symmetry only p ≤ ½ is computed, where no difference of nearly equal numbers is taken.
    low = jnp.minimum(p, 1 - p)
    positive = low > 0
    safe = jnp.where(positive, low, 0.5)
    mixed = -jnp.expm1(num_samples * jnp.log1p(-safe)) - safe**num_samples
    mean = jnp.where(positive, safe * (1 - safe ** (num_samples - 1)) / mixed, 1 / num_samples)
    return jnp.where(p <= 0.5, mean, 1 - mean)
