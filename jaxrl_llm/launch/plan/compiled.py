"""What is known of a program once it is compiled."""

from __future__ import annotations

import collections
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from jaxrl_llm.device_memory import bytes_per_device
from jaxrl_llm.launch.plan.hlo import Collective, collectives
from jaxrl_llm.launch.plan.programs import Program
from jaxrl_llm.launch.plan.work import Work

STATE = ("parameters", "optimizer", "critic", "critic's optimizer")
"""Parts of what is trained."""

_HELD = (*STATE, "reference", "reward model")
"""What lies in memory before a program begins, and stays."""

OTHERS = "activations and others"
"""What is between, the outputs with it."""


class Report(NamedTuple):
    """What is known of a compiled program. Bytes are those of one device."""

    seconds: float
    """Processor time to trace, lower and compile."""
    arguments: int
    outputs: int
    """Those that overwrite donated arguments not counted."""
    temporaries: int
    """The block that the program sets aside for everything between, and its code."""
    peak: int
    """The most that is alive at one time; a block is never packed perfectly, so that `needed` is more."""
    resident: int
    """Arrays that stay in memory meanwhile."""
    collectives: list[Collective]
    text: str
    """HLO."""
    host: int = 0
    """What the program has in the host's memory for one device, arguments and temporaries."""

    @property
    def needed(self) -> int:
        """Memory without which it cannot run."""
        return self.arguments + self.outputs + self.temporaries + self.resident

    def by_kind(self, parts: dict[str, int]) -> dict[str, int]:
        """What is needed by what it is for: `parts` as they are known, and the rest of each kind of memory."""
        held = self.arguments + self.resident - sum(parts.get(name, 0) for name in _HELD)
        made = self.outputs + self.temporaries - sum(size for name, size in parts.items() if name not in _HELD)
        known = {name: size for name, size in {**parts, "batch": max(0, held)}.items() if size}
        return {**known, OTHERS: max(0, made + min(0, held))}

    def sent(self, phases: Mapping[str, Work]) -> dict[str, dict[str, int]]:
        """Bytes that a device takes from others in each phase, by kind of collective.

        Args:
            phases: in which open loops turn as they say; what bears no name of them is of the last.
        """
        found: dict[str, list[Collective]] = {name: [] for name in phases}
        for one in self.collectives:
            found[one.phase if one.phase in found else [*phases][-1]].append(one)
        return {name: _sent(found[name], work) for name, work in phases.items()}


def _sent(among: Sequence[Collective], work: Work) -> dict[str, int]:
    loops = {one.place.removesuffix(" inner") for one in among if one.open_loops == 1}
    total: dict[str, float] = collections.defaultdict(float)
    for one in among:
        total[one.kind] += one.bytes * one.times * work.runs(one.open_loops, len(loops), one.outside)
    return {kind: round(size) for kind, size in total.items()}


def compile_program(program: Program, mesh: Mesh) -> Report:
    """Compiles.

    Raises:
        jax.errors.JaxRuntimeError: the compiler refuses; RESOURCE_EXHAUSTED if the memory does not suffice.
    """
    began = time.process_time()
    with jax.set_mesh(mesh):
        compiled = program.function.lower(*program.arguments).compile()
    seconds, memory, text = time.process_time() - began, compiled.memory_analysis(), compiled.as_text()
    return Report(
        seconds=seconds,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        resident=bytes_per_device(program.resident),
        collectives=collectives(text),
        text=text,
        host=memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
    )
