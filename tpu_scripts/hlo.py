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
_CHANNEL = re.compile(r"channel_id=\d+")
_LOOP = re.compile(r" while\(.*condition=%([^\s,]+), body=%([^\s,]+)")
_CALL = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%([^\s,)]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_SHAPE = re.compile(r"\b[a-z]+(\d*)\w*\[([\d,]*)\]")


class Collective(NamedTuple):
    """One collective instruction."""

    kind: str
    """all-gather, all-reduce, reduce-scatter, all-to-all, collective-permute or collective-broadcast."""
    bytes: int
    """Of its result on one device, each time that it runs."""
    place: str
    """`once`, `loop 2`: each time around the program's second loop, `loop 2 inner`: in loops within that."""


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
    return list(_walk(bodies, entry, "once", itertools.count(1), set()))


def _walk(
    bodies: dict[str, list[str]], name: str, place: str, numbers: Iterator[int], seen: set[str]
) -> Iterator[Collective]:
    """The collectives of a computation and of all that it calls."""
    for line in bodies[name]:
        if found := _COLLECTIVE.search(line):
            # One that is fused step by step with what it overlaps is written down once for each step.
            channel = _CHANNEL.search(line)
            if channel and channel[0] in seen:
                continue
            seen |= {channel[0]} if channel else set()
            # On TPUs a reduce-scatter is an all-reduce, fused with the choice of a device's part.
            kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else found[2]
            yield Collective(kind, _bytes(found[1], started=found[3] is not None), place)
        elif loop := _LOOP.search(line):
            inside = f"loop {next(numbers)}" if place == "once" else f"{place.removesuffix(' inner')} inner"
            for part in loop.groups():
                yield from _walk(bodies, part, inside, numbers, seen)
        else:
            for called in _called(line):
                yield from _walk(bodies, called, place, numbers, seen)


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
