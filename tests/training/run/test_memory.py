from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxrl_llm import cli, device_memory
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import MeshConfig, make_mesh
from jaxrl_llm.training.run.memory import OutOfMemoryError, bytes_of, check_memory, naming_phase, rollout_bytes


def test_a_rollout_by_hand(tiny_config) -> None:
    """Of few rows in one product; in slots, pages of eight tokens for each of these, idle ones too."""
    model = Transformer(tiny_config(num_layers=3, num_kv_heads=2, head_dim=8, num_heads=2))
    mesh, token = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4]), 2 * 3 * 2 * 8 * 4

    def needs(slots: Any, top_k: int | None = None) -> list[int]:
        config = SamplingConfig(max_tokens=5, slots=slots, top_k=top_k)
        sampler = Sampler(model, config, group=6, stop_tokens=(), mesh=mesh, keep_mask=top_k is not None)
        return list(rollout_bytes(sampler, prompts=4, max_prompt_length=7).values())

    assert needs(None) == [4 * (7 + 6 * 5) * token, 4 * 4 * (7 + 3 * 6 * 5)]
    assert needs(None, 3) == [4 * (4 * 4 * 6 * 5 * 3), *needs(None)]  # ids on four devices
    for slots, places, there in ((1, 1, 1), (5, 2, 5), (11, 2, 12), ("auto", 1, 1)):  # of each of two devices
        assert needs(slots)[0] == 2 * (places + 2 * there) * 8 * token


def test_bytes_of_a_tree() -> None:
    shapes = {"a": jax.ShapeDtypeStruct((3, 5), jnp.float32), "b": [jax.ShapeDtypeStruct((7,), jnp.bfloat16)]}
    assert bytes_of(shapes) == 3 * 5 * 4 + 7 * 2


def test_what_surely_does_not_fit_is_refused_with_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "host_memory", lambda: 8 * 10**9)
    mesh = make_mesh()  # of 8 devices that share the host
    check_memory(mesh, {"parameters": 5 * 10**9, "tokens": 3 * 10**9}, "rows")
    with pytest.raises(ValueError) as raised:
        check_memory(mesh, {"parameters": 5 * 10**9, "tokens": 11 * 10**9}, "rows")
    assert str(raised.value) == (
        "at least 2 GB are needed on each of 8 device(s), which have 1 GB (tokens 11 GB, parameters 5 GB, over all "
        "devices): lower rows"
    )
    monkeypatch.setattr(device_memory, "host_memory", lambda: None)
    check_memory(mesh, {"parameters": 10**30}, "rows")


@pytest.mark.parametrize(
    ("error", "phase", "helps"),
    [
        (MemoryError("Unable to allocate 4 TiB"), "data", "lower training"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9"), "sample", "set sampling.slots"),
        (jax.errors.JaxRuntimeError("INTERNAL: out of memory"), "update", "raise update.micro_batches"),
        (jax.errors.JaxRuntimeError("INTERNAL: out of memory"), "update", "lower update.tokens_per_micro_batch"),
    ],
)
def test_a_phase_without_memory_is_named(error: Exception, phase: str, helps: str) -> None:
    with pytest.raises(OutOfMemoryError) as raised, naming_phase(phase):
        raise error
    assert str(raised.value).startswith(f"out of memory in the phase {phase!r}: ") and helps in str(raised.value)
    assert str(error) in str(raised.value) and raised.value.status == 1


def test_other_errors_pass() -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID"), naming_phase("update"):
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: shapes")
    with pytest.raises(KeyError), naming_phase("update"):
        raise KeyError("update")


@pytest.mark.parametrize("takes_state", [False, True])
def test_a_step_without_memory_ends_with_one_line(
    tiny: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], takes_state: bool
) -> None:
    """The steps before are saved, unless the update that failed had already been given the state."""
    flags = ["--training.steps=4", "--training.checkpoint-every=9", "--evaluation.every=0"]
    config = cli.start(cli.parse(tiny.CONFIG, [f"--run-dir={tmp_path / 'run'}", *flags]))
    _, trainer = tiny.make(config, make_mesh(config.mesh))
    update = trainer.update

    def failing(state: Any, *args: Any) -> Any:
        if int(state.step) < 2:
            return update(state, *args)
        if takes_state:
            jax.tree.map(lambda leaf: leaf.delete(), state)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.")

    trainer.update = failing
    with pytest.raises(SystemExit) as ended:
        cli.train(trainer)
    out, error = capsys.readouterr()
    assert ended.value.code == 1 and error.count("\n") == 1
    assert error.startswith("error: out of memory in the phase 'update': raise update.micro_batches")
    assert ("Failed after step 2 and saved." in out) == (not takes_state)
