"""The programs of on-policy training as a trainer makes them, from abstract arguments with its shardings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrl_llm.algorithms.iteration import DeviceReward
from jaxrl_llm.algorithms.score_models.reward_model import make_reward
from jaxrl_llm.device_memory import bytes_per_device
from jaxrl_llm.launch.plan.run_flags import of_plan
from jaxrl_llm.launch.plan.settings import OWN, Plan
from jaxrl_llm.launch.plan.sizes import SIZES
from jaxrl_llm.launch.plan.slices import CHIPS
from jaxrl_llm.launch.plan.work import Work, reward_work, sampling_work, update_work
from jaxrl_llm.models.checkpoints.pretrained import load_config
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.heads import ScoreModel
from jaxrl_llm.models.lora import abstract_reference, has_adapters, split_trainable
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.layout import sampling_mesh
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sampling.traffic import Traffic, spread, traffic
from jaxrl_llm.sharding import replicated, row_shards, rows_or_whole
from jaxrl_llm.training.learner import Learner, make_learner
from jaxrl_llm.training.programs import iteration_program, score_program, update_program
from jaxrl_llm.types import Rollout, TrainState

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
    phases: Mapping[str, Work]
    """What it computes and reads, one phase after another; most programs are one."""
    remarks: tuple[str, ...] = ()
    """What else there is to say of it."""
    slots: int | None = None
    """Completions that it decodes at a time on a device."""

    @property
    def work(self) -> Work:
        """What a program of one phase computes and reads."""
        (only,) = self.phases.values()
        return only


def build(plan: Plan, mesh: Mesh) -> list[Program]:
    """The programs of a step (`Plan.made`) as the trainer makes them, with abstract arguments.

    Raises:
        ValueError: the numbers do not fit the mesh or the model; what it names are settings of a plan.
    """
    try:
        return _build(plan, mesh)
    except ValueError as error:
        raise ValueError(of_plan(str(error))) from error


def _build(plan: Plan, mesh: Mesh) -> list[Program]:
    model = model_of(plan, mesh)
    learner = make_learner(
        model,
        plan.algorithm,
        iterations=1000,
        plan=plan.update,
        optimizer=plan.optimizer,
        sampling=_sampling(plan),
        critic=plan.critic,
        trust_region=None,
    )
    state = learner.abstract_state(mesh)
    whole = plan.algorithm.needs_whole_groups
    plan.update.group_split(plan.prompts, plan.samples, row_shards(mesh), whole_groups=whole)
    needed = plan.algorithm.needs_reference and not has_adapters(state.params)  # without them, the policy is the base
    reference = abstract_reference(state.params, model.config.dtype) if needed else None
    judge = None if plan.reward_model is None else ScoreModel(Transformer(reward_config(plan, model.config)))
    judge_params = None if judge is None else _abstract_on(mesh, judge)
    beside = _Beside(plan, model, mesh, learner, state, reference, judge, judge_params)
    made = {"sampler": _sampler, "reward": _reward, "update": _update, "iteration": _iteration}
    return [make(beside) for name, make in made.items() if name in plan.made]


def shape_of(plan: Plan) -> ModelConfig:
    """The policy's shape."""
    config = SIZES[plan.size] if plan.model.path is None else load_config(plan.model.path)
    return config if plan.layers is None else dataclasses.replace(config, num_layers=plan.layers)


def model_of(plan: Plan, mesh: Mesh) -> Transformer:
    """The policy, as it is on the devices of `mesh`: what is left to `auto` is chosen for these, wherever one plans."""
    config = shape_of(plan)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return Transformer(plan.model.applied_to(config))


def reward_config(plan: Plan, policy: ModelConfig) -> ModelConfig:
    """The reward model's: computed as the policy is, and kept in the type in which it is computed.

    Raises:
        ValueError: there is no such model.
    """
    if plan.reward_model == OWN:
        config = policy
    else:
        named: Any = plan.reward_model
        try:
            config = SIZES[named] if named in SIZES else load_config(named)
        except (ValueError, OSError) as error:
            raise ValueError(f"reward_model={named!r} is none of {OWN}, {', '.join(SIZES)}, and {error}") from error
        computed = ("dtype", "attention", "scan_layers")
        config = dataclasses.replace(config, **{name: getattr(policy, name) for name in computed})
    return dataclasses.replace(config, param_dtype=config.dtype, base_dtype=None, lora=None)


def _abstract_on(mesh: Mesh, model: ScoreModel) -> Any:
    """Shapes, types and shardings of a score model's parameters."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        model.abstract_params(),
        model.shardings(mesh),
    )


class _Beside(NamedTuple):
    """What all programs are made of."""

    plan: Plan
    model: Transformer
    mesh: Mesh
    learner: Learner
    state: TrainState
    reference: Any
    judge: ScoreModel | None
    """The reward model."""
    judge_params: Any

    @property
    def rewards(self) -> list[DeviceReward]:
        """The reward model's."""
        assert self.judge is not None  # else no program reads them
        reward: Any = make_reward(self.judge, plan=self.plan.update.of_batch)
        return [DeviceReward("reward_model", reward)]

    @property
    def sampler(self) -> Sampler:
        """As the trainer makes it, for devices that are not there."""
        plan, mesh = self.plan, self.mesh
        chip = CHIPS.get(mesh.devices.flat[0].device_kind)
        sampler = Sampler(
            self.model,
            _sampling(plan),
            group=plan.samples,
            stop_tokens=(0,),
            mesh=mesh,
            greedy=plan.algorithm.needs_greedy,
            keep_experts=plan.algorithm.keeps_experts,
            resident=bytes_per_device((self.state, self.reference, self.judge_params)),
            memory=None if chip is None else chip.hbm_gib * GIB,
        )
        sampler.check_length(plan.prompt_tokens)
        return sampler

    def array(self, *shape: int, dtype: Any = jnp.int32) -> Any:
        """An abstract array that is whole on each device."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(self.mesh))

    @property
    def parts(self) -> dict[str, int]:
        """Bytes of a device of what stays in memory, by what it is for."""
        state, critic = self.state.replace(critic=None), self.state.critic
        parameters = bytes_per_device(state.params)
        return {
            "parameters": parameters,
            "optimizer": bytes_per_device(state) - parameters,
            "reference": bytes_per_device(self.reference),
            "critic": 0 if critic is None else bytes_per_device(critic.params),
            "critic's optimizer": 0 if critic is None else bytes_per_device(critic.opt_state),
            "reward model": bytes_per_device(self.judge_params),
        }

    @property
    def rollout(self) -> Rollout:
        """What the sampler gives, the greedy completion of each prompt among the others where there is one."""
        plan, config, array = self.plan, self.model.config, self.array
        p, g, tc = plan.prompts, plan.group, plan.completion_tokens
        rollout = Rollout(
            prompt=array(p, plan.prompt_tokens),
            prompt_lengths=array(p),
            completion=array(p, g, tc),
            completion_lengths=array(p, g),
            finished=array(p, g, dtype=jnp.bool),
            logprobs=array(p, g, tc, dtype=jnp.float32),
            sampler_logprobs=array(p, g, tc, dtype=jnp.float32),
        )
        if not plan.algorithm.keeps_experts or config.experts is None:
            return rollout
        of_token = config.num_layers, config.experts.per_token
        lies = rows_or_whole(self.mesh, p)
        experts, of_prompts = (
            jax.ShapeDtypeStruct((*shape, *of_token), jnp.int16, sharding=lies)
            for shape in ((p, g, tc), (p, plan.prompt_tokens))
        )
        return rollout.replace(experts=experts, prompt_experts=of_prompts)


def _sampling(plan: Plan) -> SamplingConfig:
    return SamplingConfig(
        max_tokens=plan.completion_tokens,
        slots=plan.slots,
        tensor=plan.sampling_tensor,
        attention=plan.sampling_attention,
        cache_dtype=plan.sampling_cache_dtype,
        weights_dtype=plan.sampling_weights_dtype,
    )


def _sampler(beside: _Beside) -> Program:
    plan, model, mesh, state = beside.plan, beside.model, beside.mesh, beside.state
    sampler, p, width, rounded = beside.sampler, plan.prompts, plan.prompt_tokens, plan.sampling_weights_dtype
    slots = sampler.slots(p, width)
    decoded = model if rounded is None else model.rounded(rounded)
    footprint, read = sampler.footprint(p, width), _traffic(plan, decoded, mesh, slots)
    needs = footprint.needs(slots)
    chosen = sampler.how_slots_are_chosen(p, width)
    work = sampling_work(model.config, mesh, plan, slots, next(iter(read.values())), fills=footprint.fills(slots))
    return Program(
        "sampler",
        sampler.program(p),
        (state.params, beside.array(p, width), beside.array(p), state.key, beside.array()),
        resident=(state.opt_state, state.critic, beside.reference, beside.judge_params),
        parts=beside.parts | {name: needs[name] for name in ("the sampler's own weights", "keys and values")},
        phases={"sampler": work},
        remarks=(*filter(None, [chosen.strip()]), _told(plan, slots, read)),
        slots=slots,
    )


def _reward(beside: _Beside) -> Program:
    judge, mesh = beside.judge, beside.mesh
    assert judge is not None  # else there is no such program
    read = ("prompt", "prompt_lengths", "completion", "completion_lengths")
    return Program(
        "reward",
        score_program(beside.rewards, mesh),
        ([beside.judge_params], beside.rollout),
        resident=(beside.state, beside.reference, beside.rollout.replace(**dict.fromkeys(read))),
        parts=beside.parts,
        phases={"reward": reward_work(judge.config, mesh, beside.plan)},
    )


def _update(beside: _Beside) -> Program:
    plan, mesh, state = beside.plan, beside.mesh, beside.state
    # The compiler keeps those of policy and critic at one time, though nothing asks for it.
    trained = [split_trainable(model.params)[0] for model in (state, state.critic) if model is not None]
    gradients = bytes_per_device(jax.tree.map(lambda leaf: leaf.update(dtype=jnp.float32), trained))
    return Program(
        "update",
        update_program(beside.learner, state, mesh),
        (state, beside.rollout, beside.array(plan.prompts, plan.group, dtype=jnp.float32), beside.reference),
        resident=beside.judge_params,
        parts=beside.parts | {"gradients": gradients},
        phases={"update": update_work(beside.model.config, mesh, plan, state=bytes_per_device(state))},
    )


def _iteration(beside: _Beside) -> Program:
    """Sampler, reward model and update as one, as the trainer makes it where nothing else is a reward."""
    sampler, reward, update = programs = [make(beside) for make in (_sampler, _reward, _update)]
    _, *prompts, _, _ = sampler.arguments
    kept = sum(work.kept for work in update.phases.values())
    largest = max((sampler, 0), (update, kept), key=lambda one: sum(one[0].parts.values()) + one[1])[0]
    return Program(
        "iteration",
        iteration_program(beside.learner, beside.state, beside.sampler, beside.rewards, beside.plan.prompts),
        (beside.state, *prompts, *reward.arguments[:1], beside.reference),
        resident=(),
        parts=largest.parts,  # what others have is there before or after
        phases={name: work for program in programs for name, work in program.phases.items()},
        remarks=sampler.remarks,
        slots=sampler.slots,
    )


def _traffic(plan: Plan, model: Transformer, mesh: Mesh, slots: int) -> dict[str, Traffic]:
    """What a device reads for one more token of each slot, by the attention that reads it, the plan's own first.

    Raises:
        ValueError: `written` is no mean of such texts.
    """
    longest, mean = plan.completion_tokens, plan.mean_written
    if not 1 <= 2 * mean <= longest:
        raise ValueError(f"written={mean} must be from 1 to {longest // 2}: texts have up to twice as many tokens")
    shape: dict[str, Any] = {"group": plan.group, "prompt_width": plan.prompt_tokens, "tokens": longest}
    attentions = dict.fromkeys((plan.sampling_attention, *(("xla",) if plan.sampling_attention == "auto" else ())))
    ours, written = sampling_mesh(mesh, plan.sampling_tensor), spread(slots, mean)
    shape["cache_dtype"] = plan.sampling_cache_dtype
    return {attention: traffic(model, ours, attention, written, **shape) for attention in attentions}


def _told(plan: Plan, slots: int, read: dict[str, Traffic]) -> str:
    pages = ", ".join(f"{one.pages / GIB:.2f} ({attention})" for attention, one in read.items())
    weights = next(iter(read.values())).weights / GIB
    texts = f"{slots} texts of {plan.prompt_tokens} + 1 to {spread(slots, plan.mean_written).max()} tokens"
    return f"a token reads {weights:.2f} GiB of weights and, of {texts}, {pages} of keys and values"
