"""The meshes, slots, rows and rematerialisation that fit a slice, the fastest by its limits first.

What a plan takes is bounded from below in closed form; what these bounds admit is compiled, in the order of the time
that they give, until enough plans fit. What is told of a plan is what the compiler made of it.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxrl_llm.launch.plan.compiled import STATE, Report, compile_program
from jaxrl_llm.launch.plan.programs import GIB, build, model_of, reward_config, shape_of
from jaxrl_llm.launch.plan.run_flags import run_flags
from jaxrl_llm.launch.plan.settings import Plan, ProgramName
from jaxrl_llm.launch.plan.slices import Chip
from jaxrl_llm.launch.plan.telling import record, told_mesh
from jaxrl_llm.launch.plan.work import Work, update_work
from jaxrl_llm.models.config import Remat
from jaxrl_llm.sharding import MeshConfig, head_shards, make_mesh, row_shards

REMATS: tuple[Remat, ...] = ("none", "dots", "attention", "full")
"""What the backward pass may keep, where nothing is said of it."""
_ROWS = (16, 8, 4, 2, 1)
"""Longest texts that a row of tokens may hold."""
_TENSOR, _CONTEXT, _EXPERT, _COPIES = (1, 2, 4, 8, 16), (1, 2, 4), (1, 2, 4, 8), (1, 2, 4, 8)
_USED = re.compile(r"Used ([\d.]+)([BKMGT]) of")
"""In the compiler's refusal: what there would have to be."""
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

    def seconds(self, chip: Chip) -> float:
        """That it takes at least."""
        return max(self.work.seconds(chip, self.work.sent).values())

    @property
    def least(self) -> int:
        """Bytes of a device that it takes at least."""
        return self.held + self.work.kept


class Found(NamedTuple):
    """A plan that fits."""

    plan: Plan
    mesh: Mesh
    records: list[dict[str, Any]]
    """Of its programs in the order in which they run, as `record` makes them."""

    @property
    def seconds(self) -> float:
        """Of a step, at least: each program by the limit that binds it."""
        return sum(one["least_seconds"] for one in self.records)

    @property
    def flags(self) -> str:
        """What a run has to be given to run so, beside its batch."""
        return run_flags(self.plan)[0]

    @property
    def batch(self) -> str:
        """The flags of its batch: those of every plan that is found."""
        return run_flags(self.plan)[1]


def search(
    plan: Plan,
    devices: Sequence[Any],
    chip: Chip,
    tell: Callable[[str], None],
    *,
    remats: Sequence[Remat] = REMATS,
) -> Iterator[Found]:
    """Plans that fit, those first that take the least time by the bounds, until all are tried.

    Sizes of `plan.mesh` other than 1 and −1 (of fsdp: than −1), `plan.sampling_tensor` and
    `plan.update.tokens_per_micro_batch` are kept where they are set. Of each mesh and update that fits, the fastest
    sampler that does goes with it. Where a run is one program, it is compiled once its phases are found to fit.

    Args:
        plan: what is to run, and where.
        devices: of the slice.
        chip: what one of them can do.
        tell: is given a line on each program that is compiled.
        remats: what the backward pass may keep.

    Raises:
        ValueError: no mesh can have this model and batch, or no plan's bounds fit; says why.
    """
    compiled: dict[int, dict[str, Any] | None] = {}
    settled: set[int] = set()
    beyond = _Beyond(chip.hbm_gib * GIB)

    def fits(option: Option) -> dict[str, Any] | None:
        """The record of a program, compiled at most once; `None`: it does not fit."""
        if id(option) not in compiled and beyond.too_much(option):
            compiled[id(option)] = None
        if id(option) not in compiled:
            told, needed = _compiled(option, chip, tell)
            beyond.learn(option, needed)
            compiled[id(option)] = told
        return compiled[id(option)]

    def order(options: _Options) -> tuple[float, int, int]:
        seconds = sum(option.seconds(chip) for option in options.values())
        return seconds, options["update"].least, options["sampler"].least

    for options in sorted(_choices(plan, devices, chip, remats), key=order):
        update, sampler = options["update"], options["sampler"]
        if id(update) in settled or any(compiled.get(id(one), True) is None for one in options.values()):
            continue
        records: dict[ProgramName, dict[str, Any]] = {}
        for name, option in options.items():
            if (told := fits(option)) is None:
                break
            records[name] = told
        else:
            tensor = sampler.plan.sampling_tensor
            chosen = dataclasses.replace(update.plan, sampling_tensor=tensor, programs=plan.programs)
            if chosen.made == ("iteration",):
                whole, _ = _compiled(update._replace(plan=chosen), chip, tell)
                records = {} if whole is None else {"iteration": whole}
            if records:
                settled.add(id(update))
                yield Found(chosen, update.mesh, [records[name] for name in _ORDER if name in records])


_Options = dict[ProgramName, Option]
_ORDER: tuple[ProgramName, ...] = ("sampler", "reward", "update", "iteration")


def _choices(plan: Plan, devices: Sequence[Any], chip: Chip, remats: Sequence[Remat]) -> Iterator[_Options]:
    """Of each mesh every sampler with every update, where their bounds fit, in the order in which to compile them.

    Raises:
        ValueError: there are none.
    """
    if plan.reward_model is not None:
        reward_config(plan, shape_of(plan))  # raises, whatever the mesh, if there is none such
    refusal = ValueError("parameters, moments and gradients alone do not fit: more devices are needed")
    found, room = 0, chip.hbm_gib * GIB
    for sizes in _meshes(plan, len(devices)):
        on_mesh = dataclasses.replace(plan, mesh=sizes, update=dataclasses.replace(plan.update, micro_batches=1))
        try:
            mesh = make_mesh(sizes, devices)
            updates = [one for one in _updates(on_mesh, mesh, remats) if one.least <= room]
            samplers = [one for one in _samplers(on_mesh, mesh) if one.least <= room] if updates else []
            rewards = _rewards(on_mesh, mesh, updates)
        except ValueError as error:  # the mesh does not divide the model or the batch, or nothing can be sampled
            refusal = error
            continue
        if updates and not samplers:
            refusal = ValueError("weights, keys and values of the sampler do not fit: fewer --slots, or more devices")
        for update, sampler in itertools.product(updates, samplers):
            found += 1
            budget = update.plan.update.tokens_per_micro_batch
            yield {"update": update, "sampler": sampler, **({"reward": rewards[budget]} if rewards else {})}
    if not found:
        raise refusal


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
            refusal = error
        else:
            made.append(Option(one, mesh, program.work, sum(program.parts.values())))
    if refusal is not None and not made:
        raise refusal
    return made


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


class _Beyond:
    """What updates need beyond their bounds, as the compiler has told of those before.

    It grows with what is kept, with the part of a weight that a device gathers, and with the tokens whose keys and
    values it gathers along `context`. So an update that keeps no less than another one in the same way, of weights that
    are cut no finer and texts that are cut no less, needs as much more: where that is too much, it need not be
    compiled.
    Along `expert` weights become less and tokens more, so that only those on as many devices are comparable.

    Args:
        room: bytes of a device.
    """

    def __init__(self, room: float):
        self._room = room
        self._told: list[tuple[Option, int]] = []

    def learn(self, option: Option, needed: int | None) -> None:
        """Remembers what a program needs; `None`: it is not known."""
        if option.plan.programs == ("update",) and needed is not None:
            self._told.append((option, needed - option.least))

    def too_much(self, option: Option) -> bool:
        """Whether it is an update that will not fit."""
        if option.plan.programs != ("update",):
            return False
        ours, own = option.mesh.shape, option.plan.model.remat
        more = [
            more
            for other, more in self._told
            if other.plan.model.remat == own
            and other.work.kept <= option.work.kept
            and (theirs := other.mesh.shape)["expert"] == ours["expert"]
            and theirs["tensor"] >= ours["tensor"]
            and theirs["context"] <= ours["context"]
        ]
        return option.least + max(more, default=0) > self._room


def _compiled(option: Option, chip: Chip, tell: Callable[[str], None]) -> tuple[dict[str, Any] | None, int | None]:
    """The record of a program that the compiler makes, if it fits, and the bytes that it needs, if they are known."""
    plan, (program,) = option.plan, build(option.plan, option.mesh)
    chosen = {
        "sampler": f"weights over {plan.sampling_tensor}",
        "reward": f"rows of {plan.update.tokens_per_micro_batch}",
        "update": f"rows of {plan.update.tokens_per_micro_batch}, remat {plan.model.remat}",
    }
    chosen["iteration"] = f"{chosen['sampler']}, {chosen['update']}"
    what = f"{program.name}, {told_mesh(option.mesh)}, {chosen[program.name]}"
    try:
        report: Report = compile_program(program, option.mesh)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = _USED.search(str(error))
        tell(f"{what}: does not fit")
        return None, None if used is None else int(float(used[1]) * 1024 ** "BKMGT".index(used[2]))
    told = record(program, report, chip)
    told["remarks"].append(what)
    tell(f"{what}: {told['needed'] / GIB:.2f} GiB, {told['least_seconds']:.3g} s at least ({told['limit']})")
    return told if told["fits"] else None, told["needed"]


def found_table(found: Sequence[Found]) -> str:
    """Plans that fit, a line each: what is chosen, and of each program memory, least time and what binds it."""
    head = ["mesh", "weights over", "slots", "tokens of a row", "remat"]
    head += [f"{one['program']}: GiB, s" for one in found[0].records]
    rows = [head]
    for one in found:
        plan, records = one.plan, one.records
        programs = [f"{r['needed'] / GIB:.1f}, {r['least_seconds']:.3g} ({r['limit']})" for r in records]
        budget = plan.update.tokens_per_micro_batch
        chosen = [plan.sampling_tensor, records[0]["slots"], f"{budget:,}", plan.model.remat]
        rows.append([told_mesh(one.mesh).removeprefix("mesh "), *map(str, chosen), *programs])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
