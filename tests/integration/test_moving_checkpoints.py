"""A run moves between meshes and numbers of hosts, and not a bit of its state changes on the way."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

from jaxrl_llm.sharding import MeshConfig, make_mesh

# Meshes of eight devices, of two hosts with four each, and of two devices.
CASES = {
    "dense": (MeshConfig(fsdp=8), MeshConfig(data=2, fsdp=4), MeshConfig(fsdp=2)),
    "experts": (MeshConfig(expert=4, fsdp=2), MeshConfig(data=2, expert=2, fsdp=2), MeshConfig(expert=2, fsdp=1)),
}

SCRIPT = """
import dataclasses, sys
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 4)
from jax.experimental import multihost_utils
from jaxrl_llm.training.run import distributed

address, process, here, folder, case = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
sys.path.insert(0, here)
import test_moving_checkpoints as moving
import tiny_experiment as tiny

distributed.initialize(address, 2, process)
tiny.SIZES |= tiny.MIXTURE if case == "experts" else {}
mesh = moving.make_mesh(moving.CASES[case][1])
found = moving.trained(tiny, folder + "/run", mesh, steps=2)
whole = np.load(folder + "/eight.npz")
for path, leaf in moving.arrays(found.state).items():
    for shard in leaf.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), whole[path][shard.index], strict=True)
gone_on = moving.trained(tiny, folder + "/run", mesh, steps=4)
gathered = {path: multihost_utils.process_allgather(leaf, tiled=True)
            for path, leaf in moving.arrays(gone_on.state).items()}
if process == 0:
    np.savez(folder + "/two_hosts.npz", **gathered)
"""


def arrays(state: Any) -> dict[str, jax.Array]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def trained(tiny: ModuleType, folder: str, mesh: jax.sharding.Mesh, *, steps: int) -> Any:
    """The trainer of the run in a folder, after it has gone on to so many steps."""
    training = dataclasses.replace(tiny.CONFIG.training, steps=steps, checkpoint_every=2)
    lean = dataclasses.replace(tiny.CONFIG.evaluation, every=0)
    config = dataclasses.replace(tiny.CONFIG, run_dir=folder, resume=True, training=training, evaluation=lean)
    trainer = tiny.make(config, mesh)[1]
    trainer.run()
    assert int(trainer.state.step) == steps
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_from_eight_devices_to_two_hosts_and_on_to_two_devices(
    case: str, two_processes, tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_eight, _, of_two = CASES[case]
    monkeypatch.setattr(tiny, "SIZES", tiny.SIZES | (tiny.MIXTURE if case == "experts" else {}))
    two = make_mesh(of_two, jax.devices()[:2])
    eight = trained(tiny, str(tmp_path / "run"), make_mesh(of_eight), steps=2)
    np.savez(tmp_path / "eight.npz", **{path: np.asarray(leaf) for path, leaf in arrays(eight.state).items()})
    cut = {path for path, leaf in arrays(eight.state).items() if not leaf.is_fully_replicated}
    assert any("experts" in path for path in cut) if case == "experts" else cut

    here = trained(tiny, str(tmp_path / "run"), two, steps=2)
    assert tiny.digest(here.state) == tiny.digest(eight.state)

    for process in two_processes(SCRIPT, str(Path(__file__).parent), str(tmp_path), case, timeout=240):
        assert process.returncode == 0, process.stderr
    # Each host wrote what it holds: Orbax leaves a folder of each.
    written = {path.name for path in (tmp_path / "run/checkpoints/4/state").iterdir()}
    assert {"ocdbt.process_0", "ocdbt.process_1"} <= written, written

    back = trained(tiny, str(tmp_path / "run"), two, steps=4)
    expected = np.load(tmp_path / "two_hosts.npz")
    for path, leaf in arrays(back.state).items():
        np.testing.assert_array_equal(np.asarray(leaf), expected[path], strict=True)
