"""The meshes, slots, rows and rematerialisation that fit a slice, the fastest by its limits first.

What a plan takes is bounded from below in closed form; what these bounds admit is compiled, in the order of the time
that they give, until enough plans fit. What is told of a plan is what the compiler made of it.
"""

from __future__ import annotations

import dataclasses
import heapq
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxrl_llm.launch.plan.compiled import Report, compile_program
from jaxrl_llm.launch.plan.options import REMATS, Option, Options, choices, with_fewer_slots
from jaxrl_llm.launch.plan.programs import GIB, build
from jaxrl_llm.launch.plan.run_flags import run_flags
from jaxrl_llm.launch.plan.settings import Plan, ProgramName
from jaxrl_llm.launch.plan.slices import Chip
from jaxrl_llm.launch.plan.telling import record, told_mesh
from jaxrl_llm.models.config import Remat

_USED = re.compile(r"Used ([\d.]+)([BKMGT]) of")
"""In the compiler's refusal: what there would have to be."""


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
    sampler that does goes with it. Where a run is one program, it is compiled once its phases are found to fit. Slots
    that are `auto` become fewer where the compiler needs more than was foretold of them.

    Args:
        plan: what is to run, and where.
        devices: of the slice.
        chip: what one of them can do.
        tell: is given a line on each program that is compiled.
        remats: what the backward pass may keep.

    Raises:
        ValueError: no mesh can have this model and batch, or no plan's bounds fit; says why.
    """
    tried = _Tried(chip, tell)
    settled: set[int] = set()

    def order(options: Options) -> tuple[float, int, int]:
        seconds = sum(option.seconds(chip) for option in options.values())
        return seconds, options["update"].least, options["sampler"].least

    every = [*choices(plan, devices, chip, remats)]  # kept, since what was tried is known by its id
    queue = [(order(options), number, options) for number, options in enumerate(every)]
    heapq.heapify(queue)
    while queue:
        key, number, options = heapq.heappop(queue)
        update, sampler = options["update"], options["sampler"]
        if id(update) in settled:
            continue
        refused = tried.refused(options)
        if refused is None:
            if (found := tried.together(plan, options)) is not None:
                settled.add(id(update))
                yield found
            elif sampler.least > update.least:
                refused = "sampler"
        if refused == "sampler" and (fewer := tried.lessened(sampler)) is not None:
            others: Options = {**options, "sampler": fewer}
            heapq.heappush(queue, (max(key, order(others)), number, others))


_ORDER: tuple[ProgramName, ...] = ("sampler", "reward", "update")


class _Tried:
    """What was compiled of the options, each at most once."""

    def __init__(self, chip: Chip, tell: Callable[[str], None]):
        self._chip, self._tell, self._beyond = chip, tell, _Beyond(chip.hbm_gib * GIB)
        self._told: dict[int, dict[str, Any] | None] = {}
        self._lessened: dict[int, Option | None] = {}

    def refused(self, options: Options) -> ProgramName | None:
        """The first program that does not fit, as far as that is known without compiling the others."""
        known: list[ProgramName] = [name for name, one in options.items() if self._told.get(id(one), True) is None]
        found: Iterator[ProgramName] = (name for name, one in options.items() if self._fits(one) is None)
        return known[0] if known else next(found, None)

    def _fits(self, option: Option) -> dict[str, Any] | None:
        """The record of a program; `None`: it does not fit."""
        if id(option) not in self._told:
            told = None
            if not self._beyond.too_much(option):
                told, needed = _compiled(option, self._chip, self._tell)
                self._beyond.learn(option, needed)
            self._told[id(option)] = told
        return self._told[id(option)]

    def together(self, plan: Plan, options: Options) -> Found | None:
        """Programs that fit as a plan; one that is made of all of them is compiled, and `None` if it does not fit."""
        update, given = options["update"], options["sampler"].plan
        slots = {"sampling_tensor": given.sampling_tensor, "slots": given.slots}
        chosen = dataclasses.replace(update.plan, **slots, programs=plan.programs)
        if chosen.made == ("iteration",):
            whole, _ = _compiled(update._replace(plan=chosen), self._chip, self._tell)
            return None if whole is None else Found(chosen, update.mesh, [whole])
        told = [self._fits(options[name]) for name in _ORDER if name in options]
        return Found(chosen, update.mesh, [one for one in told if one is not None])

    def lessened(self, sampler: Option) -> Option | None:
        """The sampler with fewer slots, if there may be fewer."""
        if id(sampler) not in self._lessened:
            self._lessened[id(sampler)] = with_fewer_slots(sampler)
        return self._lessened[id(sampler)]


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
        "sampler": f"weights over {plan.sampling_tensor}, slots {plan.slots}",
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
