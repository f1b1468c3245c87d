"""What XLA's partitioner makes of the programs on eight devices: nothing replicated for want of a way, sums in float32.

It says so on the standard error of the process, and only where it compiles: hence processes without a cache. The types
of collectives are those that it chose; what follows on a CPU widens them.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, re, sys, tempfile
from pathlib import Path

import jax

jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp

from jaxrl_llm.algorithms.batching import UpdateConfig
from jaxrl_llm.algorithms.optimizer import OptimizerConfig, make_optimizer, make_schedule
from jaxrl_llm.algorithms.policy_gradient.presets import dapo
from jaxrl_llm.algorithms.policy_gradient.update import make_update_step
from jaxrl_llm.algorithms.state import abstract_train_state
from jaxrl_llm.models.config import LoraConfig, ModelConfig
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import MeshConfig, make_mesh, replicated
from jaxrl_llm.types import Rollout

P, G, TP, TC = 16, 2, 8, 12
found = []
for case in json.loads(sys.argv[1]):
    changes = case.get("model", {})
    changes |= {"lora": LoraConfig(rank=4)} if case.get("lora") else {}
    sizes = {"tie_embeddings": not case.get("lora"), "qk_norm": True, "attention_bias": True, "dtype": "bfloat16"}
    model = Transformer(ModelConfig(512, 64, 128, 2, 8, case["kv"], 16, **(sizes | changes)))
    mesh = make_mesh(MeshConfig(**case["mesh"]))
    whole = replicated(mesh)

    def array(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    rule = OptimizerConfig()
    optimizer = make_optimizer(rule, make_schedule(rule, 10))
    state = abstract_train_state(model, optimizer, mesh)
    if case["program"] == "sampler":
        settings = SamplingConfig(max_tokens=TC, tensor=case.get("tensor"))
        sampler = Sampler(model, settings, group=G, stop_tokens=(0,), mesh=mesh)
        program = jax.jit(sampler.sample, out_shardings=whole)
        arguments = state.params, array(P, TP), array(P), state.key, array()
    else:
        tokens, scores = array(P, G, TC), array(P, G, TC, dtype=jnp.float32)
        ended = array(P, G, dtype=jnp.bool)
        rollout = Rollout(array(P, TP), array(P), tokens, array(P, G), ended, scores, scores)
        step = make_update_step(model, optimizer, dapo(), UpdateConfig(micro_batches=2))
        placed = jax.tree.map(lambda leaf: leaf.sharding, state)
        program = jax.jit(step, donate_argnums=0, out_shardings=(placed, whole))
        arguments = state, rollout, array(P, G, dtype=jnp.float32), None
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd-partitioning"}
        print(json.dumps(case), file=sys.stderr, flush=True)
        program.lower(*arguments).compile(compiler_options=options)
        (text,) = [path.read_text() for path in Path(folder).glob("*.after_spmd-partitioning.*")]
    sums = re.findall(r" = (\\w+)\\[([\\d,]*)\\]\\S* (?:all-reduce|reduce-scatter)\\(.*op_name=\\"([^\\"]*)\\"", text)
    found.append([(kind, shape, name) for kind, shape, name in sums])
print(json.dumps(found))
"""


def partition(*cases: dict) -> tuple[list[list[list[str]]], str]:
    """The sums over devices of each program (type, shape, operation), and what the partitioner complained of."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(cases)],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false", "TF_CPP_MIN_LOG_LEVEL": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout), run.stderr


FSDP, FSDP_TENSOR, ALL = {"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"data": 2, "fsdp": 2, "tensor": 2}
CONTEXT, ALL_WITH_CONTEXT = {"fsdp": 2, "context": 4}, {"data": 2, "fsdp": 1, "context": 2, "tensor": 2}


def of_weights(sums: list[list[str]]) -> list[tuple[str, str]]:
    """Type and shape of the sums that are gradients of weights: products over tokens, and the embedding's."""
    return [(kind, shape) for kind, shape, name in sums if "...m,...n->mn" in name or "scatter-add" in name]


def test_gradients_of_weights_are_summed_in_float32_unless_asked_otherwise():
    """Of a model that computes in bfloat16; with it, that nothing was replicated for want of a way, and over what."""
    narrow = {"gradient_sums": "bfloat16"}
    cases = [
        {"program": "update", "mesh": ALL, "kv": 1},
        {"program": "update", "mesh": FSDP, "kv": 2, "lora": True},
        {"program": "update", "mesh": FSDP, "kv": 2, "model": narrow},
    ]
    (whole, adapters, rounded), complaints = partition(*cases)
    assert "rematerialization" not in complaints
    for sums in (whole, adapters):
        assert len(of_weights(sums)) >= 7 and {kind for kind, _ in of_weights(sums)} == {"f32"}
    products = [shape for _, shape, name in whole if "...m,...n->mn" in name]
    sizes = [math.prod(map(int, shape.split(","))) for shape in products]
    # Over the two devices of a replica, and then over the replicas what one of the two is to hold.
    assert len(sizes) == 2 * 8 and sizes[::2] == [2 * part for part in sizes[1::2]]
    kinds = [kind for kind, _ in of_weights(rounded)]
    assert kinds.count("bf16") == 7  # of a layer; embedding and head keep float32
    assert kinds.count("f32") == len(kinds) - 7 > 0


def test_nothing_is_replicated_in_the_sampler():
    _, complaints = partition(
        {"program": "sampler", "mesh": FSDP_TENSOR, "kv": 2}, {"program": "sampler", "mesh": FSDP, "kv": 2, "tensor": 4}
    )
    assert '"sampler"' in complaints and "rematerialization" not in complaints


@pytest.mark.slow
def test_nothing_is_replicated_on_any_mesh():
    """On all meshes, for fewer heads of keys and values than the tensor axis has devices, as many, and more."""
    cases = [
        {"program": program, "mesh": mesh, "kv": kv}
        for program in ("update", "sampler")
        for mesh in (FSDP, FSDP_TENSOR, ALL, {"data": 2, "fsdp": 4}, CONTEXT, ALL_WITH_CONTEXT)
        for kv in (1, 2, 4)
    ]
    sums, complaints = partition(*cases)
    assert len(sums) == len(cases) and complaints.count('"program"') == len(cases)
    assert "rematerialization" not in complaints
