"""Operations of a pass through the model, in closed form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from jaxrl_llm.models.config import ModelConfig, Remat


class Forward(NamedTuple):
    """Floating point operations of a forward pass, by what computes them."""

    products: int
    """Of the layers' tokens with their weights."""
    attention: int
    """Queries with the keys that they see, and the weights with the values."""
    head: int
    """Distributions over the vocabulary, or the one number of a critic or reward model."""

    @property
    def total(self) -> int:
        """All."""
        return sum(self)

    def backward(self, *, frozen: bool) -> int:
        """Those of the backward pass: gradients of what is multiplied, on both sides unless weights are `frozen`."""
        return (1 if frozen else 2) * (self.products + self.head) + 2 * self.attention

    def again(self, remat: Remat) -> int:
        """Of it what the backward pass computes a second time, so as not to keep it."""
        return {
            "none": 0,
            "dots": self.attention,
            "attention": self.products,
            "full": self.products + self.attention,
            "offload": self.products + self.attention,
        }[remat]


def forward(
    config: ModelConfig,
    prompt_tokens: int,
    completions: Sequence[Sequence[int]],
    *,
    unfed: int = 0,
    scored: int,
    outputs: int | None = None,
) -> Forward:
    """A forward pass in which each prompt is computed once for all its completions.

    Matrix products alone, a multiplication and an addition each: 2 Σ_layers (q, k, v, o and the three of the MLP, or
    the router and those of the token's experts) a token, 4 N H a pair of query and key that sees it, 2 D V a
    distribution, 2 D a value or score.

    Args:
        config: of the model.
        prompt_tokens: of every prompt.
        completions: lengths, a prompt's after another's.
        unfed: tokens of each completion that do not go through the layers: the last one that is drawn.
        scored: how many distributions are made, or numbers in their place.
        outputs: entries of each; `None`: V.
    """
    heads, weights = config.num_heads * config.head_dim, weights_of_layers(config, active=True)
    fed = [length - unfed for group in completions for length in group]
    tokens = len(completions) * prompt_tokens + sum(fed)
    lengths, windows = Counter(fed), Counter(kind.window for kind in config.kinds)
    pairs = sum(
        layers
        * (
            len(completions) * _seen(0, prompt_tokens, window)
            + sum(many * _seen(prompt_tokens, length, window) for length, many in lengths.items())
        )
        for window, layers in windows.items()
    )
    head = 2 * config.embed_dim * (config.vocab_size if outputs is None else outputs)
    return Forward(2 * tokens * weights, 4 * heads * pairs, scored * head)


def weights_of_layers(config: ModelConfig, *, active: bool = False) -> int:
    """Entries of the matrices of all layers; `active`: of experts those that a token meets."""
    attention = 2 * config.embed_dim * (config.num_heads + config.num_kv_heads) * config.head_dim
    return sum(attention + config.mlp_weights(kind, active=active) for kind in config.kinds)


def _seen(before: int, tokens: int, window: int | None) -> int:
    """Keys that so many tokens behind `before` others see, each its own among them."""
    whole = tokens if window is None else max(0, min(tokens, window - before))
    return whole * before + whole * (whole + 1) // 2 + (tokens - whole) * (window or 0)
