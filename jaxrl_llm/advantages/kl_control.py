"""The coefficient of a KL penalty from one update to the next: pure `(kl_coef, kl, num_sequences) -> kl_coef`.

The coefficient is the whole state: it starts at the configured value, and a checkpoint must hold it.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm.masking import as_float


def adaptive_kl_coef(
    kl_coef: ArrayLike,
    kl: ArrayLike,
    num_sequences: ArrayLike,
    *,
    target: float,
    horizon: float = 10_000,
    error_clip: float = 0.2,
) -> Array:
    """The coefficient moved, in proportion, toward the one that holds the KL at its target.

        kl_coef · (1 + clip(kl / target − 1, −error_clip, error_clip) · num_sequences / horizon)

    What `kl` measures sets what `target` means. In the paper it is the mean over sequences of the k1 KL *summed*
    over each sequence's tokens (target 6 nats); verl feeds the mean over sequences of each sequence's *token
    mean* (target 0.1), so that the two targets cannot be compared. Unlike a constant, the result must be
    carried to the next update.

    Args:
        kl_coef: The coefficient of the batch that has been collected, a scalar.
        kl: The KL of that batch, a scalar.
        num_sequences: Sequences in that batch.
        target: The KL that is aimed at, in the units of `kl`.
        horizon: Sequences over which an error at the bound changes the coefficient by about `error_clip`.
        error_clip: Bound on the relative error.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: If target, horizon or error_clip is not positive.

    Source: Ziegler et al. 2019, "Fine-tuning language models from human preferences" (1909.08593).
    """
    for name, value in (("target", target), ("horizon", horizon), ("error_clip", error_clip)):
        if isinstance(value, int | float) and not value > 0:
            raise ValueError(f"{name} is {value}: it must be positive")
    error = jnp.clip(as_float(kl) / target - 1, -error_clip, error_clip)
    return as_float(kl_coef) * (1 + error * num_sequences / horizon)
