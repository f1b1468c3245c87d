"""What a search chooses from: meshes, samplers and updates, with what is known of each before it is compiled."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh

from jaxrl_llm.launch.plan.compiled import STATE
from jaxrl_llm.launch.plan.programs import GIB, build, model_of, reward_config, shape_of
from jaxrl_llm.launch.plan.settings import Plan, ProgramName
from jaxrl_llm.launch.plan.slices import Chip
from jaxrl_llm.launch.plan.work import Work, update_work
from jaxrl_llm.models.config import Remat
from jaxrl_llm.sharding import MeshConfig, head_shards, make_mesh, row_shards

REMATS: tuple[Remat, ...] = ("none", "dots", "attention", "full")
"""What the backward pass may keep, where nothing is said of it."""
_ROWS = (16, 8, 4, 2, 1)
"""Longest texts that a row of tokens may hold."""
_TENSOR, _CONTEXT, _EXPERT, _COPIES = (1, 2, 4, 8, 16), (1, 2, 4), (1, 2, 4, 8), (1, 2, 4, 8)
_FEWER = (7 / 8, 3 / 4, 1 / 2)
"""Parts of the slots that `auto` gives."""
_TILE = 128
"""Tokens of which rows have multiples."""


class Option(NamedTuple):
    """One program, as it may be."""

    plan: Plan
    """With this program alone."""
    mesh: Mesh
    work: Work
    held: int
    """Bytes of a device that are known beforehand."""
    fewer: tuple[int, ...] = ()
    """Of a sampler: slots to go on with, one after another, where the compiler needs more than was foretold."""

    def seconds(self, chip: Chip) -> float:
        """That it takes at least."""
        return max(self.work.seconds(chip, self.work.sent).values())

    @property
    def least(self) -> int:
        """Bytes of a device that it takes at least."""
        return self.held + self.work.kept


Options = dict[ProgramName, Option]
"""A program of each kind, which may be those of one plan."""


def choices(plan: Plan, devices: Sequence[Any], chip: Chip, remats: Sequence[Remat]) -> Iterator[Options]:
    """Of each mesh every sampler with every update, where their bounds fit, in the order in which to compile them.

    Raises:
        ValueError: there are none.
    """
    if plan.reward_model is not None:
        reward_config(plan, shape_of(plan))  # raises, whatever the mesh, if there is none such
    refusals, found, room = list[ValueError](), 0, chip.hbm_gib * GIB
    for sizes in _meshes(plan, len(devices)):
        on_mesh = dataclasses.replace(plan, mesh=sizes, update=dataclasses.replace(plan.update, micro_batches=1))
        try:
            mesh = make_mesh(sizes, devices)
            updates = [one for one in _updates(on_mesh, mesh, remats) if one.least <= room]
            samplers = [one for one in _samplers(on_mesh, mesh) if one.least <= room] if updates else []
            rewards = _rewards(on_mesh, mesh, updates)
        except ValueError as error:  # the mesh does not divide the model or the batch, or nothing can be sampled
            refusals.append(error)
            continue
        if not updates:
            refusals.append(ValueError("parameters, moments and gradients alone do not fit: more devices are needed"))
        elif not samplers:
            told = "weights, keys and values of the sampler do not fit: fewer --slots, or more devices"
            refusals.append(ValueError(told))
        for update, sampler in itertools.product(updates, samplers):
            found += 1
            budget = update.plan.update.tokens_per_micro_batch
            yield {"update": update, "sampler": sampler, **({"reward": rewards[budget]} if rewards else {})}
    if not found:
        raise refusals[0]  # of the fewest axes that were not asked for


def _meshes(plan: Plan, devices: int) -> Iterator[MeshConfig]:
    """Sizes of the axes; those that were asked for are kept.

    Raises:
        ValueError: none of them fit the devices.
    """
    asked, mixture = plan.mesh, shape_of(plan).experts
    tensors = (asked.tensor,) if asked.tensor > 1 else _TENSOR
    contexts = (asked.context,) if asked.context > 1 else _CONTEXT
    experts = (asked.expert,) if asked.expert > 1 or mixture is None else _EXPERT
    refusals, found = list[ValueError](), False
    for expert, tensor, context in itertools.product(experts, tensors, contexts):
        one = dataclasses.replace(asked, tensor=tensor, context=context, expert=expert)
        try:
            sizes = one.sizes(devices)
        except ValueError as error:
            refusals.append(error)
        else:
            found = True
            yield MeshConfig(**sizes)
    if not found:
        raise refusals[0]  # of the fewest axes that were not asked for


def _samplers(plan: Plan, mesh: Mesh) -> list[Option]:
    """By how many devices share a copy of the weights.

    Raises:
        ValueError: none of them can be.
    """
    own, made = head_shards(mesh), list[Option]()
    refusal: ValueError | None = None
    for tensor in [own * n for n in _COPIES] if plan.sampling_tensor is None else [plan.sampling_tensor]:
        one = dataclasses.replace(plan, sampling_tensor=tensor, programs=("sampler",))
        try:
            (program,) = build(one, mesh)
        except ValueError as error:
            refusal = refusal or error  # of the fewest copies
        else:
            most = program.slots if plan.slots == "auto" else None
            fewer = dict.fromkeys(int(part * (most or 0)) for part in _FEWER)
            made.append(Option(one, mesh, program.work, sum(program.parts.values()), tuple(filter(None, fewer))))
    if refusal is not None and not made:
        raise refusal
    return made


def with_fewer_slots(sampler: Option) -> Option | None:
    """The sampler with fewer slots, if there may be fewer."""
    if not sampler.fewer:
        return None
    one = dataclasses.replace(sampler.plan, slots=sampler.fewer[0])
    (program,) = build(one, sampler.mesh)
    return Option(one, sampler.mesh, program.work, sum(program.parts.values()), sampler.fewer[1:])


def _rewards(plan: Plan, mesh: Mesh, updates: Sequence[Option]) -> dict[int | None, Option]:
    """A reward model's scores, by the tokens that are computed at a time; none where there is no such model."""
    made: dict[int | None, Option] = {}
    if plan.reward_model is None:
        return made
    for update in (one.plan.update for one in updates):
        if update.tokens_per_micro_batch not in made:
            one = dataclasses.replace(plan, update=update, programs=("reward",))
            (program,) = build(one, mesh)
            held = sum(program.parts.values())
            made[update.tokens_per_micro_batch] = Option(one, mesh, program.work, held)
    return made


def _updates(plan: Plan, mesh: Mesh, remats: Sequence[Remat]) -> Iterator[Option]:
    """By what the backward pass keeps, and how many tokens are computed at a time."""
    (program,) = build(dataclasses.replace(plan, programs=("update",)), mesh)
    parts = program.parts
    longest = -(-(plan.prompt_tokens + plan.completion_tokens) // _TILE) * _TILE
    texts = plan.prompts * plan.group // row_shards(mesh)
    asked = plan.update.tokens_per_micro_batch
    budgets = [n * longest for n in _ROWS if n <= max(1, texts)] if asked is None else [asked]
    for remat, budget in itertools.product(remats, budgets):
        update = dataclasses.replace(plan.update, tokens_per_micro_batch=budget)
        model = dataclasses.replace(plan.model, remat=remat)
        one = dataclasses.replace(plan, update=update, model=model, programs=("update",))
        work = update_work(model_of(one, mesh).config, mesh, one, state=sum(parts[name] for name in STATE))
        yield Option(one, mesh, work, sum(parts.values()))
