from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxrl_llm.training.compilation import CompilationCounter
from jaxrl_llm.training.run import distributed


def test_one_process_communicates_and_compiles_nothing() -> None:
    with CompilationCounter() as counter:
        assert distributed.is_main_process()
        assert distributed.any_process(True) is True
        assert distributed.any_process(False) is False
        value = {"name": object()}  # not even JSON is made of it
        assert distributed.from_main_process(value) is value
    assert counter.counts == {}


ATTEMPTS = """
import os
from jaxrl_llm.training.run.distributed import initialize

def attempt(*args):
    try:
        initialize(*args)
    except ValueError as error:
        print(error)

attempt("localhost:1234")
attempt("localhost", 2, 0)
attempt("localhost:1234", 2, 2)
os.environ["JAX_COORDINATOR_ADDRESS"] = "localhost:1234"  # which JAX reads, too
attempt(None, 2)
"""


def test_addresses_that_do_not_work_say_what_to_do() -> None:
    # In a process of its own: JAX refuses to join others once it has computed something.
    done = subprocess.run([sys.executable, "-c", ATTEMPTS], capture_output=True, text=True, timeout=120)
    half, no_port, outside, from_environment = done.stdout.splitlines()
    assert half.endswith(": --cluster.num-processes, --cluster.process-id")
    assert no_port == "the coordinator's address 'localhost' must be host:port"
    assert "process_id=2, num_processes=2" in outside
    assert from_environment.endswith(": --cluster.process-id")


def test_no_cluster_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_cluster(*args: object, **kwargs: object) -> None:
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", no_cluster)
    with pytest.raises(ValueError, match=r"no cluster to join here \(coord.* leave --distributed out"):
        distributed.initialize()


def test_processes_that_do_not_come_together_are_no_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_answer(*args: object, **kwargs: object) -> None:
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")

    monkeypatch.setattr(jax.distributed, "initialize", no_answer)
    monkeypatch.setattr(distributed, "gather", lambda *args: None)
    with pytest.raises(ConnectionError, match=r"process 1 of 2 could not join .* at host:1234: DEADLINE_EXCEEDED"):
        distributed.initialize("host:1234", 2, 1)


def test_who_does_not_come_is_named_before_jax_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: started.append(args))
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", "127.0.0.1:0")  # any port: nobody is to call
    with pytest.raises(ConnectionError, match=r"process 0 of 2 waited in vain .* for process 1 to join at host:1234"):
        distributed.initialize("host:1234", 2, 0, join_within=0)
    assert not started


def test_errors_that_no_other_process_caused_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for there, text in ((False, "Connection closed by peer"), (True, "INVALID_ARGUMENT: shapes")):
        lookout = SimpleNamespace(someone_is_lost=asked.append) if there else None
        monkeypatch.setattr(distributed, "_lookout", lookout)
        with pytest.raises(jax.errors.JaxRuntimeError, match=text), distributed.ending_with_the_others():
            raise jax.errors.JaxRuntimeError(text)
    assert not asked


def test_errors_that_another_process_may_have_caused_ask_the_lookout(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(distributed, "_lookout", SimpleNamespace(someone_is_lost=asked.append))
    for error in (jax.errors.JaxRuntimeError("Connection closed by peer"), ValueError("Gloo AllGather failed: reset")):
        with pytest.raises(type(error)), distributed.ending_with_the_others():
            raise error
    with pytest.raises(ValueError), distributed.ending_with_the_others():
        raise ValueError("data names a peer")
    assert asked == ["Connection closed by peer", "Gloo AllGather failed: reset"]


TWO_PROCESSES = """
import json, re, signal, sys
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 2)
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxrl_llm.training.run import distributed
import orbax.checkpoint as ocp
from jaxrl_llm.training.run.checkpoint import Checkpointer
from jaxrl_llm.training.run.damaged_files import DamagedRunError
from jaxrl_llm.training.run.metrics import MetricsWriter

address, process, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
distributed.initialize(address, 2, process)
mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
rows = NamedSharding(mesh, PartitionSpec("fsdp"))
caught = re.search(r"SigCgt:\\s*(\\w+)", Path("/proc/self/status").read_text())[1]
out = {"main": distributed.is_main_process(), "SIGTERM ends it": not int(caught, 16) >> (signal.SIGTERM - 1) & 1}

x = jax.make_array_from_process_local_data(rows, np.arange(4.0) + 4 * process)
out["sum"] = float(jax.jit(lambda x: x.sum())(x))  # needs both halves

out["stop"] = [distributed.any_process(flag) for flag in (False, process == 1, True)]
out["name"] = distributed.from_main_process(f"run {process} ∑")
out["none"] = distributed.from_main_process(None if process == 0 else {"a": 1})

state = {"w": x}
with Checkpointer(folder / "checkpoints", keep=1) as checkpointer:
    for step in (1, 2):
        checkpointer.save(step, state, {"process": process, "step": step})
    restored, extra = checkpointer.restore(state)
    out["extra"] = extra
    out["restored"] = [np.asarray(s.data).tolist() for s in restored["w"].addressable_shards]
    out["steps"] = checkpointer.all_steps()
    if process == 1:
        def unreadable(*args, **kwargs):
            raise ValueError("DATA_LOSS")
        ocp.StandardCheckpointHandler.restore = unreadable
    try:
        checkpointer.restore(state)
    except DamagedRunError as error:
        out["damaged"] = "DATA_LOSS" in str(error) if process == 1 else "see another process" in str(error)
with MetricsWriter(folder, tensorboard=False, is_main_process=distributed.is_main_process()) as writer:
    writer.write(1, {"reward": 1.0})
print(json.dumps(out))
"""


def test_two_processes_agree(two_processes, tmp_path: Path) -> None:
    processes = two_processes(TWO_PROCESSES, str(tmp_path), timeout=120)
    for process in processes:
        assert process.returncode == 0, process.stderr
    first, second = (json.loads(process.stdout.splitlines()[-1]) for process in processes)
    assert (first.pop("main"), second.pop("main")) == (True, False)
    assert first.pop("restored") == [[0.0, 1.0], [2.0, 3.0]]
    assert second.pop("restored") == [[4.0, 5.0], [6.0, 7.0]]
    assert first == second
    assert first == {
        "SIGTERM ends it": True,
        "sum": 28.0,
        "stop": [False, True, True],
        "name": "run 0 ∑",
        "none": None,
        "extra": {"process": 0, "step": 2},
        "steps": [2],
        "damaged": True,
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "metrics.jsonl"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    # One process restores what two have written.
    from jaxrl_llm.training.run.checkpoint import Checkpointer

    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        abstract = {"w": jax.ShapeDtypeStruct((8,), np.float32, sharding=sharding)}
        restored, _ = checkpointer.restore(abstract)
    np.testing.assert_array_equal(restored["w"], np.arange(8, dtype=np.float32))


LATE = """
import sys, time
from jaxrl_llm.training.run import distributed, lookout

address, process = sys.argv[1], int(sys.argv[2])
lookout._BEAT, lookout._FIRST_WORD = 0.4, 2.0
distributed.initialize(address, 2, process, 10)
distributed.how_to_resume("--resume --run-dir=here")
with distributed.at("reward of step 3"):
    if process == 1:
        time.sleep(8)
        raise RuntimeError("only here")
distributed.any_process(False)
"""


def test_who_keeps_the_others_waiting_is_named_and_who_has_ended_ends_them(two_processes) -> None:
    first, second = two_processes(LATE, timeout=120)
    assert first.returncode == 1 and "RuntimeError: only here" in second.stderr
    said = [line for line in first.stderr.splitlines() if "process 0 of 2" in line]
    where = "in 'a common decision'"
    late = r"process 1 has not arrived, it has been in 'reward of step 3' for \d s"
    assert re.match(rf"process 0 of 2: waiting for [23] s {where}: {late}", said[0]), said
    assert said[-1] == (
        f"error: process 0 of 2 waits {where} for process 1, which has ended, after 'reward of step 3'; its own output "
        "says why. Go on with the same command and --resume --run-dir=here in all of them, from the latest checkpoint"
    )
