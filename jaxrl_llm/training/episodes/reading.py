"""What reward functions and judges read of a completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def completion_text(ids: Sequence[int], tokenizer: Any, *, finished: bool, opening: str = "") -> str:
    """The text of sampled ids.

    What ends it is left out: the stop token, and what stands for the beginning, the end or padding of a text. Other
    special tokens are part of what the model wrote (many tags are such tokens) and stay.

    Args:
        ids: a completion.
        tokenizer: decodes it.
        finished: whether its last token is a stop token.
        opening: what the prompt has begun of it, such as `<think>` (`PromptBatch.openings`).
    """
    frame = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    said = [token for token in (ids[:-1] if finished else ids) if token not in frame]
    return opening + tokenizer.decode(said, skip_special_tokens=False)


def completion_of(prompt: Any, text: str) -> Any:
    """A completion as its prompt is: text, or the assistant's message in a list."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
