"""The TPU kernel of attention compiles for every generation, on meshes, too, and keeps nothing that is quadratic."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "tpu_scripts" / "compile_attention.py"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, TPUs' compiler, is not installed (extra: tpu)"
)


def run(*command: str, timeout: float = 600) -> str:
    """In a process of its own: what is set for the compiler is set for good."""
    told = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=timeout)
    assert told.returncode == 0, told.stderr
    return told.stdout


def test_temporaries_are_a_fiftieth_of_dense_attention():
    sizes = ("--prompt-tokens=1024", "--samples=2", "--completion-tokens=512", "--heads=4", "--kv-heads=2")
    lines = run(str(SCRIPT), *sizes, "--implementations", "splash", "dense").splitlines()
    assert lines[0].startswith("TPU v5 lite: 2048 tokens, 4 heads, 2 of keys, of 128, bfloat16")
    splash, dense = (float(line.split(" MiB")[0].split()[-1].replace(",", "")) for line in lines[1:])
    assert splash < 0.02 * dense


@pytest.mark.slow
@pytest.mark.parametrize("generation", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_compiles_for_heads_of_all_sizes(generation: str):
    line = """if True:
        import sys
        sys.path.insert(0, sys.argv[1])
        from compile_attention import Plan, compile_attention
        small = {"slice": sys.argv[2], "prompt_tokens": 1024, "samples": 2, "completion_tokens": 512, "heads": 4,
                 "kv_heads": 2}
        plans = [Plan(head_dim=size, window=300, softcap=50.0, **small) for size in (64, 128, 256)]
        plans += [Plan(head_dim=128, dtype="float32", **small), Plan(head_dim=80, **(small | {"samples": 1}))]
        print([compile_attention(plan, "splash").temporaries for plan in plans])
    """
    temporaries = ast.literal_eval(run("-c", line, str(SCRIPT.parent), generation))
    assert len(temporaries) == 5
    assert max(temporaries) < 64 * 2**20


@pytest.mark.slow
def test_long_rows_fit_the_scalar_memory():
    sizes = ("--prompt-tokens=131072", "--samples=1", "--completion-tokens=16384", "--heads=2", "--kv-heads=1")
    told = run(str(SCRIPT), *sizes, "--implementations", "splash")
    assert "147456 tokens" in told
    assert "temporaries" in told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("generation", "mesh"),
    [("v5e:2x4", (4, 2)), ("v5e:16x16", (32, 8)), ("v5p:4x4x4", (16, 4)), ("v6e:8x8", (64, 1))],
)
def test_compiles_in_a_scanned_stack_on_a_slice(generation: str, mesh: tuple[int, int]):
    """Split over rows and heads without communication; with attention kept, each kernel is there once."""
    line = """if True:
        import re, sys
        sys.path.insert(0, sys.argv[1])
        import jax, jax.numpy as jnp
        from jax.sharding import NamedSharding
        from jaxrl_llm.launch.plan.slices import slice_devices
        from jaxrl_llm.models.attention import ATTENTION, Visibility
        from jaxrl_llm.models.kernels.sharded import over_mesh
        from jaxrl_llm.models.kernels.splash import splash_attention
        from jaxrl_llm.sharding import MeshConfig, make_mesh, on_cpu, spec
        rows, tensor = int(sys.argv[3]), int(sys.argv[4])
        mesh = make_mesh(MeshConfig(fsdp=rows, tensor=tensor), slice_devices(sys.argv[2]))
        def array(dtype, *shape, axes):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec(mesh, axes)))
        query, key = (array(jnp.bfloat16, rows, 1024, heads, 128, axes=("rows", None, "heads_activation", None))
                      for heads in (2 * tensor, tensor))
        visible = Visibility(*[array(jnp.int32, rows, 1024, axes=("rows", None))] * 5)
        def loss(query, key, value, visible):
            assert not on_cpu()
            def layer(x, _):
                return x + over_mesh(splash_attention, x, key, value, visible), None
            keep = jax.checkpoint_policies.save_only_these_names(ATTENTION)
            return jnp.sum(jax.lax.scan(jax.checkpoint(layer, policy=keep), query, length=4)[0].astype(jnp.float32))
        with jax.set_mesh(mesh):
            text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(query, key, key, visible).compile().as_text()
        kernels = [len(re.findall(rf"%\\\\S*splash_{part}\\\\S* = .*tpu_custom_call", text))
                   for part in ("forward", "query_gradient", "key_gradient")]
        print((kernels, re.findall(r" (?:all-[a-z]+|reduce-scatter|collective-[a-z]+)(?:-start)?\\\\(", text)))
    """.replace("\\\\", "\\")
    told = run("-c", line, str(SCRIPT.parent), generation, *map(str, mesh))
    assert ast.literal_eval(told) == ([1, 1, 1], [])
