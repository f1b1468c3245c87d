"""Sampling without training: prompts in, texts out."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxrl_llm.data.messages import check_messages
from jaxrl_llm.data.tokens import encode_prompt, opened_thought
from jaxrl_llm.launch.loading import Policy, check_writes, mesh_of
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.layout import sampling_mesh
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import row_shards
from jaxrl_llm.training.episodes.reading import completion_text

_WIDTHS = 64
"""Prompts are padded to multiples of it, so that calls with other prompts share a program."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """One completion of a prompt."""

    text: str
    """Without the token or the text that ended it."""
    tokens: list[int]
    """Ids, the token that ended it included: a stop token, or the one that completes a stop text."""
    logprobs: list[float]
    """Of each token under the model: temperature 1, no truncation."""
    finished: bool
    """It ended by itself, not at `sampling.max_tokens`."""


def generate(
    policy: Policy,
    prompts: Sequence[str | list[dict[str, Any]]],
    *,
    sampling: SamplingConfig | None = None,
    samples: int = 1,
    stop: Sequence[str] = (),
    seed: int = 0,
    mesh: jax.sharding.Mesh | None = None,
) -> list[list[Completion]]:
    """Completes prompts with the sampler that training uses.

    >>> policy = load_policy(ModelSource("SmolLM2-135M-Instruct.gguf"), make_mesh())
    >>> [[answer]] = generate(policy, [[{"role": "user", "content": "Name a color."}]])

    All prompts are one program, which later calls with as many and about as long ones use again; `sampling.slots`
    bounds how many completions are in memory at a time. The same call gives the same completions, and those of a prompt
    depend on its place among the prompts, not on how many there are.

    Args:
        policy: the model with its tokenizer, as `load_policy` gives it.
        prompts: texts or conversations, which the chat template writes.
        sampling: distribution, longest completion, slots; `None`: the defaults of `SamplingConfig`.
        samples: completions of each prompt.
        stop: texts that end a completion, beside those of `sampling.stop`: it is sampled no further than to the token
            that completes one of them, and cut where the first to be complete begins.
        seed: of the noise.
        mesh: the devices to sample on; `None`: those on which the parameters lie.

    Returns:
        For each prompt its completions.

    Raises:
        ValueError: there are no prompts, one is empty or cannot be encoded, a stop text cannot be looked for, prompt
            and completion exceed the model's positions, or history is to be proposed.
    """
    if not prompts:
        raise ValueError("there are no prompts: pass one at least")
    if isinstance(prompts, str) or isinstance(stop, str):
        raise ValueError("prompts and stop are lists of texts: put the text into one")
    check_writes(policy)
    mesh, tokenizer = mesh or mesh_of(policy), policy.tokenizer
    encoded = []
    for number, prompt in enumerate(prompts):
        try:
            encoded.append(encode_prompt(prompt if isinstance(prompt, str) else check_messages(prompt), tokenizer))
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}") from error
    sampling = sampling or SamplingConfig()
    sampling = dataclasses.replace(sampling, stop=tuple(dict.fromkeys((*sampling.stop, *stop))))
    sampling.check_no_epochs("generate")
    shards = row_shards(sampling_mesh(mesh, sampling.tensor))
    unit = shards // math.gcd(samples, shards)  # of so many prompts, samples fill the devices
    rows = -(-len(encoded) // unit) * unit  # the last one is sampled again, and left out
    lengths = np.array([len(ids) for ids in encoded] + [len(encoded[-1])] * (rows - len(encoded)), np.int32)
    width = min(-(-int(lengths.max()) // _WIDTHS) * _WIDTHS, policy.model.config.longest_text)
    tokens = np.zeros((rows, max(width, lengths.max())), np.int32)
    for row in range(rows):
        tokens[row, : lengths[row]] = encoded[min(row, len(encoded) - 1)]
    sampler = _sampler(policy.model, sampling, samples, tuple(policy.stop_tokens), mesh, tokenizer)
    key = np.asarray(jax.random.key_data(jax.random.key(seed)))
    rollout = jax.device_get(sampler(policy.params, tokens, lengths, key, 0))

    def completion(row: int, sample: int) -> Completion:
        length, finished = rollout.completion_lengths[row, sample], bool(rollout.finished[row, sample])
        ids = rollout.completion[row, sample, :length].tolist()
        logprobs = rollout.logprobs[row, sample, :length].tolist()
        by_token = finished and ids[-1] in policy.stop_tokens
        text, opening = completion_text(ids, tokenizer, finished=by_token), opened_thought(encoded[row], tokenizer)
        ends = [(at + len(one), at) for one in sampling.stop if (at := text.find(one)) >= 0]
        cut = min(ends)[1] if ends else len(text)
        return Completion(opening + text[:cut], ids, logprobs, finished)

    return [[completion(row, sample) for sample in range(samples)] for row in range(len(encoded))]


@functools.lru_cache(maxsize=8)
def _sampler(
    model: Transformer,
    sampling: SamplingConfig,
    samples: int,
    stop_tokens: tuple[int, ...],
    mesh: jax.sharding.Mesh,
    tokenizer: Any,
) -> Sampler:
    """One sampler for all calls with these, so that they share its compiled programs."""
    return Sampler(model, sampling, group=samples, stop_tokens=stop_tokens, mesh=mesh, tokenizer=tokenizer)
