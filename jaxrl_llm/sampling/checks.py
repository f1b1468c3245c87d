"""What a sampler refuses: settings and batches that do not fit the model or the mesh, each by name."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import head_shards, row_shards


def check_batch_invariant(model: ModelConfig, config: SamplingConfig, dtype: jnp.dtype) -> None:
    """Raises ValueError for settings with which a batch-invariant model's sampler would not have the learner's numbers.

    Args:
        model: batch-invariant.
        config: of the sampler.
        dtype: in which it is to decode.
    """
    if dtype != jnp.dtype(model.dtype):
        raise ValueError(
            f"dtype={dtype.name}: with model.batch_invariant the sampler computes in the learner's type, "
            f"{model.dtype}; leave it out"
        )
    if config.attention != "auto":
        raise ValueError(
            f"sampling.attention={config.attention!r}: with model.batch_invariant attention has an order of "
            "its own; pass --sampling.attention=auto"
        )
    if config.cache_dtype is not None:
        raise ValueError(
            f"sampling.cache_dtype={config.cache_dtype!r}: with model.batch_invariant the sampler reads the "
            "keys and values that the learner reads, not rounded ones; leave it out"
        )


def check_positions(model: ModelConfig, longest: int, config: SamplingConfig, *, width: int = 0) -> None:
    """Checks that a model has positions for the longest prompt and a completion.

    Args:
        model: the model's.
        longest: tokens of the longest prompt.
        config: of the sampler.
        width: Tp, to which prompts are padded.

    Raises:
        ValueError: it has not.
    """
    limit, way = model.longest_text, model.way_to_longer
    if width > limit:
        raise ValueError(
            f"max_prompt_length={width} is more than the model's {limit} positions{way}, and prompts are padded to "
            f"it; lower it (the longest prompt has {longest} tokens)"
        )
    if longest + config.max_tokens > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and sampling.max_tokens={config.max_tokens} exceed the "
            f"model's {limit} positions{way}; shorten one of them"
        )


def checked_prompts(prompt: Any, lengths: Any, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts `[P, Tp]` and their lengths `[P]` as the program takes them.

    Raises:
        ValueError: one is empty or longer than its row, or has a token outside the vocabulary.
    """
    prompt, lengths = np.asarray(prompt, np.int32), np.asarray(lengths, np.int32)
    fits = prompt.ndim == 2 and lengths.shape == prompt.shape[:1] and lengths.size
    if not fits or lengths.min() < 1 or lengths.max() > prompt.shape[1]:
        raise ValueError(f"prompt lengths {lengths} do not fit prompts of shape {prompt.shape}")
    known = (prompt >= 0) & (prompt < vocabulary)
    unknown = np.argwhere(~known & (np.arange(prompt.shape[1]) < lengths[:, None]))
    if unknown.size:
        row, place = unknown[0]
        raise ValueError(
            f"token {prompt[row, place]} at place {place} of prompt {row} is outside the model's vocabulary of "
            f"{vocabulary}; is the tokenizer that of the model?"
        )
    return prompt, lengths


def checked_limits(limits: Any, samples: tuple[int, int], config: SamplingConfig) -> np.ndarray:
    """The most tokens of each of P × G `samples` as the program takes them.

    Raises:
        ValueError: they are not one for each, or out of range.
    """
    limits, longest = np.asarray(limits, np.int32), config.max_tokens
    outside = limits[(limits < 1) | (limits > longest)]
    if limits.shape != samples or outside.size:
        prompts, group = samples
        raise ValueError(
            f"limits of shape {limits.shape} for {prompts} prompts × {group} samples must be one for "
            f"each, from 1 to sampling.max_tokens={longest}; outside of that are {outside[:8].tolist()}"
        )
    return limits


def checked_history(
    history: tuple[Any, Any], samples: tuple[int, int], config: SamplingConfig, vocabulary: int
) -> tuple[np.ndarray, np.ndarray]:
    """Earlier completions of P × G `samples`, and their lengths, as the program takes them.

    Raises:
        ValueError: they do not fit, have tokens outside the vocabulary, or are not asked for.
    """
    if config.speculate != "history":
        raise ValueError(f"sampling.speculate={config.speculate} proposes no history: set it to history")
    tokens, lengths = (np.asarray(part, np.int32) for part in history)
    shape = (*samples, config.max_tokens)
    if tokens.shape != shape or lengths.shape != samples or lengths.min() < 0 or lengths.max() > config.max_tokens:
        prompts, group = samples
        raise ValueError(
            f"a history of shape {tokens.shape} with lengths of shape {lengths.shape} must be one completion of at "
            f"most sampling.max_tokens={config.max_tokens} tokens for each of {prompts} prompts × {group} samples"
        )
    known = (tokens >= 0) & (tokens < vocabulary)
    if not known[np.arange(config.max_tokens) < lengths[..., None]].all():
        raise ValueError(f"the history has tokens outside the vocabulary of {vocabulary}")
    return np.where(known, tokens, 0), lengths


def check_cut(model: Transformer, mesh: jax.sharding.Mesh, own: jax.sharding.Mesh) -> None:
    """Checks that a model can be cut as its sampler wants.

    Args:
        model: the model, or the one with rounded weights.
        mesh: the learner's.
        own: the sampler's (`sampling_mesh`).

    Raises:
        ValueError: a parameter or the heads cannot be divided; names the setting that `tensor` is by.
    """
    try:
        model.shardings(own)
    except ValueError as error:
        if head_shards(own) == head_shards(mesh):
            raise
        raise ValueError(str(error).replace("mesh.tensor", "sampling.tensor")) from error


def row_split(prompts: int, group: int, mesh: jax.sharding.Mesh, *, greedy: bool = False) -> int:
    """Into how many rows the completions of a prompt must be dealt, so that rows fill a mesh.

    Args:
        prompts: P.
        group: completions of each.
        mesh: the sampler's (`sampling_mesh`), on which all that is not `tensor` splits rows.
        greedy: whether the greedy one is among the completions; for the message.

    Raises:
        ValueError: there is no such number.
    """
    shards = row_shards(mesh)
    for split in range(1, group + 1):
        if group % split == 0 and prompts * split % shards == 0:
            return split
    raise ValueError(
        f"{prompts} prompts × {group} samples{' (the greedy one counted)' * greedy} cannot be split over the {shards} "
        "row shards of the sampler (the devices / tensor, those along mesh.context among them); make one of them a "
        "multiple of it, or set a larger sampling.tensor"
    )
