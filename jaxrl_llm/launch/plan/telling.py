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


def describe(program: Program, report: Report, chip: Chip | None) -> str:
    """A compiled program as a few lines; `None`: nothing is known of the chip."""
    told = record(program, report, chip)
    verdict = f"needs {told['needed'] / GIB:.2f} GiB a device"
    if chip is not None:
        verdict += f" of {chip.hbm_gib}: " + ("fits" if told["fits"] else "DOES NOT FIT")
    memory = ", ".join(f"{name} {_gib(size)}" for name, size in told["bytes"].items())
    host = f"; in the host's memory {_gib(report.host)}" if report.host else ""
    again = f", and {program.work.again:.3g} again in the backward pass" if program.work.again else ""
    rows = [
        f"{program.name}: {verdict}",
        f"  compiled in {report.seconds:.0f} s of CPU",
        f"  GiB           {memory}{host}; peak of the live {_gib(report.peak)}",
        f"  FLOPs         {program.work.flops:.3g} a device{again}",
    ]
    if chip is not None:
        limits = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in told["seconds"].items())
        turns = f"{program.work.turns:,} {program.work.turn}s"
        rows.append(f"  at least      {limits}: {told['limit']} binds ({turns} one after another)")
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
    """The same as plain numbers: bytes, operations and seconds of one device."""
    work, sent = program.work, report.sent(program.work)
    between = sent.get(BETWEEN, 0)
    seconds = {} if chip is None else work.seconds(chip, sum(sent.values()) - between, between)
    return {
        "program": program.name,
        "needed": report.needed,
        "has": None if chip is None else round(chip.hbm_gib * GIB),
        "fits": None if chip is None else report.needed <= chip.hbm_gib * GIB,
        "bytes": report.by_kind(program.parts),
        "host_bytes": report.host,
        "peak": report.peak,
        "flops": work.flops,
        "flops_again": work.again,
        "read": work.read,
        "turns": work.turns,
        "sent": sent,
        "seconds": seconds,
        "limit": max(seconds, key=lambda name: seconds[name]) if seconds else None,
        "compile_cpu_seconds": round(report.seconds, 1),
        "remarks": list(program.remarks),
        **({} if program.slots is None else {"slots": program.slots}),
    }


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
