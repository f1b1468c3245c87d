"""The command that says of a slice what training needs there, before it is rented."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxrl_llm.algorithms.policy_gradient import presets
from jaxrl_llm.launch.errors import plain_errors
from jaxrl_llm.launch.flags import read_flags
from jaxrl_llm.launch.on_policy import PRESETS_BY_NAME
from jaxrl_llm.launch.plan.compiled import compile_program
from jaxrl_llm.launch.plan.options import REMATS
from jaxrl_llm.launch.plan.programs import Program, build
from jaxrl_llm.launch.plan.run_flags import run_flags
from jaxrl_llm.launch.plan.search import Found, found_table, search
from jaxrl_llm.launch.plan.settings import Plan
from jaxrl_llm.launch.plan.slices import CHIPS, Chip, slice_devices
from jaxrl_llm.launch.plan.telling import describe, draw, record, told_mesh
from jaxrl_llm.models.config import Remat
from jaxrl_llm.sharding import make_mesh

_HOST = {"by_function", "verdicts", "reference_rewards", "roles", "tasks"}
"""What an algorithm may read that the host makes, in shapes that no plan knows."""

PRESETS = {
    preset.__name__: PRESETS_BY_NAME[preset.__name__]
    for preset in presets.POLICY_GRADIENTS
    if _HOST.isdisjoint(preset().needs)
}
"""What `--preset` may name: what learns from one reward of a completion."""


def run_plan(args: Sequence[str] | None = None, *, description: str = "") -> None:
    """Compiles and reports; exit status 1 if a program does not fit.

    libtpu holds the compiler of every TPU generation and needs no TPU for it (x86-64 Linux). Nothing is run and no
    weight is read: of a model's folder, `config.json` is enough.

    Args:
        args: the command line; `None`: the process's.
        description: for `--help`.
    """
    with plain_errors():
        plan = read_flags(Plan(), args, description, presets=PRESETS)
        devices = slice_devices(plan.slice)
        kind = devices[0].device_kind
        chip, title = CHIPS.get(kind), f"{plan.slice}, {len(devices)} × {kind}; JAX {jax.__version__}"
        if plan.search:
            records = _search(plan, devices, chip, title, _remats(plan, args))
        else:
            records = _one(plan, devices, chip, title)
        if plan.json is not None:
            _write(Path(plan.json), json.dumps({"plan": title, "programs": records}, indent=1) + "\n")
        if plan.picture is not None and (compiled := [one for one in records if "bytes" in one]):
            draw(Path(plan.picture), title, compiled)
    raise SystemExit(0 if records and all(one["fits"] is not False for one in records) else 1)


def _one(plan: Plan, devices: Sequence[Any], chip: Chip | None, title: str) -> list[dict[str, Any]]:
    """The plan as it is asked for: what is known of its programs."""
    mesh = make_mesh(plan.mesh, devices)
    programs = build(plan, mesh)
    print(f"{title}, {told_mesh(mesh)}")
    flags, batch = run_flags(plan)
    return [{**_compiled(plan, program, mesh, chip), "flags": flags, "batch": batch} for program in programs]


def _compiled(plan: Plan, program: Program, mesh: Mesh, chip: Chip | None) -> dict[str, Any]:
    try:
        report = compile_program(program, mesh)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refusal = str(error).splitlines()[0]
        print(f"{program.name}: DOES NOT FIT\n  {refusal}", flush=True)
        return {"program": program.name, "fits": False, "error": refusal}
    print(describe(program, report, chip), flush=True)
    if plan.dump is not None:
        _write(Path(plan.dump) / f"{program.name}.hlo.txt", report.text)
    return record(program, report, chip)


def _remats(plan: Plan, args: Sequence[str] | None) -> tuple[Remat, ...]:
    """What the backward pass may keep in a search: what the command line says of it, or else whatever pays."""
    began = Plan(model=dataclasses.replace(plan.model, remat="none" if plan.model.remat == "full" else "full"))
    is_given = read_flags(began, args, "", presets=PRESETS).model.remat == plan.model.remat
    return (plan.model.remat,) if is_given else REMATS


def _search(
    plan: Plan, devices: Sequence[Any], chip: Chip | None, title: str, remats: Sequence[Remat]
) -> list[dict[str, Any]]:
    """Plans that fit: what is known of their programs, with the flags of each.

    Raises:
        ValueError: the devices are none whose limits are known.
    """
    if chip is None:
        raise ValueError(f"search={plan.search}: nothing is known of the limits of {plan.slice}: name a TPU slice")
    print(title, flush=True)
    began, tell = time.monotonic(), functools.partial(print, flush=True)
    found: list[Found] = []
    for number, one in enumerate(itertools.islice(search(plan, devices, chip, tell, remats=remats), plan.search), 1):
        found.append(one)
        tell(f"{number} of {plan.search}: {one.seconds:.3g} s a step at least: {one.flags}")
    if found:
        print(f"\n{found_table(found)}\n\nof a run (jaxrl-llm grpo), with {found[0].batch}")
    else:
        print("no plan fits: more devices, or fewer tokens at a time, are needed")
    print(f"searched in {time.monotonic() - began:.0f} s")
    return [record | {"flags": one.flags, "batch": one.batch} for one in found for record in one.records]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
