"""The collectives of a compiled program, and which of them are in loops, from its HLO text."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(.*\{$")
_COLLECTIVE = re.compile(
    r" = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast)(-start)?\("
)
_BETWEEN_SLICES = re.compile(r" = (\(.*?\)) recv\(.*xla_megascale_runtime")
_PHASE = re.compile(r'op_name="jit\(\w+\)/(\w+)/')
_IDENTITY = re.compile(r"channel_id=\d+|chain_id=\"\d+\"|metadata=\{[^}]*\}")
_FUSION = " fusion("
_LOOP = re.compile(r" while\(.*condition=%([^\s,]+), body=%([^\s,]+)")
_CALL = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%([^\s,)]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BOUND = re.compile(r"ROOT .* compare\(%\S+, %(\S+)\), direction=LT")
_SHAPE = re.compile(r"\b[a-z]+(\d*)\w*\[([\d,]*)\]")


BETWEEN = "between slices"
"""The kind of what devices take from those of other slices, over the network that hosts share."""


class Collective(NamedTuple):
    """One collective instruction."""

    kind: str
    """all-gather, all-reduce, reduce-scatter, all-to-all, collective-permute or collective-broadcast, each among the
    devices of a slice, or `BETWEEN`."""
    bytes: int
    """Of its result on one device, each time that it runs."""
    place: str
    """`once`, `loop 2`: each time around the program's second loop, `loop 2 inner`: in loops within that."""
    times: int = 1
    """How often it runs, loops counted whose length is written in the program."""
    open_loops: int = 0
    """Loops around it whose length the numbers decide: until all rows have ended, say."""
    outside: int = 1
    """Of `times`, what loops count that are around all of these."""
    phase: str = ""
    """The outermost scope (`jax.named_scope`) of the loop around it, or its own, if there is one."""


def collectives(text: str) -> list[Collective]:
    """All collectives of an HLO module, in the order in which they stand.

    Raises:
        ValueError: the text is no HLO module.
    """
    bodies: dict[str, list[str]] = {}
    entry, lines = None, []
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            lines = bodies.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        else:
            lines.append(line)
    if entry is None:
        raise ValueError("the text is no HLO module: it has no ENTRY computation")
    return list(_walk(bodies, entry, _Around("once", 1, 0, 1, ""), itertools.count(1), set()))


class _Around(NamedTuple):
    """The loops around a computation, as `Collective` tells them."""

    place: str
    times: int
    open_loops: int
    outside: int
    phase: str

    def at(self, line: str) -> _Around:
        """What is around an instruction: its own phase, if no loop has one."""
        found = None if self.phase else _PHASE.search(line)
        return self if found is None else self._replace(phase=found[1])

    def within(self, numbers: Iterator[int], turns: int | None) -> _Around:
        """Inside a further loop, of so many turns if that is known."""
        place = f"loop {next(numbers)}" if self.place == "once" else f"{self.place.removesuffix(' inner')} inner"
        outside = self.outside if self.open_loops or turns else self.times
        return _Around(place, self.times * (turns or 1), self.open_loops + (turns is None), outside, self.phase)


def _walk(
    bodies: dict[str, list[str]],
    name: str,
    around: _Around,
    numbers: Iterator[int],
    seen: set[tuple[str, ...]],
    fused: bool = False,
) -> Iterator[Collective]:
    """The collectives of a computation and of all that it calls."""
    for line in bodies[name]:
        if found := _COLLECTIVE.search(line):
            # One that is fused step by step with what it overlaps is written down once for each step. The channel
            # alone tells nothing: all collectives of `shard_map` share one.
            one = tuple(_IDENTITY.findall(line))
            if fused and one in seen:
                continue
            seen |= {one} if fused else set()
            # On TPUs a reduce-scatter is an all-reduce, fused with the choice of a device's part.
            kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else found[2]
            yield Collective(kind, _bytes(found[1], started=found[3] is not None), *around.at(line))
        elif received := _BETWEEN_SLICES.search(line):
            yield Collective(BETWEEN, _bytes(received[1].partition(", u32[]")[0], started=False), *around.at(line))
        elif loop := _LOOP.search(line):
            inside = around.at(line).within(numbers, _turns(line, bodies[loop[1]]))
            for part in loop.groups():
                yield from _walk(bodies, part, inside, numbers, seen)
        else:
            for called in _called(line):
                yield from _walk(bodies, called, around, numbers, seen, fused or _FUSION in line)


def _turns(loop: str, condition: list[str]) -> int | None:
    """How often a loop turns: as the compiler notes it, or the constant that its condition counts up to from 0."""
    if known := _KNOWN.search(loop):
        return int(known[1])
    bound = next(filter(None, map(_BOUND.search, condition)), None)
    if bound is None:
        return None
    constant = re.compile(rf"%{re.escape(bound[1])} = s32\[\]\S* constant\((\d+)\)")
    return next((int(found[1]) for found in map(constant.search, condition) if found), None)


def _called(line: str) -> list[str]:
    branches = [branch.strip(" %") for listed in _BRANCHES.findall(line) for branch in listed.split(",")]
    return _CALL.findall(line) + branches


def _bytes(shape: str, *, started: bool) -> int:
    """Bytes of a shape as HLO writes it; an instruction that starts a collective has its operand in it, too."""
    sizes = []
    for bits, dimensions in _SHAPE.findall(shape):
        count = math.prod(int(size) for size in dimensions.split(",") if size)
        sizes.append(count * max(8, int(bits or 8)) // 8)
    return sizes[1] if started and len(sizes) > 1 else sum(sizes)
