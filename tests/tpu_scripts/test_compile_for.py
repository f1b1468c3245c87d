"""Compiling for a slice that is not there: what is told of a program, on CPU devices and, where libtpu is, on TPUs."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl_llm.algorithms.batching import UpdateConfig
from jaxrl_llm.algorithms.policy_gradient.objective import PolicyGradient
from jaxrl_llm.config import ModelSource
from jaxrl_llm.sharding import MeshConfig

REPOSITORY = Path(__file__).resolve().parents[2]
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, TPUs' compiler, is not installed (extra: tpu)"
)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`compile_for.py`, whose folder is on the path for its own scripts alone."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "tpu_scripts"))
    return importlib.import_module("compile_for")


@pytest.fixture
def model_path(tmp_path: Path) -> str:
    """A folder with a tiny model's config.json and nothing else."""
    golden = json.loads((REPOSITORY / "tests/models/golden/qwen2.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(golden["config"]))
    return str(tmp_path)


def small(script: ModuleType, model_path: str, **changes):
    sizes = {"prompts": 4, "samples": 4, "prompt_tokens": 8, "completion_tokens": 8}
    other = {"model": ModelSource(path=model_path), "update": UpdateConfig(micro_batches=2)}
    return script.Plan(**{**sizes, **other, **changes})


def arguments(model_path: str, *more: str) -> list[str]:
    sizes = {"prompts": 8, "samples": 4, "prompt-tokens": 16, "completion-tokens": 16, "update.micro-batches": 2}
    return ["--model.path", model_path, *(f"--{name}={size}" for name, size in sizes.items()), *more]


# ---- Collectives ---------------------------------------------------------------------------------

HLO = """\
HloModule jit_f, is_scheduled=true

%all-reduce-scatter.1 (input: f32[8,4]) -> f32[8,2] {
  %all-reduce.1 = f32[8,4]{1,0} all-reduce(%input), channel_id=4, to_apply=%add
  ROOT %slice = f32[8,2]{1,0} dynamic-slice(%all-reduce.1)
}

%inner_body (p: (s32[])) -> (s32[]) {
  %permute = (bf16[3,4]{1,0}, bf16[3,4]{1,0}, u32[], u32[]) collective-permute-start(%p), channel_id=3
}

%condition (p: (s32[])) -> pred[] {
  %all-reduce.2 = pred[] all-reduce(%p), channel_id=5
}

%body (p: (s32[])) -> (s32[]) {
  %while.1 = (s32[]) while(%p), condition=%nothing, body=%inner_body, metadata={op_name="x"}
  %fused = f32[8,2]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  %fused.again = f32[8,2]{1,0} fusion(%fused), kind=kCustom, calls=%all-reduce-scatter.1
}

%nothing (p: (s32[])) -> pred[] {
}

ENTRY %main (p: s32[]) -> s32[] {
  %gathered = f32[16]{0:T(128)S(1)} all-gather(%p), channel_id=1, dimensions={0}
  %both = (f32[2]{0}, s8[5]{0}) all-reduce(%p, %p), channel_id=2, to_apply=%add
  %while.2 = (s32[]) while(%p), condition=%condition, body=%body
}
"""


def test_collectives_are_found_where_they_run(script: ModuleType):
    assert [tuple(one) for one in script.collectives(HLO)] == [
        ("all-gather", 64, "once"),
        ("all-reduce", 8 + 5, "once"),
        ("all-reduce", 1, "loop 1"),
        ("collective-permute", 24, "loop 1 inner"),
        ("reduce-scatter", 128, "loop 1"),  # written down once for each fusion it is part of
    ]


def test_text_without_a_program_is_refused(script: ModuleType):
    with pytest.raises(ValueError, match="no HLO module"):
        script.collectives("")


def test_collectives_of_a_real_program(script: ModuleType, mesh: Mesh):
    """A gather before a loop, and a sum over devices each time around it."""
    split, whole = (NamedSharding(mesh, PartitionSpec(axes)) for axes in ("fsdp", None))

    def program(weight: jax.Array, x: jax.Array) -> jax.Array:
        def step(_: int, x: jax.Array) -> jax.Array:
            return jnp.tanh(x * jax.lax.with_sharding_constraint(x, split).sum())

        weight = jax.lax.with_sharding_constraint(weight, whole)
        return jax.lax.fori_loop(0, 5, step, x) + weight

    shapes = [jax.ShapeDtypeStruct((16,), jnp.float32, sharding=sharding) for sharding in (split, whole)]
    text = jax.jit(program, out_shardings=whole).lower(*shapes).compile().as_text()
    found = {(one.kind, one.place) for one in script.collectives(text)}
    assert ("all-gather", "once") in found
    assert ("all-reduce", "loop 1") in found


# ---- Programs ------------------------------------------------------------------------------------


def test_memory_is_that_of_the_arguments_on_one_device(script: ModuleType, model_path: str):
    mesh = script.make_mesh(MeshConfig(fsdp=2, tensor=4))
    plan = small(script, model_path, algorithm=PolicyGradient(kl_coef=0.1))
    programs = {program.name: program for program in script.build(plan, mesh)}
    update, sampler = programs["update"], programs["sampler"]
    report = script.compile_program(update, mesh)
    state, reference = update.arguments[0], update.arguments[3]

    assert report.arguments == pytest.approx(script.bytes_per_device(update.arguments), rel=0.02)
    # Donated: the new state takes no memory beside the old one.
    assert report.outputs < 0.1 * script.bytes_per_device(state)
    # While it samples, the moments and the reference are there, too.
    resident = script.bytes_per_device((state.opt_state, reference))
    assert script.compile_program(sampler, mesh).resident == resident
    parameters = script.bytes_per_device(state.params)
    assert resident == pytest.approx(3 * parameters, rel=0.02)
    assert report.collectives


def test_what_a_token_reads_is_told_of_slots(script: ModuleType, model_path: str):
    mesh = script.make_mesh(MeshConfig(fsdp=2, tensor=4))
    slots = {"slots": 2, "programs": ("sampler",), "completion_tokens": 40}
    (program,) = script.build(small(script, model_path, **slots, written=10), mesh)
    told = re.fullmatch(
        r"  a token reads 0\.00 GiB .* 2 texts of 8 \+ 1 to (\d+) tokens, .* \(auto\), .*", program.remark
    )
    assert told
    assert 10 < int(told[1]) <= 20
    (program,) = script.build(small(script, model_path, **slots, sampling_attention="xla"), mesh)
    assert "(auto)" not in program.remark
    with pytest.raises(ValueError, match="written=21 must be from 1 to 20"):
        script.build(small(script, model_path, **slots, written=21), mesh)


def test_numbers_that_do_not_fit_the_mesh_are_refused(script: ModuleType, model_path: str):
    mesh = script.make_mesh(MeshConfig(), jax.devices()[:3])
    with pytest.raises(ValueError, match=r"mesh\.fsdp"):
        script.build(small(script, model_path), mesh)


@pytest.mark.parametrize(("limit", "word"), [(1.0, "DOES NOT FIT"), (2.0, "fits"), (None, "a device\n")])
def test_verdict_counts_what_stays_in_memory(script: ModuleType, limit: float | None, word: str):
    half = script.GIB // 2
    report = script.Report(1.0, half, 0, half, half, half, 1e9, [], "")
    told = script.describe("update", report, limit)
    assert told.startswith("update: needs 1.50 GiB")
    assert word in told
    assert "no collectives" in told


def test_program_that_does_not_fit_is_no_crash(
    script: ModuleType, model_path: str, monkeypatch: pytest.MonkeyPatch, capsys
):
    def refuse(program, mesh: Mesh):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 20G of 16G\nmore")

    monkeypatch.setattr(script, "compile_program", refuse)
    monkeypatch.setattr(script, "slice_devices", lambda name: jax.devices())
    with pytest.raises(SystemExit, match="1"):
        script.main(arguments(model_path, "--mesh.fsdp", "8"))
    assert capsys.readouterr().out.endswith("update: DOES NOT FIT\n  RESOURCE_EXHAUSTED: 20G of 16G\n")


def test_missing_compiler_is_named(script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        script.main([])
    assert "jaxrl-llm[tpu]" in capsys.readouterr().err


# ---- TPUs ----------------------------------------------------------------------------------------


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The script in a process of its own, as for a user."""
    command = [sys.executable, str(REPOSITORY / "tpu_scripts/compile_for.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@needs_libtpu
def test_both_programs_compile_for_a_slice(model_path: str, tmp_path: Path):
    split = ("--mesh.fsdp", "4", "--mesh.tensor", "2")
    told = run(*arguments(model_path, *split, "--dump", str(tmp_path / "hlo")))
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith("v5e:2x4, 8 × TPU v5 lite, mesh fsdp 4 × tensor 2")
    assert told.stdout.count(" of 15.75: fits") == 2
    assert (tmp_path / "hlo/update.hlo.txt").read_text().startswith("HloModule jit_update_step")


@needs_libtpu
def test_a_weight_is_gathered_and_not_multiplied_part_after_part():
    """Left to itself XLA makes loops of narrow products of it, slow to run and to compile."""
    line = """if True:
        import sys
        sys.path.insert(0, sys.argv[1])
        import compile_for, jax
        import jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec
        from jaxrl_llm.models.blocks import _product
        mesh = compile_for.make_mesh(compile_for.MeshConfig(fsdp=8), compile_for.slice_devices("v5e:2x4"))
        def of(shape, dtype, *axes):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))
        x, weight = of((8, 8704, 1536), "bfloat16", "fsdp"), of((8960, 1536), "float32", None, "fsdp")
        def value(weight, x):
            return jnp.sum(jnp.square(_product("bfloat16", "float32", ("mlp", "embed"), x, weight)), dtype="float32")
        with jax.set_mesh(mesh):
            gradient = jax.jit(jax.grad(value, argnums=(0, 1)), out_shardings=(weight.sharding, x.sharding))
            text = gradient.lower(weight, x).compile().as_text()
        print("windowed_dot_general" in text, "all-gather" in text, "reduce-scatter" in text)
    """
    command = [sys.executable, "-c", line, str(REPOSITORY / "tpu_scripts")]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert told.stdout.split() == ["False", "True", "True"], told.stdout + told.stderr


@needs_libtpu
def test_slice_that_does_not_exist_is_refused():
    told = run("--slice", "v5e:3x3")
    assert told.returncode == 2
    assert told.stderr.splitlines()[-1].startswith("error: slice='v5e:3x3'")


@needs_libtpu
def test_memory_of_a_chip_is_what_the_compiler_says():
    """In a process of its own, too: what is set for the compiler is set for good."""
    line = """if True:
        import re, sys
        sys.path.insert(0, sys.argv[1])
        import compile_for, jax
        for name in ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:1x1", "tpu7x:2x2x1"):
            device = compile_for.slice_devices(name)[0]
            sharding = jax.sharding.SingleDeviceSharding(device)
            huge = jax.ShapeDtypeStruct((2**19, 2**19), "float32", sharding=sharding)
            try:
                jax.jit(lambda x: x + 1).lower(huge).compile()
            except jax.errors.JaxRuntimeError as error:
                said = float(re.search(r"available HBM \\((.*?)G\\)", str(error))[1])
                assert 0 <= said - compile_for.HBM_GIB[device.device_kind] < 0.1, error
                print(device.device_kind)
    """
    command = [sys.executable, "-c", line, str(REPOSITORY / "tpu_scripts")]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert told.stdout.splitlines() == ["TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"], told.stderr
