"""The distribution that a token is drawn from, and the draw."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from jaxrl_llm.checks import check_fields, count, one_of
from jaxrl_llm.logprobs import IMPOSSIBLE
from jaxrl_llm.models.batch_invariant import scores_by_tile
from jaxrl_llm.models.config import BaseDType

SlotAttention = Literal["auto", "xla", "pallas", "pallas_interpret"]
Speculate = Literal["off", "prompt", "history"]
CacheDType = Literal["bfloat16", "int8"]

_LEAST_TEMPERATURE = 1e-3  # logits of float32 are known to about a millionth: divided by it, to a thousandth


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How completions are sampled."""

    max_tokens: int = 256
    """Longest completion, in tokens, the stop token included."""
    temperature: float = 1.0
    """Divisor of the logits; 0 decodes greedily."""
    top_k: int | None = None
    """Keep the k most likely tokens; of those as likely as the last one, the ones with the lowest ids."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches this (Holtzman et al. 2020)."""
    min_p: float = 0.0
    """Keep tokens at least this times as likely as the most likely one (Nguyen et al. 2024)."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion, beside its stop tokens: with the token that completes one, which is the last of the
    completion, whatever follows the text in it."""
    slots: int | Literal["auto"] | None = "auto"
    """Completions that are decoded at a time on a device, of whichever prompts; memory is theirs alone, and each that
    ends makes room for the next (`auto`: as many as fit into the device's memory; `None`: all of the batch). Devices
    that share the weights count as one."""
    speculate: Speculate = "off"
    """What proposes the next tokens of a completion, to be looked at in one pass through the model: prompt what
    followed the same tokens before, in the prompt and in the completion so far; history what the prompt got in the last
    epoch (in the first one as prompt). Each token is drawn as it would be without, so that only speed differs. It pays
    where a pass costs what reading the weights costs: with few slots of a large model."""
    speculative_tokens: int = 4
    """Tokens that are proposed for one pass."""
    scan_layers: bool | None = None
    """Compile the layers of the loop for completions in flight as one loop, so that compiling does not take longer the
    deeper a model is (`None`: as model.scan_layers, but on CPUs, where the loop would copy each layer's weights)."""
    attention: SlotAttention = "auto"
    """How completions in flight attend: by plain JAX (`xla`), or by a TPU kernel that reads of each completion what it
    sees, and a prompt once for neighbours that share it (`pallas`; `pallas_interpret` runs it anywhere, slowly).
    `auto`: the kernel on TPUs, where texts have 128 tokens and more."""
    cache_dtype: CacheDType | None = None
    """Type in which keys and values are kept until completions have ended (`None`: that in which layers make them).
    int8 has a float32 scale for each token and head, and room for up to twice or four times the slots. What is drawn is
    drawn by the kept numbers, so that sampler and learner differ by more (sampling/logp_gap_mean, _max)."""
    weights_dtype: BaseDType | None = None
    """Round the weights of the layers' linear maps to int8 or int4, with a scale for each 32, before sampling (`None`:
    they are the model's): a token then reads half or a third of bfloat16. Adapters are merged first. Sampler and
    learner differ by more (sampling/logp_gap_mean, _max): pair it with algorithm.correction."""
    tensor: int | None = None
    """Devices that share one copy of the weights while sampling: a multiple of mesh.tensor that divides the devices,
    the others split rows (`None`: mesh.tensor, so that each device holds its part of that whole)."""

    def __post_init__(self) -> None:
        """Rejects settings that describe no distribution."""
        for field, good in (
            ("max_tokens", self.max_tokens >= 1),
            ("temperature", self.temperature >= 0 and math.isfinite(self.temperature)),
            ("top_k", self.top_k is None or self.top_k >= 1),
            ("top_p", 0 < self.top_p <= 1),
            ("min_p", 0 <= self.min_p < 1),
            ("stop", isinstance(self.stop, tuple) and all(isinstance(text, str) and text for text in self.stop)),
            ("slots", self.slots in (None, "auto") or (isinstance(self.slots, int) and self.slots >= 1)),
            ("tensor", self.tensor is None or self.tensor >= 1),
            ("attention", self.attention in get_args(SlotAttention)),
        ):
            if not good:
                raise ValueError(f"sampling.{field}={getattr(self, field)!r} is out of range")
        check_fields(
            "sampling",
            self,
            speculate=one_of(self.speculate, Speculate),
            speculative_tokens=count(self.speculative_tokens),
            weights_dtype=(
                self.weights_dtype in (None, *get_args(BaseDType)),
                f"be None, or one of {get_args(BaseDType)}",
            ),
            cache_dtype=(
                self.cache_dtype in (None, *get_args(CacheDType)),
                f"be None, or one of {get_args(CacheDType)}",
            ),
        )
        if 0 < self.temperature < _LEAST_TEMPERATURE:
            raise ValueError(
                f"sampling.temperature={self.temperature!r} must be at least {_LEAST_TEMPERATURE}, below which neither "
                "log-probs nor their gradients have any precision, or 0 to decode greedily"
            )

    @property
    def without_effect(self) -> dict[str, str]:
        """Settings that change nothing as the others are, and what is missing."""
        return {"speculative_tokens": "set sampling.speculate, too"} if self.speculate == "off" else {}

    def check_no_epochs(self, what: str) -> None:
        """Raises ValueError if what the last epoch got is to be proposed to something that has none."""
        if self.speculate == "history":
            raise ValueError(f"{what} has no last epoch for sampling.speculate=history to propose from: set prompt")

    def check_vocabulary(self, size: int) -> None:
        """Raises ValueError if more tokens are to be kept than a model of `size` tokens has."""
        if (self.top_k or 0) > size:
            raise ValueError(f"sampling.top_k={self.top_k} is more than the {size} tokens of the model: leave it out")

    def check_keeps_mask(self) -> None:
        """Raises ValueError if it is not bounded how many tokens each is drawn from."""
        if self.top_k is None or self.greedy:
            raise ValueError(
                f"the sampling mask cannot be kept with sampling.top_k={self.top_k} and sampling.temperature="
                f"{self.temperature}: it is top_k ids a token, of which top_p and min_p leave fewer (alone, these "
                "bound nothing); set sampling.top_k, or leave out algorithm.keep_sampling_mask"
            )

    @property
    def drafts(self) -> int:
        """k, tokens that are proposed for a pass; 0 without speculation."""
        return 0 if self.speculate == "off" else self.speculative_tokens

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0

    def as_greedy(self) -> SamplingConfig:
        """The same, but that the most likely token is always taken."""
        return dataclasses.replace(self, temperature=0.0, top_k=None, top_p=1.0, min_p=0.0)

    @property
    def truncates(self) -> bool:
        """Whether some tokens are excluded."""
        return self.top_k is not None or self.top_p < 1 or self.min_p > 0


class Draw(NamedTuple):
    """Sampled tokens and their log-probs, each `[...]`."""

    token: jax.Array
    logprob: jax.Array
    """Under the model: temperature 1, no truncation."""
    sampler_logprob: jax.Array
    """Under the distribution that it was drawn from."""
    kept: jax.Array | None = None
    """`[..., k]` int32, where there is a top-k: the ids that it was drawn from, the most likely one first; −1: fewer
    than k were left."""


class Truncated(NamedTuple):
    """Logits of which some are impossible."""

    logits: jax.Array
    """`[..., V]`."""
    kept: jax.Array | None
    """`[..., k]` int32, as of `Draw`."""


def truncate(logits: jax.Array, config: SamplingConfig) -> Truncated:
    """Makes tokens outside top-k, then top-p, then min-p impossible.

    Each filter sees the distribution that the one before it left. Ties at the threshold of top-p and min-p are all
    kept.

    Args:
        logits: `[..., V]`, tempered.
        config: the filters.
    """
    if config.top_k is None:
        return Truncated(_by_mass(logits, config), None)
    values, ids = jax.lax.top_k(logits, min(config.top_k, logits.shape[-1]))  # of equal ones, the lowest ids first
    values = _by_mass(values, config)
    kept = jnp.exp(values - values[..., :1]) > 0
    last = jnp.sum(kept, axis=-1, keepdims=True) - 1
    threshold, last = (jnp.take_along_axis(x, last, axis=-1) for x in (values, ids))
    within = (logits > threshold) | ((logits == threshold) & (jnp.arange(logits.shape[-1]) <= last))
    return Truncated(jnp.where(within, logits, IMPOSSIBLE), jnp.where(kept, ids, -1))


def _by_mass(logits: jax.Array, config: SamplingConfig) -> jax.Array:
    """Makes tokens outside top-p, then min-p impossible."""
    if config.top_p < 1:
        descending = -jnp.sort(-logits, axis=-1)
        probabilities = jax.nn.softmax(descending, axis=-1)
        above = jnp.cumsum(probabilities, axis=-1) - probabilities  # mass of strictly more likely tokens
        threshold = jnp.min(jnp.where(above < config.top_p, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= threshold, logits, IMPOSSIBLE)
    if config.min_p > 0:
        threshold = jnp.max(logits, axis=-1, keepdims=True) + math.log(config.min_p)
        logits = jnp.where(logits >= threshold, logits, IMPOSSIBLE)
    return logits


def folded(key: jax.Array, *numbers: jax.typing.ArrayLike) -> jax.Array:
    """The PRNG key with one number after the other folded in, for each entry of their common shape.

    One loop over the numbers, of keys in a row: each fold of its own shape, and each axis, would be compiled anew.
    """
    each = jnp.stack(jnp.broadcast_arrays(*map(jnp.asarray, numbers)))

    def fold(keys: jax.Array, numbers: jax.Array) -> tuple[jax.Array, None]:
        return jax.vmap(jax.random.fold_in)(keys, numbers), None

    keys, _ = jax.lax.scan(fold, jnp.broadcast_to(key, each[0].size), each.reshape(len(numbers), -1))
    return keys.reshape(each.shape[1:])


def uniforms(keys: jax.Array, length: int) -> jax.Array:
    """The randomness of `length` draws: uniform on [0, 1), `[..., length, 2]`.

    Draw t of a row is made of the row's key with t folded in, so that it depends on nothing else.

    Args:
        keys: a PRNG key for each row, `[...]`.
        length: draws of each row.
    """

    def one(key: jax.Array, time: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(key, time), (2,))

    each, times = jnp.repeat(keys.ravel(), length), jnp.tile(jnp.arange(length), keys.size)
    return jax.vmap(one)(each, times).reshape(*keys.shape, length, 2)


def draw(uniform: jax.Array, logits: jax.Array, config: SamplingConfig, *, greedy: jax.Array | None = None) -> Draw:
    """Draws a token of each row.

    Args:
        uniform: two uniform numbers for each row, `[..., 2]`; see `uniforms`.
        logits: `[..., V]` float32 of the model, which may broadcast against the rows.
        config: temperature and filters.
        greedy: rows that take the most likely token all the same, bool `[...]`; `None`: none.

    Returns:
        `Draw` `[...]`.
    """
    if config.greedy:
        token = jnp.broadcast_to(jnp.argmax(logits, axis=-1), uniform.shape[:-1])
        logprob = _gather(logits, token) - jax.nn.logsumexp(logits, axis=-1)
        return Draw(token, logprob, jnp.zeros_like(logprob))
    tempered, kept = truncate(logits / config.temperature, config)
    kept = None if kept is None else jnp.broadcast_to(kept, (*uniform.shape[:-1], kept.shape[-1]))
    peak = jnp.max(tempered, axis=-1)
    weights = jnp.exp(tempered - peak[..., None])
    token = _inverse_cdf(uniform, weights)
    if greedy is not None:
        token = jnp.where(greedy, jnp.argmax(logits, axis=-1), token)
    sampler_logprob = _gather(tempered, token) - peak - jnp.log(jnp.sum(weights, axis=-1))
    if config.temperature == 1 and not config.truncates:
        return Draw(token, sampler_logprob, sampler_logprob)
    return Draw(token, _gather(logits, token) - jax.nn.logsumexp(logits, axis=-1), sampler_logprob, kept)


def scored_alike(drawn: Draw, logits: jax.Array, config: SamplingConfig, *, keeps_mask: bool) -> Draw:
    """What was drawn from `[N, V]`, with the log-probs that a batch-invariant learner gives it, to the bit.

    Those of a truncated distribution only with the mask, without which no learner scores by it.
    """
    of_model = scores_by_tile(logits, drawn.token).logprobs
    if config.greedy or (config.truncates and not keeps_mask):
        return drawn._replace(logprob=of_model)
    if config.temperature == 1 and not config.truncates:
        return drawn._replace(logprob=of_model, sampler_logprob=of_model)
    kept = drawn.kept if config.truncates else None
    scores = scores_by_tile(logits, drawn.token, kept, temperature=config.temperature)
    return drawn._replace(logprob=of_model, sampler_logprob=scores.logprobs)


def _gather(values: jax.Array, index: jax.Array) -> jax.Array:
    values = jnp.broadcast_to(values, (*index.shape, values.shape[-1]))
    return jnp.take_along_axis(values, index[..., None], axis=-1)[..., 0]


def _inverse_cdf(uniform: jax.Array, weights: jax.Array) -> jax.Array:
    """Index drawn with probability proportional to `weights` `[..., V]`.

    Two uniform numbers a row instead of V Gumbel ones: the first chooses a block of about √V entries by
    their sums, the second an entry of that block. Exact up to the 2⁻²³ grid of each uniform; entries of
    weight 0 are never chosen.
    """
    vocabulary = weights.shape[-1]
    block = block_size(vocabulary)
    weights = jnp.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(0, -vocabulary % block)])
    blocks = weights.reshape(*weights.shape[:-1], -1, block)
    chosen = _first_above(jnp.sum(blocks, axis=-1), uniform[..., 0])
    blocks = jnp.broadcast_to(blocks, (*chosen.shape, *blocks.shape[-2:]))
    entries = jnp.take_along_axis(blocks, chosen[..., None, None], axis=-2)[..., 0, :]
    return chosen * block + _first_above(entries, uniform[..., 1])


def block_size(vocabulary: int) -> int:
    """About √V; of a vocabulary that can be split evenly over 8 devices, a divisor of their parts.

    Then a sharded distribution is summed where it lies. On more devices the result is the same, by moving it.
    """
    largest, even = 1 << max(1, (vocabulary - 1).bit_length() // 2), (vocabulary & -vocabulary) // 8
    return min(largest, even) if even > 1 else largest


def _first_above(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """The first entry of positive weight at which the running sum exceeds `uniform` times the total."""
    running, entries = jnp.cumsum(weights, axis=-1), jnp.arange(weights.shape[-1])
    possible = weights > 0
    above = (running > uniform[..., None] * running[..., -1:]) & possible
    # Rounding may leave none above; the last entry of positive weight is then the one.
    first = jnp.min(jnp.where(above, entries, weights.shape[-1]), axis=-1)
    return jnp.minimum(first, jnp.max(jnp.where(possible, entries, -1), axis=-1))
