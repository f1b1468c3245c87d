"""What the backward pass finds in memory of each layer, and what it computes again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxrl_llm.models.attention import ATTENTION
from jaxrl_llm.models.blocks import RESIDUAL
from jaxrl_llm.models.config import Remat
from jaxrl_llm.models.operands import LINEAR
from jaxrl_llm.sharding import HOST

_SAVED = {"attention": ATTENTION, "dots": LINEAR}


def rematerialised(remat: Remat, layer: Callable[..., Any], *, in_loop: bool) -> Callable[..., Any]:
    """A layer of which the backward pass keeps what `ModelConfig.remat` says.

    Args:
        remat: the choice.
        layer: the residual stream and what else goes into a layer → what comes out.
        in_loop: whether the layer is the body of a loop, which alone keeps XLA from sharing what is computed twice.
    """
    if remat == "none":
        return layer
    policies, policy = jax.checkpoint_policies, None
    if remat in _SAVED:
        policy = policies.save_only_these_names(_SAVED[remat])
    elif remat == "offload":
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[RESIDUAL],
            offload_src="device",
            offload_dst=HOST,
        )
    return jax.checkpoint(layer, policy=policy, prevent_cse=not in_loop)
