"""Beam search over the steps of a solution, guided by a process reward model: one program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.advantages.selection import select_beams
from jaxrl_llm.checks import check_fields, count
from jaxrl_llm.masking import length_mask
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import replicated


@dataclasses.dataclass(frozen=True)
class BeamSearchConfig:
    """The size of a search (defaults as in Snell et al. 2024)."""

    beams: int = 4
    """N, solutions that are written at a time for a prompt."""
    width: int = 4
    """How many beams continue each one that is kept: N / width are. Divides the number of beams."""
    max_steps: int = 40
    """Steps of a solution."""
    max_step_tokens: int = 128
    """Tokens of a step; a longer one is gone on with as the next."""

    def __post_init__(self) -> None:
        """Rejects counts that cannot be meant."""
        counts = {field: count(value) for field, value in dataclasses.asdict(self).items()}
        check_fields("search", self, **counts)
        check_fields("search", self, width=(self.beams % self.width == 0, f"divide beams={self.beams}"))


class Prefixes(NamedTuple):
    """Solutions as far as they are written: what a search scores."""

    prompt: jax.Array
    """`[P, Tp]`."""
    prompt_lengths: jax.Array
    """`[P]`."""
    completion: jax.Array
    """`[P, N, Tc]`."""
    mask: jax.Array
    """`[P, N, Tc]` bool: tokens so far."""
    finished: jax.Array
    """`[P, N]` bool: ended by a stop token."""


class Beams(NamedTuple):
    """N solutions of each prompt."""

    completion: jax.Array
    """`[P, N, Tc]` int32, right-padded with 0."""
    completion_lengths: jax.Array
    """`[P, N]` int32."""
    finished: jax.Array
    """`[P, N]` bool: ended by a stop token; others were cut off."""
    scores: jax.Array
    """`[P, N]` float32."""
    mask: jax.Array
    """`[P, N]` bool: False where there is no further solution."""


class BeamSearch:
    """Writes solutions step by step and goes on with the best beginnings only.

    All beams of a prompt are continued to the end of their next step, and every beginning is scored. Those that are
    complete leave the search; copies of another are dropped; the best N / width of the rest are continued `width`
    times each. Where fewer are left, these get the free places. A prompt is done once N solutions are complete.

    Args:
        model: the policy's transformer.
        score: `(score_params, Prefixes) -> [P, N]`, from `make_solution_score`.
        config: beams, width, limits.
        sampling: how tokens are drawn: at a positive temperature, so that copies part; `max_tokens` is Tc, the longest
            solution.
        separators: ids that end a step.
        stop_tokens: ids that end a solution.
        mesh: the device mesh.

    Raises:
        ValueError: settings that cannot work; names them.

    Source: Snell et al. 2024, "Scaling LLM test-time compute optimally" (2408.03314).
    """

    def __init__(
        self,
        model: Transformer,
        score: Callable[[Any, Any], jax.Array],
        config: BeamSearchConfig,
        *,
        sampling: SamplingConfig,
        separators: tuple[int, ...],
        stop_tokens: tuple[int, ...],
        mesh: jax.sharding.Mesh,
    ):
        if sampling.greedy and config.width > 1:
            raise ValueError(f"at temperature 0 the {config.width} continuations of a beam would be the same one")
        if sampling.stop:
            raise ValueError(f"sampling.stop={sampling.stop!r}: a search ends texts by stop tokens alone; leave it out")
        sampling.check_no_epochs("a beam search")
        both = set(separators) & set(stop_tokens)
        if both or not separators:
            raise ValueError(f"separators {separators} must be given, and be no stop tokens {stop_tokens}")
        self.model, self.score, self.config, self.max_tokens = model, score, config, sampling.max_tokens
        self.stop_tokens, self.mesh = stop_tokens, mesh
        self.sampler = Sampler(
            model,
            dataclasses.replace(sampling, max_tokens=min(config.max_step_tokens, sampling.max_tokens), slots=None),
            group=1,
            stop_tokens=(*separators, *stop_tokens),
            mesh=mesh,
        )
        self._program = jax.jit(self.search, out_shardings=replicated(mesh))

    def __call__(
        self, params: Params, score_params: Any, prompt: np.ndarray, prompt_lengths: np.ndarray, key: Any, step: Any
    ) -> Beams:
        """Searches; returns at once, with the arrays still being computed.

        Args:
            params: the policy's parameters.
            score_params: what the score reads.
            prompt: `[P, Tp]` int32, right-padded.
            prompt_lengths: `[P]` int32, 1 to Tp.
            key: root of the randomness, uint32 key data.
            step: number that is folded into the key.

        Returns:
            Solutions, complete ones first, then the best first; those of a prompt that ran out of steps or tokens
            follow.

        Raises:
            ValueError: prompt lengths that do not fit, or too few positions in the model.
        """
        prompt, lengths = np.asarray(prompt, np.int32), np.asarray(prompt_lengths, np.int32)
        if (
            prompt.ndim != 2
            or lengths.shape != prompt.shape[:1]
            or lengths.min() < 1
            or lengths.max() > prompt.shape[1]
        ):
            raise ValueError(f"prompt lengths {lengths} do not fit prompts of shape {prompt.shape}")
        limit = self.model.config.longest_text
        if lengths.max() + self.max_tokens > limit:
            raise ValueError(
                f"a prompt of {lengths.max()} tokens and sampling.max_tokens={self.max_tokens} exceed the model's "
                f"{limit} positions; shorten one of them"
            )
        with jax.set_mesh(self.mesh):
            return self._program(params, score_params, prompt, lengths, key, np.asarray(step, np.int32))

    def search(
        self,
        params: Params,
        score_params: Any,
        prompt: jax.Array,
        prompt_lengths: jax.Array,
        key: jax.Array,
        step: jax.Array,
    ) -> Beams:
        """The program, to be compiled; see `__call__`."""
        beams = self.config.beams
        noise = jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(key), step))

        def extend(written: Beams, number: jax.Array) -> Beams:
            """One more step of all beams, and their new scores."""
            rows, lengths = _joined(prompt, prompt_lengths, written)
            wide = rows.reshape(-1, rows.shape[-1])
            rollout = self.sampler.sample(params, wide, lengths.reshape(-1), noise, number)
            new = rollout.completion.reshape(*written.mask.shape, -1)
            grown = _appended(written, new, rollout.completion_lengths.reshape(written.mask.shape))
            last = jnp.take_along_axis(grown.completion, grown.completion_lengths[..., None] - 1, axis=-1)
            finished = jnp.any(last == jnp.array(self.stop_tokens, jnp.int32), axis=-1)
            mask = length_mask(grown.completion_lengths, self.max_tokens)
            prefixes = Prefixes(prompt, prompt_lengths, grown.completion, mask, finished)
            return grown._replace(finished=finished, scores=self.score(score_params, prefixes).astype(jnp.float32))

        def advance(state: tuple[jax.Array, Beams, Beams]) -> tuple[jax.Array, Beams, Beams]:
            number, written, done = state
            grown = extend(written, number)
            active = grown.mask & ~_is_copy(grown)
            ended = grown.finished | (grown.completion_lengths == self.max_tokens)
            done = _best(done, grown._replace(mask=active & ended))
            going_on = active & ~ended & (jnp.sum(done.mask & done.finished, axis=-1, keepdims=True) < beams)
            return number + 1, self._selected(grown._replace(mask=going_on)), done

        def unfinished(state: tuple[jax.Array, Beams, Beams]) -> jax.Array:
            return (state[0] < self.config.max_steps) & jnp.any(state[1].mask)

        blank = Beams(
            completion=jnp.zeros((prompt.shape[0], beams, self.max_tokens), jnp.int32),
            completion_lengths=jnp.zeros((prompt.shape[0], beams), jnp.int32),
            finished=jnp.zeros((prompt.shape[0], beams), bool),
            scores=jnp.zeros((prompt.shape[0], beams)),
            mask=jnp.ones((prompt.shape[0], beams), bool),
        )
        nothing = blank._replace(mask=jnp.zeros_like(blank.mask))
        _, written, done = jax.lax.while_loop(unfinished, advance, (jnp.int32(0), blank, nothing))
        return _best(done, written._replace(mask=written.mask & ~_is_copy(written)))

    def _selected(self, grown: Beams) -> Beams:
        """The next beams: copies of the best, `width` each, or more where not enough are left."""
        order = select_beams(grown.scores, width=self.config.width, mask=grown.mask)[..., :: self.config.width]
        left = jnp.sum(jnp.take_along_axis(grown.mask, order, axis=-1), axis=-1, keepdims=True)
        kept = _take(grown, jnp.take_along_axis(order, jnp.arange(self.config.beams) % jnp.maximum(left, 1), axis=-1))
        return kept._replace(mask=jnp.broadcast_to(left > 0, kept.mask.shape))


def _take(beams: Beams, order: jax.Array) -> Beams:
    def one(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 2)), axis=1)

    return Beams(*map(one, beams))


def _best(beams: Beams, others: Beams) -> Beams:
    """The best N of two times N: such as there are, complete ones first, then by score."""
    every = Beams(*(jnp.concatenate(pair, axis=1) for pair in zip(beams, others, strict=True)))
    order = jnp.lexsort((-every.scores, ~every.finished, ~every.mask))
    return _take(every, order[:, : beams.mask.shape[1]])


def _is_copy(beams: Beams) -> jax.Array:
    """`[P, N]`: an earlier beam of the prompt has the same tokens."""
    same = jnp.all(beams.completion[:, :, None] == beams.completion[:, None], axis=-1)
    same &= (beams.completion_lengths[:, :, None] == beams.completion_lengths[:, None]) & beams.mask[:, None]
    return jnp.any(jnp.tril(same, k=-1), axis=-1)


def _joined(prompt: jax.Array, prompt_lengths: jax.Array, beams: Beams) -> tuple[jax.Array, jax.Array]:
    """Prompts with what is written behind them, `[P, N, Tp + Tc]`, and their lengths `[P, N]`."""
    width = beams.completion.shape[-1]
    place = jnp.arange(prompt.shape[1] + width) - prompt_lengths[:, None, None]  # in the completion
    index = jnp.broadcast_to(jnp.clip(place, 0, width - 1), (*beams.mask.shape, place.shape[-1]))
    tail = jnp.take_along_axis(beams.completion, index, axis=-1)
    head = jnp.pad(prompt, ((0, 0), (0, width)))[:, None]
    return jnp.where(place < 0, head, tail), prompt_lengths[:, None] + beams.completion_lengths


def _appended(beams: Beams, new: jax.Array, new_lengths: jax.Array) -> Beams:
    """Beams with `new` `[P, N, S]` behind what is written, as far as there is room."""
    width = beams.completion.shape[-1]
    place = jnp.arange(width) - beams.completion_lengths[..., None]  # in what is new
    tail = jnp.take_along_axis(new, jnp.clip(place, 0, new.shape[-1] - 1), axis=-1)
    is_new = (place >= 0) & (place < new_lengths[..., None])
    return beams._replace(
        completion=jnp.where(is_new, tail, beams.completion),
        completion_lengths=jnp.minimum(beams.completion_lengths + new_lengths, width),
    )
