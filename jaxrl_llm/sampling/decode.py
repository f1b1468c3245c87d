"""Sampling as one pure function: which decoding loop, on which device which prompts, and the randomness of each row."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxrl_llm.masking import length_mask
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.in_flight import sample_in_flight
from jaxrl_llm.sampling.logits import SamplingConfig, folded, uniforms
from jaxrl_llm.sampling.sampled import Sampled, Wanted
from jaxrl_llm.sampling.stop_texts import StopTexts
from jaxrl_llm.sampling.together import ROOM, sample_together
from jaxrl_llm.sampling.weights import are_small
from jaxrl_llm.sharding import on_cpu, row_axes, row_shards
from jaxrl_llm.types import Rollout


def row_keys(key: jax.Array, prompt_index: jax.Array, group: int, *, before: tuple[Any, ...] = ()) -> jax.Array:
    """A PRNG key `[P, G]` for each completion: `key` with the prompt's index, then the sample's, folded in.

    So a row's sample does not depend on the batch that it is in. `before` are numbers that are folded in first.
    """
    return folded(key, *before, prompt_index[:, None], jnp.arange(group))


class Loop(NamedTuple):
    """Which loop decodes."""

    slots: int
    """Completions that are decoded at a time on a device."""
    together: bool
    """That of `together.py`, and not that of `in_flight.py`."""
    in_loops: bool
    """Layers are compiled as loops, see `Stack`; in `together.py` they never are."""

    @classmethod
    def of(cls, model: Transformer, layer: Params, config: SamplingConfig, *, slots: int, completions: int) -> Loop:
        """The loop for some of a device's completions.

        Args:
            model: the transformer.
            layer: parameters of one layer, abstract or not.
            config: longest completion, and whether layers are scanned.
            slots: completions that are decoded at a time.
            completions: of a device.
        """
        # Where a product costs less than what surrounds it, few large ones are faster than pages.
        in_one_product = config.max_tokens <= ROOM or (on_cpu() and are_small(layer))
        asked = config.drafts or config.scan_layers or config.attention != "auto" or config.cache_dtype
        if slots == completions and in_one_product and not asked and not model.config.batch_invariant:
            return cls(slots, True, False)
        in_loops = (not on_cpu() and model.config.scan_layers) if config.scan_layers is None else config.scan_layers
        return cls(slots, False, in_loops)


def sample(
    model: Transformer,
    params: Params,
    prompt: jax.Array,
    prompt_lengths: jax.Array,
    keys: jax.Array,
    *,
    mesh: Mesh,
    config: SamplingConfig,
    stop_tokens: tuple[int, ...],
    stop_texts: StopTexts | None = None,
    slots: int | None = None,
    greedy: jax.Array | None = None,
    limits: jax.Array | None = None,
    kept: int = 0,
    keep_experts: bool = False,
    history: tuple[jax.Array, jax.Array] | None = None,
) -> Rollout:
    """Samples G completions of each prompt.

    Args:
        model: the transformer.
        params: its parameters, in the type to decode with.
        prompt: `[P, Tp]` int32, right-padded.
        prompt_lengths: `[P]` int32, each at least 1.
        keys: `[P, G]` PRNG keys, see `row_keys`.
        mesh: the devices, whose abstract mesh is the ambient one.
        config: distribution and longest completion; of its slots nothing is read.
        stop_tokens: ids that end a completion; the one drawn is part of it.
        stop_texts: texts that do, with the token that completes one; `None`: none.
        slots: completions that are decoded at a time on a device; `None`: all.
        greedy: `[P, G]` bool: completions that are decoded greedily instead; `None`: none.
        limits: `[P, G]` int: the most tokens of each completion, 1 to Tc; `None`: Tc.
        kept: how many ids are written down of those that each token was drawn from: `config.top_k`, or 0.
        keep_experts: write down which experts computed each token.
        history: earlier completions `[P, G, Tc]` of the same prompts, which are proposed, and their lengths `[P, G]`, 0
            where there is none; `None`: there are none at all. They change no token.

    Returns:
        `Rollout`; positions beyond a completion's length hold token 0, log-prob 0 and no ids.
    """
    wanted = Wanted(prompt, prompt_lengths, uniforms(keys, config.max_tokens), greedy, limits, history)
    wanted = jax.tree.map(jnp.asarray, wanted)
    stops = {"stop_tokens": stop_tokens, "stop_texts": stop_texts}
    completions = keys.size // row_shards()
    slots = min(slots or completions, completions)
    loop = Loop.of(model, model.layers(params)[0], config, slots=slots, completions=completions)
    experts = None
    if keep_experts and model.config.experts is not None:
        experts = model.config.num_layers, model.config.experts.per_token
    if loop.together:
        sampled, of_prompts = sample_together(model, params, wanted, config=config, kept=kept, experts=experts, **stops)
    else:
        decode = functools.partial(
            *(sample_in_flight, model),
            slots=slots,
            in_loops=loop.in_loops,
            config=config,
            kept=kept,
            experts=experts,
            **stops,
        )

        def of_device(*given: Any, **rows: Any) -> tuple[Sampled, jax.Array | None]:
            state = decode(*given, **rows)
            return state.sampled, state.prompt_experts

        sampled, of_prompts = _on_each_device(of_device, mesh)(params, wanted)
        sampled = jax.tree.map(lambda x: x.reshape(*keys.shape, *x.shape[1:]), sampled)
    mask = length_mask(sampled.lengths, config.max_tokens)
    computed = length_mask(sampled.lengths - 1, config.max_tokens)
    return Rollout(
        prompt=prompt,
        prompt_lengths=prompt_lengths,
        completion=jnp.where(mask, sampled.completion, 0),
        completion_lengths=sampled.lengths,
        finished=sampled.finished,
        logprobs=jnp.where(mask, sampled.logprobs, 0.0),
        sampler_logprobs=jnp.where(mask, sampled.sampler_logprobs, 0.0),
        kept=None if sampled.kept is None else jnp.where(mask[..., None], sampled.kept, -1),
        passes=sampled.passes,
        experts=None if sampled.experts is None else jnp.where(computed[..., None, None], sampled.experts, -1),
        prompt_experts=of_prompts,
    )


def _on_each_device(sample: Callable[..., Any], mesh: Mesh) -> Callable[[Params, Wanted], Any]:
    """`sample` of each device's prompts, or of those of devices that share the weights along `tensor`."""
    axes = row_axes()
    of_device = functools.partial(sample, rows=axes)
    if not axes:
        return of_device
    return jax.shard_map(
        of_device,
        mesh=mesh,  # of the ambient abstract one JAX would take the learner's devices, which lie in other axes
        in_specs=(PartitionSpec(), PartitionSpec(axes)),
        out_specs=PartitionSpec(axes),
        axis_names=set(axes),
        check_vma=False,
    )
