"""A plan in words, as JSON, and as a picture."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxrl_llm.extras import require
from jaxrl_llm.launch.plan.compiled import OTHERS, Report
from jaxrl_llm.launch.plan.hlo import BETWEEN, Collective
from jaxrl_llm.launch.plan.programs import GIB, Program
from jaxrl_llm.launch.plan.slices import Chip
from jaxrl_llm.launch.plan.work import Work


def describe(program: Program, report: Report, chip: Chip | None) -> str:
    """A compiled program as a few lines; `None`: nothing is known of the chip."""
    told = record(program, report, chip)
    verdict = f"needs {told['needed'] / GIB:.2f} GiB a device"
    if chip is not None:
        verdict += f" of {chip.hbm_gib}: " + ("fits" if told["fits"] else "DOES NOT FIT")
    memory = ", ".join(f"{name} {_gib(size)}" for name, size in told["bytes"].items())
    host = f"; in the host's memory {_gib(report.host)}" if report.host else ""
    again = f", and {told['flops_again']:.3g} again in the backward pass" if told["flops_again"] else ""
    rows = [
        f"{program.name}: {verdict}",
        f"  compiled in {report.seconds:.0f} s of CPU",
        f"  GiB           {memory}{host}; peak of the live {_gib(report.peak)}",
        f"  FLOPs         {told['flops']:.3g} a device{again}",
    ]
    for name, one in told.get("phases", {"": told}).items() if chip is not None else ():
        limits = ", ".join(f"{limit} {seconds:.3g} s" for limit, seconds in one["seconds"].items())
        turns = f"{one['turns']:,} {one['turn']}s"
        phase = f"{name}: " if name else ""
        rows.append(f"  at least      {phase}{limits}: {one['limit']} binds ({turns} one after another)")
    sent = ", ".join(f"{kind} {_gib(size)}" for kind, size in told["sent"].items())
    rows.append(f"  sent, GiB     {sent}" if sent else "  no collectives")
    places: dict[str, list[Collective]] = collections.defaultdict(list)
    for collective in report.collectives:
        places[collective.place].append(collective)
    for place, found in places.items():
        kinds = collections.Counter(one.kind for one in found)
        sizes = {kind: sum(one.bytes for one in found if one.kind == kind) for kind in kinds}
        parts = ", ".join(f"{count} {kind} ({sizes[kind] / 2**20:,.1f} MiB)" for kind, count in kinds.items())
        rows.append(f"  {place:<13} {parts}")
    return "\n".join([*rows, *(f"  {remark}" for remark in program.remarks)])


def record(program: Program, report: Report, chip: Chip | None) -> dict[str, Any]:
    """The same as plain numbers: bytes, operations and seconds of one device.

    What a program of several phases computes, reads and sends is told of all of them, and of each; its least seconds
    are the sum of theirs, and its limit is that of the longest.
    """
    sent = report.sent(program.phases)
    phases = {name: _phase(work, sent[name], chip) for name, work in program.phases.items()}
    return {
        "program": program.name,
        "needed": report.needed,
        "has": None if chip is None else round(chip.hbm_gib * GIB),
        "fits": None if chip is None else report.needed <= chip.hbm_gib * GIB,
        "bytes": report.by_kind(program.parts),
        "host_bytes": report.host,
        "peak": report.peak,
        **(_joined(phases) if len(phases) > 1 else next(iter(phases.values()))),
        "compile_cpu_seconds": round(report.seconds, 1),
        "remarks": list(program.remarks),
        **({} if program.slots is None else {"slots": program.slots}),
    }


def _phase(work: Work, sent: dict[str, int], chip: Chip | None) -> dict[str, Any]:
    between = sent.get(BETWEEN, 0)
    seconds = {} if chip is None else work.seconds(chip, sum(sent.values()) - between, between)
    return {
        "flops": work.flops,
        "flops_again": work.again,
        "read": work.read,
        "turns": work.turns,
        "turn": work.turn,
        "sent": sent,
        "seconds": seconds,
        "least_seconds": max(seconds.values(), default=None),
        "limit": max(seconds, key=lambda name: seconds[name]) if seconds else None,
    }


def _joined(phases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Several phases as one, which takes what they take one after another."""
    each = [*phases.values()]
    sums: dict[str, Any] = {name: sum(one[name] for one in each) for name in ("flops", "flops_again", "read")}
    kinds = dict.fromkeys(kind for one in each for kind in one["sent"])
    sums["sent"] = {kind: sum(one["sent"].get(kind, 0) for one in each) for kind in kinds}
    sums |= {"phases": phases, "least_seconds": None, "limit": None}
    if each[0]["seconds"]:
        longest = max(phases, key=lambda name: phases[name]["least_seconds"])
        sums["least_seconds"] = sum(one["least_seconds"] for one in each)
        sums["limit"] = f"{longest}: {phases[longest]['limit']}"
    return sums


def told_mesh(mesh: Mesh) -> str:
    """A mesh in words."""
    axes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    return f"mesh {axes or 'of one'}"


def draw(path: Path, title: str, records: Sequence[dict[str, Any]]) -> None:
    """Memory of each program as a bar of its kinds, and the limit as a line.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.8 * len(records)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    kinds = [*dict.fromkeys(kind for one in records for kind in one["bytes"] if kind != OTHERS), OTHERS]
    names = [one["program"] for one in records]
    left = [0.0] * len(records)
    for number, kind in enumerate(kinds):
        sizes = [one["bytes"].get(kind, 0) / GIB for one in records]
        axes.barh(names, sizes, left=left, label=kind, color=f"C{number}", height=0.6)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    if (has := records[0]["has"]) is not None:
        axes.axvline(has / GIB, color="black", linestyle="--", label="has")
    axes.invert_yaxis()
    axes.set(xlabel="GiB a device", title=title)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
