"""The same tokens on every mesh, in one process or two, with any number of slots."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.sampling.same_tokens import sampled

Found = dict[str, list[Any]]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def expected() -> Found:
    """Of one device that decodes all completions together."""
    return sampled({}, None, devices=jax.devices()[:1])


def assert_same(ours: Found, expected: Found) -> None:
    lengths = np.array(expected["completion_lengths"])
    assert 0 < np.mean(expected["finished"]) < 1 and len(np.unique(lengths)) > 10
    for name in ("completion", "completion_lengths", "finished"):
        np.testing.assert_array_equal(ours[name], expected[name], err_msg=name)
    for name in ("logprobs", "sampler_logprobs"):
        np.testing.assert_allclose(ours[name], expected[name], atol=1e-4, err_msg=name)


@pytest.mark.parametrize("slots", [1, 3])
def test_one_device(slots, expected):
    assert_same(sampled({}, slots, devices=jax.devices()[:1]), expected)


@pytest.mark.parametrize("slots", [None, 1, 3])
@pytest.mark.parametrize(
    "axes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"fsdp": 4, "context": 2}], ids=lambda axes: "-".join(axes)
)
def test_eight_devices(axes, slots, expected):
    """To the sampler, `context` is more rows."""
    assert_same(sampled(axes, slots), expected)


SCRIPT = """
import json, pathlib, sys
import jax
address, process, here, folder, devices, *cases = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", int(devices))
if address:
    from jaxrl_llm.training.run import distributed
    distributed.initialize(address, 2, int(process))
sys.path.insert(0, here)
from same_tokens import sampled
found = [sampled(*json.loads(case)) for case in cases]
pathlib.Path(folder, process).write_text(json.dumps(found))
"""
HERE = str(Path(__file__).parent)


def assert_all_same(file: Path, count: int, expected: Found) -> None:
    found = json.loads(file.read_text())
    assert len(found) == count
    for ours in found:
        assert_same(ours, expected)


def test_two_processes(two_processes, expected, tmp_path: Path):
    """Each has two of four devices, and all tokens."""
    axes = {"data": 2, "fsdp": 2}
    cases = [(axes, None), (axes, 1), (axes, 3), ({"fsdp": 2, "tensor": 2}, 3), (axes, 3, 2)]
    done = two_processes(SCRIPT, HERE, str(tmp_path), "2", *map(json.dumps, cases), timeout=400)
    for number, process in enumerate(done):
        assert process.returncode == 0, process.stderr
        assert_all_same(tmp_path / str(number), len(cases), expected)


@pytest.mark.parametrize(
    ("axes", "tensor"),
    [
        ({"fsdp": 6, "context": 2}, None),
        ({"fsdp": 4, "tensor": 3}, None),
        ({"fsdp": 4, "context": 3}, 2),
        ({"fsdp": 6, "context": 2}, 3),
        ({"fsdp": 2, "context": 3, "tensor": 2}, 4),
    ],
    ids=["more rows", "tensor 3", "rows 6 of 4 × 3", "rows 4 of 6 × 2", "rows 3 of 2 × 3 × 2"],
)
def test_twelve_devices(axes, tensor, expected, tmp_path: Path):
    """The sampler's rows may end within an axis of the learner's mesh that they do not divide."""
    cases = [json.dumps((axes, slots, tensor)) for slots in (None, 3)]
    command = [sys.executable, "-c", SCRIPT, "", "0", HERE, str(tmp_path), "12", *cases]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=os.environ | {"PYTHONUTF8": "1"})
    assert done.returncode == 0, done.stderr
    assert_all_same(tmp_path / "0", 2, expected)
