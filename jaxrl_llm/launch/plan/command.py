"""The command that says of a slice what training needs there, before it is rented."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxrl_llm.launch.errors import plain_errors
from jaxrl_llm.launch.flags import read_flags
from jaxrl_llm.launch.plan.compiled import compile_program
from jaxrl_llm.launch.plan.programs import build
from jaxrl_llm.launch.plan.settings import Plan
from jaxrl_llm.launch.plan.slices import CHIPS, slice_devices
from jaxrl_llm.launch.plan.telling import describe, draw, record
from jaxrl_llm.sharding import make_mesh


def run_plan(args: Sequence[str] | None = None, *, description: str = "") -> None:
    """Compiles and reports; exit status 1 if a program does not fit.

    libtpu holds the compiler of every TPU generation and needs no TPU for it (x86-64 Linux). Nothing is run and no
    weight is read: of a model's folder, `config.json` is enough.

    Args:
        args: the command line; `None`: the process's.
        description: for `--help`.
    """
    with plain_errors():
        plan = read_flags(Plan(), args, description)
        mesh = make_mesh(plan.mesh, slice_devices(plan.slice))
        programs = build(plan, mesh)
    kind = mesh.devices.flat[0].device_kind
    axes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    title = f"{plan.slice}, {mesh.size} × {kind}, mesh {axes or 'of one'}; JAX {jax.__version__}"
    print(title)
    chip, records = CHIPS.get(kind), []
    for program in programs:
        try:
            report = compile_program(program, mesh)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            refusal = str(error).splitlines()[0]
            print(f"{program.name}: DOES NOT FIT\n  {refusal}", flush=True)
            records.append({"program": program.name, "fits": False, "error": refusal})
            continue
        print(describe(program, report, chip), flush=True)
        records.append(record(program, report, chip))
        if plan.dump is not None:
            _write(Path(plan.dump) / f"{program.name}.hlo.txt", report.text)
    with plain_errors():
        if plan.json is not None:
            _write(Path(plan.json), json.dumps({"plan": title, "programs": records}, indent=1) + "\n")
        if plan.picture is not None and (compiled := [one for one in records if "bytes" in one]):
            draw(Path(plan.picture), title, compiled)
    raise SystemExit(0 if all(one["fits"] is not False for one in records) else 1)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
