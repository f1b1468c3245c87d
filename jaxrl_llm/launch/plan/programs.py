"""The programs of on-policy training as a trainer makes them, from abstract arguments with its shardings."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrl_llm.algorithms.optimizer import make_optimizer, make_schedule
from jaxrl_llm.algorithms.policy_gradient.update import make_update_step
from jaxrl_llm.algorithms.state import abstract_train_state
from jaxrl_llm.device_memory import bytes_per_device
from jaxrl_llm.launch.plan.settings import Plan
from jaxrl_llm.launch.plan.sizes import SIZES
from jaxrl_llm.launch.plan.slices import CHIPS
from jaxrl_llm.launch.plan.work import Work, sampling_work, update_work
from jaxrl_llm.models.checkpoints.pretrained import load_config
from jaxrl_llm.models.lora import abstract_reference, has_adapters, split_trainable
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sampling.traffic import Traffic, spread, traffic
from jaxrl_llm.sharding import replicated, sampling_mesh
from jaxrl_llm.types import Rollout

GIB = 2**30


class Program(NamedTuple):
    """A program of the training loop, before it is compiled."""

    name: str
    function: Any
    """Jitted."""
    arguments: tuple[Any, ...]
    """Abstract, with shardings."""
    resident: Any
    """Arrays that stay in memory while it runs and are none of its arguments."""
    parts: dict[str, int]
    """Bytes of a device by what they are for, as far as they are known before it is compiled."""
    work: Work
    """What it computes and reads."""
    remarks: tuple[str, ...] = ()
    """What else there is to say of it."""
    slots: int | None = None
    """Completions that it decodes at a time on a device."""


def build(plan: Plan, mesh: Mesh) -> list[Program]:
    """The sampler and the update step as the trainer makes them, with abstract arguments.

    Raises:
        ValueError: the numbers do not fit the mesh or the model.
    """
    model = model_of(plan, mesh)
    optimizer = make_optimizer(plan.optimizer, make_schedule(plan.optimizer, 1000))
    state = abstract_train_state(
        model, optimizer, mesh, rounding=plan.optimizer.rounding, offload=plan.optimizer.offload
    )
    needed = plan.algorithm.needs_reference and not has_adapters(state.params)  # without them, the policy is the base
    reference = abstract_reference(state.params, model.config.dtype) if needed else None

    parameters = bytes_per_device(state.params)
    parts = {
        "parameters": parameters,
        "optimizer": bytes_per_device(state) - parameters,
        "reference": bytes_per_device(reference),
    }
    beside = _Beside(plan, model, mesh, state, reference, parts)
    made = {"sampler": lambda: _sampler(beside), "update": lambda: _update(beside, optimizer)}
    return [make() for name, make in made.items() if name in plan.programs]


def model_of(plan: Plan, mesh: Mesh) -> Transformer:
    """The policy, as it is on the devices of `mesh`: what is left to `auto` is chosen for these, wherever one plans."""
    config = SIZES[plan.size] if plan.model.path is None else load_config(plan.model.path)
    if plan.layers is not None:
        config = dataclasses.replace(config, num_layers=plan.layers)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return Transformer(plan.model.applied_to(config))


class _Beside(NamedTuple):
    """What both programs are made of."""

    plan: Plan
    model: Transformer
    mesh: Mesh
    state: Any
    reference: Any
    parts: dict[str, int]

    def array(self, *shape: int, dtype: Any = jnp.int32) -> Any:
        """An abstract array that is whole on each device."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(self.mesh))


def _sampler(beside: _Beside) -> Program:
    plan, model, mesh, state, reference, parts = beside
    settings = SamplingConfig(
        max_tokens=plan.completion_tokens,
        slots=plan.slots,
        tensor=plan.sampling_tensor,
        attention=plan.sampling_attention,
        cache_dtype=plan.sampling_cache_dtype,
        weights_dtype=plan.sampling_weights_dtype,
    )
    chip, p, width = CHIPS.get(mesh.devices.flat[0].device_kind), plan.prompts, plan.prompt_tokens
    sampler = Sampler(
        model,
        settings,
        group=plan.samples,
        stop_tokens=(0,),
        mesh=mesh,
        keep_experts=plan.algorithm.keeps_experts,
        resident=bytes_per_device((state, reference)),
        memory=None if chip is None else chip.hbm_gib * GIB,
    )
    sampler.check_length(width)
    slots = sampler.slots(p, width)
    decoded = model if settings.weights_dtype is None else model.rounded(settings.weights_dtype)
    footprint, read = sampler.footprint(p, width), _traffic(plan, decoded, mesh, slots)
    needs = footprint.needs(slots)
    chosen = sampler.how_slots_are_chosen(p, width)
    return Program(
        "sampler",
        jax.jit(sampler.sample, out_shardings=replicated(mesh)),
        (state.params, beside.array(p, width), beside.array(p), state.key, beside.array()),
        resident=(state.opt_state, reference),
        parts=parts | {name: needs[name] for name in ("the sampler's own weights", "keys and values")},
        work=sampling_work(model.config, mesh, plan, slots, next(iter(read.values())), fills=footprint.fills(slots)),
        remarks=(*filter(None, [chosen.strip()]), _told(plan, slots, read)),
        slots=slots,
    )


def _update(beside: _Beside, optimizer: Any) -> Program:
    plan, model, mesh, state, reference, parts = beside
    p, g, tc, array = plan.prompts, plan.samples, plan.completion_tokens, beside.array
    rollout = Rollout(
        prompt=array(p, plan.prompt_tokens),
        prompt_lengths=array(p),
        completion=array(p, g, tc),
        completion_lengths=array(p, g),
        finished=array(p, g, dtype=jnp.bool),
        logprobs=array(p, g, tc, dtype=jnp.float32),
        sampler_logprobs=array(p, g, tc, dtype=jnp.float32),
    )
    if plan.algorithm.keeps_experts and model.config.experts is not None:
        of_token = model.config.num_layers, model.config.experts.per_token
        rollout = rollout.replace(
            experts=array(p, g, tc, *of_token, dtype=jnp.int16),
            prompt_experts=array(p, plan.prompt_tokens, *of_token, dtype=jnp.int16),
        )
    step = make_update_step(model, optimizer, plan.algorithm, plan.update)
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    trained, _ = split_trainable(state.params)
    gradients = bytes_per_device(jax.tree.map(lambda leaf: leaf.update(dtype=jnp.float32), trained))
    return Program(
        "update",
        jax.jit(step, donate_argnums=0, out_shardings=(placed, replicated(mesh))),
        (state, rollout, array(p, g, dtype=jnp.float32), reference),
        resident=(),
        parts=parts | {"gradients": gradients},
        work=update_work(model.config, mesh, plan, state=bytes_per_device(state), reference=reference is not None),
    )


def _traffic(plan: Plan, model: Transformer, mesh: Mesh, slots: int) -> dict[str, Traffic]:
    """What a device reads for one more token of each slot, by the attention that reads it, the plan's own first.

    Raises:
        ValueError: `written` is no mean of such texts.
    """
    longest, mean = plan.completion_tokens, plan.mean_written
    if not 1 <= 2 * mean <= longest:
        raise ValueError(f"written={mean} must be from 1 to {longest // 2}: texts have up to twice as many tokens")
    shape: dict[str, Any] = {"group": plan.samples, "prompt_width": plan.prompt_tokens, "tokens": longest}
    attentions = dict.fromkeys((plan.sampling_attention, *(("xla",) if plan.sampling_attention == "auto" else ())))
    ours, written = sampling_mesh(mesh, plan.sampling_tensor), spread(slots, mean)
    shape["cache_dtype"] = plan.sampling_cache_dtype
    return {attention: traffic(model, ours, attention, written, **shape) for attention in attentions}


def _told(plan: Plan, slots: int, read: dict[str, Traffic]) -> str:
    pages = ", ".join(f"{one.pages / GIB:.2f} ({attention})" for attention, one in read.items())
    weights = next(iter(read.values())).weights / GIB
    texts = f"{slots} texts of {plan.prompt_tokens} + 1 to {spread(slots, plan.mean_written).max()} tokens"
    return f"a token reads {weights:.2f} GiB of weights and, of {texts}, {pages} of keys and values"
