"""Which models' layers become one loop where nobody has said, and whose programs are compiled with less effort."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxrl_llm.models import unrolling
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.sharding import MeshConfig, make_mesh

TOY = ModelConfig(vocab_size=512, embed_dim=128, mlp_dim=384, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32)


@pytest.mark.parametrize(
    ("changes", "looped"),
    [({}, False), ({"vocab_size": 100_000}, False), ({"num_layers": 30}, True), ({"mlp_dim": 4096}, True)],
)
def test_few_small_layers_are_unrolled(changes, looped):
    assert unrolling.are_looped(dataclasses.replace(TOY, **changes)) is looped


def test_accelerators_loop(monkeypatch):
    monkeypatch.setattr(unrolling, "on_cpu", lambda: False)
    assert unrolling.are_looped(TOY)


def test_the_compiler_knows_what_small_models_ask_of_it():
    mesh = make_mesh(MeshConfig())
    options = unrolling.compiler_options(TOY, mesh)
    assert options and jax.jit(jnp.sin, compiler_options=options)(0.0) == 0
    assert unrolling.compiler_options(dataclasses.replace(TOY, num_layers=30), mesh) is None
