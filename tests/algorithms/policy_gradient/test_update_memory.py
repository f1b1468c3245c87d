"""What an update needs beside what it must have, by XLA's count."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxrl_llm.algorithms.optimizer import OptimizerConfig, make_optimizer, make_schedule
from jaxrl_llm.algorithms.policy_gradient.presets import dr_grpo
from jaxrl_llm.algorithms.policy_gradient.update import make_update_step
from jaxrl_llm.algorithms.state import make_train_state
from jaxrl_llm.models.config import ModelConfig, Remat
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.training.run.memory import bytes_of
from jaxrl_llm.types import Rollout

SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "embed_dim": 256,
    "mlp_dim": 1024,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 64,
}
PROMPT, COMPLETION = 128, 896


@pytest.mark.parametrize("remat", ["full", "attention"])
def test_an_update_needs_little_beside_what_it_must_have(remat: Remat) -> None:
    """A quarter more than parameters, moments, gradient and what is kept of the forward pass, counted by hand.

    That is each layer's input, with `attention` what it gives, and the logits of all tokens.
    """
    config = ModelConfig(num_layers=8, tie_embeddings=True, remat=remat, **SIZES)
    settings = OptimizerConfig()
    model, optimizer = Transformer(config), make_optimizer(settings, make_schedule(settings, 10))
    state = jax.eval_shape(lambda: make_train_state(model.init(jax.random.key(0)), optimizer, 0))

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    per_token = array(1, 1, COMPLETION, dtype=jnp.float32)
    own: Any = (array(1, 1, COMPLETION), array(1, 1), array(1, 1, dtype=jnp.bool), per_token, per_token)
    rollout = Rollout(array(1, PROMPT), array(1), *own)
    step = jax.jit(make_update_step(model, optimizer, dr_grpo()), donate_argnums=0)
    program = step.lower(state, rollout, array(1, 1, dtype=jnp.float32)).compile().memory_analysis()

    weights = 4 * config.num_parameters
    assert bytes_of(state.params) == weights and 0 <= bytes_of(state.opt_state) - 2 * weights < 100
    of_layers = 4 * 8 * (PROMPT + COMPLETION) * (256 + (4 * 64 if remat == "attention" else 0))
    logits = 4 * COMPLETION * 4096
    must = 4 * weights + of_layers + logits
    assert program is not None
    assert program.alias_size_in_bytes >= 3 * weights  # what is donated is written where it was
    needed = program.argument_size_in_bytes + program.temp_size_in_bytes
    assert must < 1.05 * needed and needed < 1.25 * must, needed / must
