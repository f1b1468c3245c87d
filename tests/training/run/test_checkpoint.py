from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl_llm.training.compilation import CompilationCounter
from jaxrl_llm.training.run.checkpoint import Checkpointer
from jaxrl_llm.training.run.damaged_files import DamagedRunError, reading_checkpoint


def make_state(seed: int = 0, size: int = 8) -> dict[str, Any]:
    """Every type a training state has, with values whose every bit matters."""
    key = jax.random.key(seed)
    bits = jax.random.bits(key, (size, 4), jnp.uint32)
    weight = jax.random.normal(key, (size, 4))
    return {
        "params": {"w": weight.at[0, 0].set(jnp.nan), "half": weight.astype(jnp.bfloat16)},
        "opt_state": ({"mu": {"w": weight * 1e-30, "frozen": None}}, ()),
        "step": jnp.int32(seed),
        "key": jax.random.key_data(key),
        "bits": bits,
        "controller": None,
    }


def assert_bit_equal(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def steps_on_disk(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def test_round_trip_is_bit_exact(tmp_path: Path) -> None:
    state = make_state(3)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() is None
        assert checkpointer.save(3, state, {"data": {"index": 12}, "loss": 0.1})
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() == 3
        restored, extra = checkpointer.restore(state)
        assert checkpointer.read_extra() == extra == {"data": {"index": 12}, "loss": 0.1}
    assert_bit_equal(restored, state)
    assert restored["controller"] is None


def test_restores_onto_other_meshes(tmp_path: Path, mesh: Mesh) -> None:
    state = {"w": jnp.arange(64, dtype=jnp.float32).reshape(8, 8), "step": jnp.int32(5)}
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "tensor"))
    whole = NamedSharding(mesh, PartitionSpec())
    sharded = {"w": jax.device_put(state["w"], rows), "step": jax.device_put(state["step"], whole)}
    other_mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, sharded)
        for w_sharding, step_sharding in (
            (NamedSharding(other_mesh, PartitionSpec("fsdp")), NamedSharding(other_mesh, PartitionSpec())),
            (one_device, one_device),
            (rows, whole),
        ):
            abstract = {
                "w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=w_sharding),
                "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=step_sharding),
            }
            restored, _ = checkpointer.restore(abstract)
            assert restored["w"].sharding == w_sharding
            assert_bit_equal(restored, state)


def test_donating_the_state_right_after_save_does_not_change_what_is_saved(tmp_path: Path) -> None:
    state = {f"w{i}": jnp.full((1000, 1000), float(i)) for i in range(16)}
    expected = jax.tree.map(np.array, state)

    def scale(state: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return jax.tree.map(lambda w: w * 2 + 1, state)

    step = jax.jit(scale, donate_argnums=0)
    with Checkpointer(tmp_path) as checkpointer:
        shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=w.sharding), state)
        checkpointer.save(0, state)
        for _ in range(5):
            state = step(state)
        jax.block_until_ready(state)
        restored, _ = checkpointer.restore(shapes)
    assert_bit_equal(restored, expected)


def test_extra_is_saved_as_it_was_when_save_was_called(tmp_path: Path) -> None:
    extra = {"position": [1]}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(), extra)
        extra["position"].append(2)
        assert checkpointer.read_extra() == {"position": [1]}
        with pytest.raises(TypeError, match="not JSON serializable"):
            checkpointer.save(2, make_state(), {"position": object()})
        assert checkpointer.all_steps() == [1]


def test_saving_and_restoring_compile_checksums_alone_and_once(tmp_path: Path) -> None:
    state = jax.device_put(make_state(size=13), jax.devices()[0])
    with CompilationCounter() as counter, Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        assert counter.counts == {"_checksums": 1}
        mark = counter.mark()
        restored, _ = checkpointer.restore(state)
        checkpointer.save(2, restored)
    assert counter.since(mark) == {}


def test_keeps_the_latest_and_the_best(tmp_path: Path) -> None:
    accuracies = {1: 0.2, 2: 0.9, 3: None, 4: 0.9, 5: math.nan, 6: 0.3, 7: None}
    state = make_state()
    with Checkpointer(tmp_path, keep=2, best_metric="eval/accuracy") as checkpointer:
        assert checkpointer.best_step() is None
        for step, accuracy in accuracies.items():
            metrics = None if accuracy is None else {"eval/accuracy": accuracy, "eval/length": 3.0}
            checkpointer.save(step, state, metrics=metrics)
        assert checkpointer.all_steps() == [4, 6, 7]
        assert (checkpointer.latest_step(), checkpointer.best_step()) == (7, 4)
    assert steps_on_disk(tmp_path) == [4, 6, 7]
    assert not (tmp_path / "deleted").exists()
    # The best is known to the next process.
    with Checkpointer(tmp_path, keep=2, best_metric="eval/accuracy") as checkpointer:
        assert checkpointer.best_step() == 4
        checkpointer.save(8, state, metrics={"eval/accuracy": 0.95})
        checkpointer.save(9, state)
        assert checkpointer.all_steps() == [8, 9]


def test_best_may_be_the_least(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep=1, best_metric="loss", best_mode="min") as checkpointer:
        for step, loss in enumerate([3.0, 1.0, 2.0]):
            checkpointer.save(step, make_state(), metrics={"loss": loss})
        assert (checkpointer.best_step(), checkpointer.all_steps()) == (1, [1, 2])


def test_without_a_best_metric_only_the_latest_stay(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        for step in range(4):
            checkpointer.save(step, make_state(), metrics={"loss": step})
        assert (checkpointer.best_step(), checkpointer.all_steps()) == (None, [2, 3])


def test_misspelt_best_metric_names_the_metrics(tmp_path: Path) -> None:
    with (
        Checkpointer(tmp_path, best_metric="eval/acuracy") as checkpointer,
        pytest.raises(ValueError, match=r"'eval/acuracy' is not among the metrics: eval/accuracy"),
    ):
        checkpointer.save(1, make_state(), metrics={"eval/accuracy": 1.0})


def test_saving_the_same_step_again(tmp_path: Path) -> None:
    state = make_state()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(5, state)
        assert not checkpointer.save(5, state)  # the end of a run that just saved
    with Checkpointer(tmp_path) as checkpointer:
        # Another run in a folder that is taken: silence would lose its checkpoints.
        with pytest.raises(ValueError, match="already has step 5"):
            checkpointer.save(5, state)
        with pytest.raises(ValueError, match="already has step 5"):
            checkpointer.save(4, state)
        checkpointer.restore(state)
        assert not checkpointer.save(5, state)
        assert checkpointer.save(6, state)


def test_going_back_to_an_earlier_step(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, make_state(step))
        restored, _ = checkpointer.restore(make_state(), step=2)
        assert int(restored["step"]) == 2
        checkpointer.discard_after(2)
        assert checkpointer.all_steps() == steps_on_disk(tmp_path) == [1, 2]
        assert checkpointer.save(3, make_state(33))
        restored, _ = checkpointer.restore(make_state())
    assert int(restored["step"]) == 33


def test_missing_checkpoints(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "new") as checkpointer:
        with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*new"):
            checkpointer.restore(make_state())
        checkpointer.save(3, make_state())
        with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 4 .* it has \[3\]"):
            checkpointer.restore(make_state(), step=4)
    with pytest.raises(FileNotFoundError, match="absent"):
        Checkpointer(tmp_path / "absent", read_only=True)
    assert not (tmp_path / "absent").exists()


def test_another_model_is_named_path_by_path(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state())
        other = make_state(size=16)
        other["controller"] = jnp.ones(())
        del other["bits"]
        with pytest.raises(ValueError) as error:
            checkpointer.restore(other)
        assert "another model or optimizer" in str(error.value)
        for line in (
            "controller: not in the checkpoint",
            "bits: only in the checkpoint",
            "params/half: saved bfloat16[8,4], expected bfloat16[16,4]",
        ):
            assert f"\n  {line}" in str(error.value)
        half = make_state()
        half["params"]["w"] = half["params"]["w"].astype(jnp.bfloat16)
        with pytest.raises(ValueError, match=r"params/w: saved float32\[8,4\], expected bfloat16\[8,4\]"):
            checkpointer.restore(half)
        with pytest.raises(ValueError, match="a sharding for every array of abstract_state; bits has none"):
            checkpointer.restore(jax.eval_shape(make_state))


@pytest.mark.parametrize(
    "file", ["extra/metadata", "state/_METADATA", "state/manifest.ocdbt", "state/d/*", "extra", "state"]
)
@pytest.mark.parametrize("harm", ["cut", "lost"])
def test_a_damaged_checkpoint_is_named_with_the_way_out(tmp_path: Path, file: str, harm: str) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, make_state(step), {"step": step})
    for path in tmp_path.glob(f"2/{file}"):
        if path.is_dir():
            shutil.rmtree(path)
        elif harm == "lost":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        way_out = rf"is damaged \(.*\); delete {tmp_path}/2 to resume from an earlier one$"
        with pytest.raises(DamagedRunError, match=f"^checkpoint 2 in {tmp_path} {way_out}") as caught:
            checkpointer.restore(make_state())
        assert "\n" not in str(caught.value)
        if file.startswith("extra"):
            with pytest.raises(DamagedRunError, match=way_out):
                checkpointer.read_extra()
        assert checkpointer.restore(make_state(), 1)[1] == {"step": 1}


def test_a_damaged_checkpoint_that_is_the_only_one(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state())
        checkpointer.wait()
        (tmp_path / "1" / "extra" / "metadata").unlink()
        with pytest.raises(DamagedRunError, match=rf"delete {tmp_path}/1 to start anew$"):
            checkpointer.read_extra()


def test_what_does_not_come_from_the_files_is_not_called_damage(tmp_path: Path) -> None:
    for error in (PermissionError(13, "Permission denied"), MemoryError()):
        with pytest.raises(type(error)), reading_checkpoint(tmp_path, 1, [1]):
            raise error


def test_refused_settings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep must be at least 1"):
        Checkpointer(tmp_path, keep=0)
    with pytest.raises(ValueError, match="'highest'"):
        Checkpointer(tmp_path, best_mode="highest")


def run_process(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    prelude = """
        import os, resource, signal, sys
        import jax, jax.numpy as jnp, numpy as np
        from pathlib import Path
        from jaxrl_llm.training.run.checkpoint import Checkpointer
        folder = Path(sys.argv[1])
        def state(step, size):
            w = np.random.default_rng(step).random((size, 1000), np.float32)  # incompressible
            return {"w": jnp.asarray(w), "step": jnp.int32(step)}
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(script), str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def abstract_state(size: int) -> dict[str, jax.ShapeDtypeStruct]:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {
        "w": jax.ShapeDtypeStruct((size, 1000), jnp.float32, sharding=sharding),
        "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding),
    }


def test_killed_while_writing_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    result = run_process(
        """
        big = state(2, 20_000)
        checkpointer = Checkpointer(folder)
        checkpointer.save(1, state(1, 1_000))
        checkpointer.wait()
        checkpointer.save(2, big)
        while not any(folder.glob("2.*")):  # the writing begins in another thread
            pass
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        tmp_path,
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    unfinished = [path.name for path in tmp_path.iterdir() if path.name != "1"]
    assert len(unfinished) == 1 and unfinished[0].startswith("2."), unfinished  # it was being written

    # A reader leaves alone what may be another process's work.
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        assert checkpointer.all_steps() == [1]
        with pytest.raises(ValueError, match="read_only"):
            checkpointer.save(2, make_state())
        with pytest.raises(ValueError, match="read_only"):
            checkpointer.discard_after(0)
    assert (tmp_path / unfinished[0]).exists()

    with Checkpointer(tmp_path) as checkpointer:
        restored, _ = checkpointer.restore(abstract_state(1_000))
        assert_bit_equal(restored["w"], np.random.default_rng(1).random((1_000, 1000), np.float32))
        checkpointer.save(3, restored)
        assert checkpointer.all_steps() == [1, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]  # what was left of 2 is gone


def test_full_disk_is_an_error_at_the_next_call_and_saving_can_go_on(tmp_path: Path) -> None:
    # A limit on the size of files fails a write as a full disk does, after the call that started it.
    result = run_process(
        """
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        checkpointer = Checkpointer(folder, keep=1)
        checkpointer.save(1, state(1, 1_000))
        checkpointer.wait()
        for step, call in [
            (2, checkpointer.wait),
            (3, checkpointer.latest_step),
            (4, lambda: checkpointer.save(5, state(5, 1_000))),
        ]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
            assert checkpointer.save(step, state(step, 1_000))
            try:
                call()
            except OSError as error:
                assert f"step {step} could not be written" in str(error), error
                assert "complete ones: [1]" in str(error), error
            else:
                raise AssertionError(f"{step}: no error")
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert checkpointer.all_steps() == [1]  # raised once, and step 1 was not removed for its successor
        checkpointer.save(6, state(6, 1_000))
        checkpointer.close()
        """,
        tmp_path,
    )
    assert (result.returncode, result.stderr) == (0, "")  # and no traceback of the libraries below
    with Checkpointer(tmp_path) as checkpointer:
        restored, _ = checkpointer.restore(abstract_state(1_000))
    assert int(restored["step"]) == 6
    assert steps_on_disk(tmp_path) == [6]


def test_error_that_ended_the_run_is_not_hidden_by_a_failed_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OSError("no space left on device")

    with (
        pytest.raises(KeyError, match="the reward function") as error,
        Checkpointer(tmp_path) as checkpointer,
    ):
        checkpointer.save(1, make_state())
        checkpointer.wait()
        checkpointer.save(2, make_state())
        monkeypatch.setattr(checkpointer._manager, "wait_until_finished", fail)
        monkeypatch.setattr(checkpointer._manager, "close", lambda: None)
        raise KeyError("the reward function")
    assert any("no space left on device" in note for note in error.value.__notes__)


def test_old_checkpoints_are_renamed_before_they_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A process killed in the middle of the removal: half a checkpoint must never be among the numbered ones.
    with monkeypatch.context() as patch, Checkpointer(tmp_path, keep=1) as checkpointer:
        patch.setattr(checkpointer, "_remove_deleted", lambda: None)
        checkpointer.save(1, make_state())
        checkpointer.save(2, make_state())
        assert checkpointer.all_steps() == [2]
        assert (tmp_path / "deleted" / "1" / "state").exists()
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        assert checkpointer.all_steps() == [2]
        assert not (tmp_path / "deleted").exists()


def test_files_are_readable_without_this_package(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(), {"seed": 7})
    assert json.loads((tmp_path / "1" / "extra" / "metadata").read_text()) == {"seed": 7}
    assert os.path.exists(tmp_path / "1" / "state" / "_METADATA")
