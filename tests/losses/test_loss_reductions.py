"""Losses that leave their reduction open take the constant that one of its modes needs."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import losses
from jaxrl_llm.losses import dft_loss, gkd_loss, prm_loss, sft_loss, value_loss

MASK = jnp.array([[True, True, False], [True, False, False]])
VALUES = jnp.array([[-1.0, -2.0, np.nan], [-0.5, np.nan, np.nan]])
LABELS = jnp.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
LOGITS = jnp.arange(18.0).reshape(2, 3, 3) % 5

LOSSES: dict[str, Callable[..., tuple[jax.Array, object]]] = {
    "sft": lambda **mode: sft_loss(VALUES, MASK, **mode),
    "dft": lambda **mode: dft_loss(VALUES, MASK, **mode),
    "value": lambda **mode: value_loss(VALUES, VALUES, LABELS, MASK, **mode),
    "prm": lambda **mode: prm_loss(VALUES, LABELS, MASK, **mode),
    "gkd": lambda **mode: gkd_loss(LOGITS, LOGITS[::-1], MASK, **mode),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_constant_length_divides_the_sums(name: str) -> None:
    summed, _ = LOSSES[name](aggregation="seq-mean-token-sum")
    divided, _ = LOSSES[name](aggregation="seq-mean-token-sum-norm", max_length=7)
    assert float(summed) != 0
    assert float(divided) == pytest.approx(float(summed) / 7, rel=1e-6)
    with pytest.raises(ValueError, match="max_length"):
        LOSSES[name](aggregation="seq-mean-token-sum-norm")


def test_a_loss_that_leaves_its_reduction_open_takes_all_that_any_reduction_needs() -> None:
    named = [name for name in losses.__all__ if name.endswith("_loss")]
    signatures = {name: set(inspect.signature(getattr(losses, name)).parameters) for name in named}
    is_open = {name for name, parameters in signatures.items() if "aggregation" in parameters}
    assert is_open >= {"ppo_loss", "grpo_loss", "gspo_loss", "gspo_token_loss", "sapo_loss"}
    assert is_open >= {f"{name}_loss" for name in LOSSES}
    for name in is_open:
        assert signatures[name] >= {"normalizer", "max_length", "segment_ids", "group_ids", "count_empty"}, name
