"""Damage to the files of checkpoints: none is silent, and a run goes on from the checkpoint before it."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.training.run.checkpoint import Checkpointer
from jaxrl_llm.training.run.damaged_files import DamagedRunError, reading_checkpoint
from jaxrl_llm.training.run.resume import SavedRun, find_run, restore_run


def state_of(step: int) -> dict[str, Any]:
    """Arrays large enough for files of their own, and small ones, of every size of entries."""
    key = jax.random.key(step)
    weight = jax.random.normal(key, (64, 33))
    return {
        "w": weight,
        "half": weight.astype(jnp.bfloat16),
        "ids": jax.random.bits(key, (1500,), jnp.uint8),
        "on": weight[0] > 0,
        "step": jnp.int32(step),
    }


def same_bits(one: Any, other: Any) -> bool:
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in leaves)


def extra_of(step: int) -> dict[str, Any]:
    run = SavedRun(step, {"index": 12 * step, "share": 0.1}, [{"eval/accuracy": 0.25}], {"seed": 0, "name": "ünï"})
    return run.extra()


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with checkpoints 2, 4 and 6."""
    run_dir = tmp_path_factory.mktemp("three")
    with Checkpointer(run_dir / "checkpoints", best_metric="m") as checkpoints:
        for step in (2, 4, 6):
            checkpoints.save(step, state_of(step), extra_of(step), {"m": step / 10})
    return run_dir


@pytest.fixture
def run_dir(three: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(three, tmp_path / "run"))


def flips(folder: Path, count: int, seed: int) -> Iterator[str]:
    """Flips one bit at a time, and back again: half of them in a file drawn at random, half in a byte."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    sizes, draw = [path.stat().st_size for path in files], random.Random(seed)
    for number in range(count):
        file = draw.choices(files, sizes if number % 2 else None)[0]
        whole = file.read_bytes()
        place, bit = draw.randrange(len(whole)), draw.randrange(8)
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        yield f"{file.relative_to(folder)}, byte {place}, bit {bit}"
        file.write_bytes(whole)


@pytest.mark.parametrize("count", [24, pytest.param(200, marks=pytest.mark.slow)])
def test_no_flipped_bit_is_silent(run_dir: Path, count: int) -> None:
    expected, found = state_of(6), dict.fromkeys(["noticed", "harmless"], 0)
    for place in flips(run_dir / "checkpoints" / "6", count, seed=count):
        try:
            with Checkpointer(run_dir / "checkpoints", best_metric="m", read_only=True) as checkpoints:
                assert checkpoints.all_steps() == [2, 4, 6], place
                restored, extra = checkpoints.restore(expected)
        except DamagedRunError:
            found["noticed"] += 1
        else:
            assert same_bits(restored, expected) and extra == extra_of(6), place
            found["harmless"] += 1
    assert found["noticed"] > count / 4  # the rest are in places, sharding and files that are not read


def flip_the_arrays(checkpoints: Path, step: int) -> None:
    """A bit in the middle of the largest file of values, which nothing but a checksum sees."""
    largest = max((checkpoints / f"{step}/state").rglob("d/*"), key=lambda path: path.stat().st_size)
    values = bytearray(largest.read_bytes())
    values[len(values) // 2] ^= 64
    largest.write_bytes(values)


def link(checkpoints: Path) -> None:
    shutil.rmtree(checkpoints / "6")
    (checkpoints / "6").symlink_to("4")


def copy(checkpoints: Path) -> None:
    shutil.rmtree(checkpoints / "6")
    shutil.copytree(checkpoints / "4", checkpoints / "6")


def stray_copy(checkpoints: Path) -> None:
    shutil.copytree(checkpoints / "4", checkpoints / "7")
    flip_the_arrays(checkpoints, 6)


def arrays_of_another(checkpoints: Path) -> None:
    shutil.rmtree(checkpoints / "6" / "state")
    shutil.copytree(checkpoints / "4" / "state", checkpoints / "6" / "state")


def no_seal(checkpoints: Path) -> None:
    shutil.rmtree(checkpoints / "6" / "seal")


def empty_folder(checkpoints: Path) -> None:
    (checkpoints / "9").mkdir()
    flip_the_arrays(checkpoints, 6)


def another_position(checkpoints: Path) -> None:
    extra = checkpoints / "6" / "extra" / "metadata"
    extra.write_text(extra.read_text().replace('"index": 72', '"index": 73'))


@pytest.mark.parametrize(
    ("harm", "aside", "reason"),
    [
        (lambda checkpoints: flip_the_arrays(checkpoints, 6), [6], r"\(not the values that were saved: \w+"),
        (link, [6], r"\(it is checkpoint 4 under another name\)"),
        (copy, [6], r"\(it is checkpoint 4 under another name\)"),
        (stray_copy, [6, 7], r"\(it is checkpoint 4 under another name\)"),
        (arrays_of_another, [6], r"\(not the values that were saved: .* and \d more\)"),
        (no_seal, [6], r"\(FileNotFoundError: "),
        (empty_folder, [6, 9], r"\(FileNotFoundError: "),
        (another_position, [6], r"\(its settings, its place in the data or its checksums are not those that were"),
    ],
    ids=["flip", "link", "copy", "stray copy", "arrays", "no seal", "empty", "position"],
)
def test_a_run_goes_on_from_the_checkpoint_before_the_damage(
    run_dir: Path, harm: Callable[[Path], None], aside: list[int], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = run_dir / "checkpoints"
    harm(folder)
    saved = find_run(run_dir, {"seed": 0, "name": "ünï"}, resume=True)
    assert saved is not None
    with Checkpointer(folder, keep=3) as checkpoints:
        run, state, remarks = restore_run(checkpoints, saved, state_of(0))
        assert (run, checkpoints.all_steps()) == (SavedRun(4, **extra_of(4)), [2, 4])
        assert same_bits(state, state_of(4))
        assert any(re.search(reason, remark) for remark in remarks), remarks
        assert remarks[-1] == (f"checkpoint(s) {aside} moved to {folder}/damaged; the run goes on from checkpoint 4")
        assert sorted(int(path.name) for path in (folder / "damaged").iterdir()) == aside
        assert checkpoints.save(6, state_of(6), extra_of(6))
        assert same_bits(checkpoints.restore(state_of(0))[0], state_of(6))
    assert capfd.readouterr().err == ""


def test_where_no_checkpoint_is_whole_none_is_moved(run_dir: Path) -> None:
    folder = run_dir / "checkpoints"
    for step in (2, 4, 6):
        flip_the_arrays(folder, step)
    saved = find_run(run_dir, {"seed": 0, "name": "ünï"}, resume=True)
    assert saved is not None and saved.step == 6
    with (
        Checkpointer(folder) as checkpoints,
        pytest.raises(
            DamagedRunError, match=r"none of the checkpoints \[2, 4, 6\] .* delete them all .* checkpoint 6 "
        ),
    ):
        restore_run(checkpoints, saved, state_of(0))
    assert not (folder / "damaged").exists()


def test_an_earlier_checkpoint_of_other_settings_is_not_taken(run_dir: Path) -> None:
    folder = run_dir / "checkpoints"
    flip_the_arrays(folder, 6)
    saved = find_run(run_dir, {"seed": 0, "name": "ünï"}, resume=True)
    assert saved is not None
    with Checkpointer(folder) as checkpoints, pytest.raises(ValueError, match="seed was 0 and is 1"):
        restore_run(checkpoints, dataclasses.replace(saved, settings={"seed": 1, "name": "ünï"}), state_of(0))


@pytest.mark.parametrize("text", ['{"m": 0.', '{"n": 0.5}', '{"m": "?"}', "[]"])
def test_metrics_that_cannot_be_read_are_named(run_dir: Path, text: str) -> None:
    file = run_dir / "checkpoints" / "4" / "metrics" / "metrics"
    assert json.loads(file.read_text()) == {"m": 0.4}
    file.write_text(text)
    with pytest.raises(DamagedRunError, match=rf"^{file} is damaged .*; delete {file.parent}, and checkpoint 4 no"):
        Checkpointer(run_dir / "checkpoints", best_metric="m")
    shutil.rmtree(file.parent)
    with Checkpointer(run_dir / "checkpoints", best_metric="m") as checkpoints:
        assert (checkpoints.best_step(), checkpoints.all_steps()) == (6, [2, 4, 6])


def test_a_store_that_does_not_answer_is_no_damage(tmp_path: Path) -> None:
    for kind in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED"):
        expected = f"checkpoint 1 in {tmp_path} could not be read: ValueError: {kind}: bucket"
        with pytest.raises(OSError, match=expected), reading_checkpoint(tmp_path, 1, [1]):
            raise ValueError(f"{kind}: bucket")
