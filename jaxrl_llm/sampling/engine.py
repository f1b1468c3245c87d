"""The compiled sampler: one XLA program for a mesh, from prompts to a rollout."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.device_memory import readable, smallest_device_memory
from jaxrl_llm.models.config import DType, Params
from jaxrl_llm.models.integers import rounded
from jaxrl_llm.models.lora import merge_adapters, read_by_sampler
from jaxrl_llm.models.tensor_heads import with_whole_parts
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.models.unrolling import compiler_options
from jaxrl_llm.sampling.attention import choose
from jaxrl_llm.sampling.caches import page_tokens
from jaxrl_llm.sampling.checks import (
    check_batch_invariant,
    check_cut,
    check_positions,
    checked_history,
    checked_limits,
    checked_prompts,
    row_split,
)
from jaxrl_llm.sampling.decode import row_keys, sample
from jaxrl_llm.sampling.footprint import Batch, Footprint
from jaxrl_llm.sampling.layout import common_mesh, everywhere, gather_for_sampling, sampling_mesh
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sampling.stop_texts import StopTexts
from jaxrl_llm.sharding import constrain, replicated, row_shards, rows_or_whole
from jaxrl_llm.types import Rollout


class Sampler:
    """Samples `group` completions of each prompt of a batch.

    Inside the program adapters are merged, and the parameters cast to the rollout type and brought to the sampler's
    own layout (`sampling_mesh`), once, before the loop, so that no weight moves per decoded token. Where `tensor` is
    more than the heads of keys and values, these are repeated (`tensor_heads.py`), and the caches hold the repeated
    ones: a device's part of them is a whole head. The rollout is replicated over the mesh, since it is small and the
    host of each process reads it; what it has many of for each token lies with its prompts' rows (`shardings`).

    Args:
        model: the transformer.
        config: distribution, longest completion, slots, shards of the weights.
        group: G, completions per prompt.
        stop_tokens: ids that end a completion.
        mesh: the device mesh, on which the parameters lie.
        dtype: type of the parameters while decoding; `None`: the model's compute type.
        greedy: decode one more completion of each prompt greedily, in the same program; it is the last of its group.
        tokenizer: of the model, where `config.stop` has texts: they are found in the bytes of its tokens.
        keep_mask: write down which tokens each was drawn from (`Rollout.kept`).
        keep_experts: write down which experts computed each token (`Rollout.experts`).
        resident: bytes that are taken on each device while it samples, the parameters included, for `slots="auto"`;
            `None`: the parameters alone.
        memory: bytes that each device has, for `slots="auto"`; `None`: the devices are asked, and processes agree on
            the least that one of them has, so that all must make the sampler.

    Raises:
        ValueError: these do not fit together, the bytes of tokens are not known, or the model's heads and parameters
            cannot be cut as the sampler wants.
    """

    def __init__(
        self,
        model: Transformer,
        config: SamplingConfig,
        *,
        group: int,
        stop_tokens: tuple[int, ...],
        mesh: jax.sharding.Mesh,
        dtype: DType | None = None,
        greedy: bool = False,
        tokenizer: Any = None,
        keep_mask: bool = False,
        keep_experts: bool = False,
        resident: int | None = None,
        memory: float | None = None,
    ):
        if group < 1:
            raise ValueError(f"samples per prompt must be at least 1, got {group}")
        outside = [token for token in stop_tokens if not 0 <= token < model.config.vocab_size]
        if outside:
            raise ValueError(f"stop tokens {outside} are outside the vocabulary of {model.config.vocab_size}")
        config.check_vocabulary(model.config.vocab_size)
        if keep_mask:
            config.check_keeps_mask()
        self.kept, self.keep_experts = (config.top_k or 0) if keep_mask else 0, keep_experts
        self.model, self.config, self.group, self.greedy = model, config, group + greedy, greedy
        self.stop_tokens, self._stop_texts = tuple(stop_tokens), None
        if config.stop:
            if tokenizer is None:
                raise ValueError(f"sampling.stop={config.stop!r} are found in the tokens' bytes: pass the tokenizer")
            self._stop_texts = StopTexts.of(config.stop, tokenizer, model.config.vocab_size)
        self.mesh, self._own_mesh = mesh, sampling_mesh(mesh, config.tensor)
        check_cut(model, mesh, self._own_mesh)
        with jax.sharding.use_abstract_mesh(self._own_mesh.abstract_mesh):
            choose(config.attention, page_tokens())  # raises if it is of another platform
        self.dtype = jnp.dtype(dtype or model.config.dtype)
        if model.config.batch_invariant:
            check_batch_invariant(model.config, config, self.dtype)
        self._read = self._model_read()
        self._axes = read_by_sampler(self._read.logical_axes(), self._read.config)
        self._resident, self._memory = resident, memory
        if config.slots == "auto" and memory is None:
            self._memory = smallest_device_memory(mesh)
        self._programs: dict[bool, Any] = {}

    def _model_read(self) -> Transformer:
        """The model, or the one with rounded weights that completions are drawn from.

        Raises:
            ValueError: its weights cannot be rounded, or what they become not be cut.
        """
        dtype, config = self.config.weights_dtype, self.model.config
        if dtype is None:
            return self.model
        others = {"model.base_dtype": config.base_dtype, "model.batch_invariant": config.batch_invariant}
        if names := [name for name, value in others.items() if value]:
            raise ValueError(f"sampling.weights_dtype={dtype} is not for {names[0]}: leave out one of them")
        read = self.model.rounded(dtype)
        check_cut(read, self.mesh, self._own_mesh)
        return read

    def __call__(
        self,
        params: Params,
        prompt: np.ndarray,
        prompt_lengths: np.ndarray,
        key: Any,
        step: Any,
        limits: np.ndarray | None = None,
        history: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> Rollout:
        """Samples; returns at once, with the arrays still being computed.

        Args:
            params: parameters of the model, sharded or not.
            prompt: `[P, Tp]` int32, right-padded.
            prompt_lengths: `[P]` int32, 1 to Tp.
            key: root of the run's randomness, uint32 key data.
            step: number that is folded into the key, so that steps never repeat each other's noise.
            limits: `[P, G]`, the greedy one included: the most tokens of each completion; `None`: max_tokens.
            history: earlier completions `[P, G, Tc]` of the same prompts, the greedy one included, and their lengths
                `[P, G]`, 0 where there is none: what sampling.speculate=history proposes. `None`: there are none.

        Raises:
            ValueError: a prompt is empty or longer than its row or has tokens that the model does not know, or
                prompt and completion exceed the model's positions, or the rows cannot be split over the mesh, or a
                limit is out of range, or there is a history that does not fit, or that is not asked for, or not one
                completion fits into memory.
        """
        vocabulary = self.model.config.vocab_size
        prompt, lengths = checked_prompts(prompt, prompt_lengths, vocabulary)
        self.check_length(lengths.max())
        self.row_split(prompt.shape[0])
        samples = len(prompt), self.group
        if limits is not None:
            limits = checked_limits(limits, samples, self.config)
        if history is not None:
            history = checked_history(history, samples, self.config, vocabulary)
        with jax.set_mesh(self.mesh):
            return self.program(len(prompt))(params, prompt, lengths, key, np.asarray(step, np.int32), limits, history)

    def program(self, prompts: int) -> Any:
        """`sample`, jitted for so many prompts."""
        has_rows = prompts % row_shards(self.mesh) == 0
        if has_rows not in self._programs:
            out, options = self.shardings(prompts), compiler_options(self.model.config, self.mesh)
            self._programs[has_rows] = jax.jit(self.sample, out_shardings=out, compiler_options=options)
        return self._programs[has_rows]

    def trace(self, params: Params, prompts: int, width: int, key: jax.Array) -> jax.stages.Traced:
        """What a call without limits and history compiles, before it is compiled.

        Args:
            params: as in the call, or abstract with the same shardings.
            prompts: P.
            width: Tp.
            key: of whose shape and type the root of randomness is.
        """
        tokens, lengths, step = (jax.ShapeDtypeStruct(shape, np.int32) for shape in ((prompts, width), (prompts,), ()))
        root = jax.ShapeDtypeStruct(key.shape, key.dtype)
        with jax.set_mesh(self.mesh):
            return self.program(prompts).trace(params, tokens, lengths, root, step, None, None)

    def check_length(self, longest: int, *, width: int = 0) -> None:
        """Checks that the model has positions for the longest prompt and a completion.

        Args:
            longest: tokens of the longest prompt.
            width: Tp, to which prompts are padded.

        Raises:
            ValueError: it has not.
        """
        check_positions(self.model.config, longest, self.config, width=width)

    def row_split(self, prompts: int) -> int:
        """Into how many rows the completions of a prompt are dealt, so that rows fill the mesh.

        Raises:
            ValueError: as `row_split`.
        """
        return row_split(prompts, self.group, self._own_mesh, greedy=self.greedy)

    def footprint(self, prompts: int, width: int) -> Footprint:
        """What sampling takes of a device's memory.

        Args:
            prompts: P.
            width: Tp, to which they are padded.

        Raises:
            ValueError: as `row_split`.
        """
        split, shards = self.row_split(prompts), row_shards(self._own_mesh)
        returned = shards / (1 if prompts % row_shards(self.mesh) else row_shards(self.mesh))
        batch = Batch(prompts * split // shards, self.group // split, width, self.config.max_tokens, shards, returned)
        return Footprint(
            *(self._read, self.config, self.mesh, self._own_mesh, self.dtype, batch, self._resident, self.kept),
            keep_experts=self.keep_experts,
            learner=None if self._read is self.model else self.model,
        )

    def slots(self, prompts: int, width: int) -> int:
        """Completions that are decoded at a time on a device, the same number on all.

        Args:
            prompts: P.
            width: Tp, to which they are padded.

        Raises:
            ValueError: as `row_split`; or it is to be chosen by memory, in which not one completion has room.
        """
        footprint, slots = self.footprint(prompts, width), self.config.slots
        completions = footprint.batch.completions
        if slots != "auto":
            return min(slots or completions, completions)
        if self._memory is None:
            return completions
        if fitting := footprint.most_slots(self._memory):
            return fitting
        raise ValueError(
            f"sampling.slots=auto: one completion at a time needs {_told(footprint.needs(1))} on a device, which has "
            f"{readable(self._memory)}: raise sampling.tensor (weights and caches) or mesh.fsdp (parameters and "
            "optimizer), or lower sampling.max_tokens, the prompts' length, or the prompts and samples of a step"
        )

    def how_slots_are_chosen(self, prompts: int, width: int) -> str:
        """A sentence on `slots="auto"`; of other slots there is nothing to be told. Arguments as for `slots`."""
        if self.config.slots != "auto":
            return ""
        slots, footprint = self.slots(prompts, width), self.footprint(prompts, width)
        every = footprint.batch.completions
        if self._memory is None:
            return f" sampling.slots=auto: all {every} completions of a device, whose memory is not known."
        chosen = f"all {every}" if slots == every else f"{slots} of the {every}"
        return (
            f" sampling.slots=auto: {chosen} completions of a device at a time, which need "
            f"{_told(footprint.needs(slots))} of its {readable(self._memory)}."
        )

    def sample(
        self,
        params: Params,
        prompt: jax.Array,
        prompt_lengths: jax.Array,
        key: jax.Array,
        step: jax.Array,
        limits: jax.Array | None = None,
        history: tuple[jax.Array, jax.Array] | None = None,
    ) -> Rollout:
        """The program, to be compiled under `jax.set_mesh`, on its own or as a part of another; see `__call__`."""
        trunk = {name: params[name] for name in self._axes}  # heads have no part in it
        merged = trunk if self.model.config.base_dtype else merge_adapters(trunk, self.model.config)
        if self.config.weights_dtype is not None:
            merged = rounded(merged, self.config.weights_dtype, self._axes)
        with jax.sharding.use_abstract_mesh(self._own_mesh.abstract_mesh):
            ours = gather_for_sampling(merged, self._axes, self.dtype, self.mesh)
            given = (prompt, prompt_lengths, key, step, limits, history)
            given = everywhere(given, common_mesh(self.mesh, self._own_mesh))
            given = everywhere(given, self._own_mesh)
            rollout = self._sample(with_whole_parts(ours, self._read.config), *given)
        return jax.tree.map(jax.lax.with_sharding_constraint, rollout, self.shardings(len(prompt)))

    def shardings(self, prompts: int) -> Rollout:
        """Where the arrays of a rollout of so many prompts lie on the learner's mesh.

        What has many numbers of each token lies with the rows of its prompts, the others whole on each device: of 2048
        completions of 4096 tokens, 8 experts in each of 48 layers are 6 GiB.
        """
        whole: Any = replicated(self.mesh)
        wide: Any = rows_or_whole(self.mesh, prompts)
        of_experts = wide if self.keep_experts and self.model.config.experts is not None else None
        return Rollout(
            *(whole,) * 7,
            kept=wide if self.kept else None,
            passes=whole if self.config.drafts else None,
            experts=of_experts,
            prompt_experts=of_experts,
        )

    def placed(self, rollout: Any) -> Any:
        """A rollout of arrays that each process has whole, laid out as if it had been sampled so."""
        lies = self.shardings(len(rollout.prompt))
        return jax.tree.map(lambda x, own: jax.make_array_from_callback(x.shape, own, x.__getitem__), rollout, lies)

    def _sample(
        self,
        params: Params,
        prompt: jax.Array,
        prompt_lengths: jax.Array,
        key: jax.Array,
        step: jax.Array,
        limits: jax.Array | None,
        history: tuple[jax.Array, jax.Array] | None,
    ) -> Rollout:
        """The program on the sampler's own mesh."""
        prompts, group = prompt.shape[0], self.group
        split = self.row_split(prompts)
        root = jax.random.wrap_key_data(key)
        keys = row_keys(root, jnp.arange(prompts), group, before=(step, 0)).reshape(prompts * split, group // split)
        rows = constrain(jnp.repeat(prompt, split, axis=0), "rows", None)
        lengths = constrain(jnp.repeat(prompt_lengths, split), "rows")
        greedy = None
        if self.greedy:
            is_last = jnp.broadcast_to(jnp.arange(group) == group - 1, (prompts, group))
            greedy = is_last.reshape(keys.shape)
        rollout = sample(
            self._read,
            params,
            rows,
            lengths,
            keys,
            mesh=self._own_mesh,
            config=self.config,
            stop_tokens=self.stop_tokens,
            stop_texts=self._stop_texts,
            slots=self.slots(prompts, prompt.shape[1]),
            greedy=greedy,
            limits=None if limits is None else limits.reshape(keys.shape),
            kept=self.kept,
            keep_experts=self.keep_experts,
            history=jax.tree.map(lambda x: x.reshape(*keys.shape, *x.shape[2:]), history),
        )
        whole = {name: values.reshape(prompts, group, *values.shape[2:]) for name, values in rollout.of_samples.items()}
        of_prompts = rollout.prompt_experts
        of_prompts = None if of_prompts is None else of_prompts[::split]  # each was computed for each of its rows
        return rollout.replace(prompt=prompt, prompt_lengths=prompt_lengths, prompt_experts=of_prompts, **whole)


def _told(needs: dict[str, int]) -> str:
    """Bytes in all, and their parts, the largest first."""
    parts = ", ".join(f"{what} {readable(size)}" for what, size in sorted(needs.items(), key=lambda item: -item[1]))
    return f"{readable(sum(needs.values()))} ({parts})"
