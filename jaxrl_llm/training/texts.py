"""How a run reads texts: said in its first lines, and checked before anything is compiled."""

from __future__ import annotations

from jaxrl_llm.algorithms.batching import MicroBatches
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.kernels.seam import choose


def how_texts_are_read(config: ModelConfig, plan: MicroBatches, prompt_width: int, width: int) -> str:
    """A sentence, beginning with a space: padded or packed, and by which attention.

    Args:
        config: the model's.
        plan: how an optimizer step is cut.
        prompt_width: tokens of the longest prompt.
        width: tokens of the longest completion.

    Raises:
        ValueError: a row has no room for both.
    """
    plan.check_width(prompt_width, width)
    tokens = plan.tokens_per_micro_batch
    kernel = choose(config.attention, tokens or prompt_width + width)
    texts = (
        f"up to {prompt_width} + {width} tokens with their padding" if tokens is None else f"rows of {tokens} tokens"
    )
    return f" Updates read {texts}; attention is {kernel}."
