from __future__ import annotations

import json
import math
import resource
import signal
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.training.run import metrics
from jaxrl_llm.training.run.damaged_files import DamagedRunError
from jaxrl_llm.training.run.metrics import (
    MetricsWriter,
    WandbConfig,
    comparable_metrics,
    is_performance,
    read_metrics,
)


def train(folder: Path, first: int, last: int, resume_step: int | None = None) -> None:
    """Steps first..last of a run whose metrics depend on the step alone, but for those of time."""
    with MetricsWriter(folder, resume_step=resume_step, tensorboard=False) as writer:
        for step in range(first, last + 1):
            writer.write(step, {"reward": math.sin(step), "perf/sample_seconds": np.random.rand()})
            if step % 2 == 0:
                writer.write(step, {"eval/accuracy": 1 / (step + 1)})


def test_numbers_come_back_bit_equal(tmp_path: Path) -> None:
    values = {
        "double": 0.1 + 0.2,
        "single": np.float32(0.1),
        "device": jnp.float32(1 / 3),
        "tiny": 5e-324,
        "count": 123456789012345678,
        "int32": np.int32(7),
    }
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(3, values)
    [line] = read_metrics(tmp_path / "metrics.jsonl")
    assert line["step"] == 3
    assert line["double"] == 0.1 + 0.2
    assert np.float32(line["single"]) == np.float32(0.1) and line["single"] == float(np.float32(0.1))
    assert line["device"] == float(np.float32(1 / 3))
    assert line["tiny"] == 5e-324
    assert line["count"] == 123456789012345678 and isinstance(line["int32"], int)


def test_keys_are_sorted_and_the_file_is_strict_json(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"z": math.nan, "b": math.inf, "a": -math.inf, "y": 2.0})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = writer.path.read_text()
    raw = json.loads(text, parse_constant=refuse)
    assert list(raw) == ["a", "b", "step", "y", "z"]
    [line] = read_metrics(writer.path)
    assert (line["a"], line["b"]) == (-math.inf, math.inf) and math.isnan(line["z"])


def test_lines_can_be_read_before_the_file_is_closed(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write(1, {"reward": 1.0})
    assert len(read_metrics(writer.path)) == 1
    writer.close()


def test_killed_and_resumed_file_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    train(tmp_path / "whole", 0, 9)
    train(tmp_path / "parts", 0, 7)  # killed after step 7; the last checkpoint is of step 4
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"reward": 0.9')  # in the middle of a line
    train(tmp_path / "parts", 5, 9, resume_step=4)
    whole, parts = (comparable_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    assert whole == parts
    assert len(whole) == 15
    assert not any("perf/sample_seconds" in line for line in whole)
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["metrics.jsonl"]


def test_without_resume_the_file_starts_anew(tmp_path: Path) -> None:
    train(tmp_path, 0, 3)
    train(tmp_path, 0, 1)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0, 0, 1]


def test_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "reward": 1.0}\n{"reward": 2.0}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)
    with pytest.raises(ValueError, match="line 2"):
        MetricsWriter(tmp_path, resume_step=5)
    assert path.read_text().count("\n") == 2  # nothing was lost


def test_damage_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\x00\n{"step": 2}\n')
    with pytest.raises(DamagedRunError, match=r"metrics\.jsonl, line 2: expected .*; delete the line, or the file"):
        MetricsWriter(tmp_path, resume_step=5)


def test_refused_metrics(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        with pytest.raises(ValueError, match="step"):
            writer.write(1, {"step": 2})
        with pytest.raises(TypeError, match="'reward' is not a number: 'high'"):
            writer.write(1, {"reward": "high"})
    assert read_metrics(writer.path) == []


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "run", is_main_process=False, wandb=WandbConfig("p")) as writer:
        writer.write(1, {"reward": 1.0})
        writer.flush()
    assert not (tmp_path / "run").exists()


def test_performance_names() -> None:
    assert is_performance("step_time") and is_performance("perf/tokens_per_second")
    assert not is_performance("reward") and not is_performance("num_tokens")


def events_in(folder: Path) -> list[Any]:
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

    events: list[Any] = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:  # records: length (8 bytes), checksum (4), bytes, checksum (4)
            length = int.from_bytes(data[:8], "little")
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


def test_tensorboard_events_hold_the_same_numbers(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"reward": 0.25})
        writer.write(2, {"reward": 0.75, "kl": math.nan})
    with MetricsWriter(tmp_path, resume_step=1) as writer:  # within the same second
        writer.write(2, {"reward": 0.5})
    events = events_in(tmp_path)
    scalars = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert scalars == [(1, "reward", 0.25), (2, "reward", 0.75), (2, "reward", 0.5)]
    # From these marks TensorBoard knows to drop what the killed run wrote from step 2 on.
    assert [e.step for e in events if e.HasField("session_log")] == [0, 2]


@pytest.fixture
def full_disk() -> Iterator[Callable[[int], None]]:
    """Lets no file grow beyond so many bytes: a write fails as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("call", ["write", "flush", "close"])
def test_a_disk_that_is_full_for_tensorboard_is_told_at_once(
    tmp_path: Path, full_disk: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def run() -> None:
        for step in range(200):  # formerly without an error, until one waited for ever
            writer.write(step, {f"metric/{number}": 0.5 for number in range(40)})
            if call == "flush":
                writer.flush()

    monkeypatch.setattr(metrics, "_keep_until", lambda path, step: None)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/null")  # on another disk, as it were
    writer = MetricsWriter(tmp_path)
    full_disk(400)
    with pytest.raises(OSError, match=rf"\[Errno \d+\] .*: '{tmp_path}/tensorboard'$"), writer:
        if call == "close":
            writer.write(1, {"reward": 0.5})
            full_disk(50)
        else:
            run()


@pytest.mark.parametrize("tensorboard", [False, True])
def test_a_disk_that_is_full_for_metrics_is_told_with_the_file(
    tmp_path: Path, full_disk: Callable[[int], None], tensorboard: bool
) -> None:
    full_disk(300)
    with (
        pytest.raises(OSError, match=rf"\[Errno \d+\] .*: '{tmp_path}/metrics.jsonl'$"),
        MetricsWriter(tmp_path, tensorboard=tensorboard) as writer,
    ):
        for step in range(10):
            writer.write(step, {"reward": 0.5, "kl": 0.25})


class FakeRun:
    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.finished = False

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, line: dict[str, Any]) -> None:
        self.lines.append(line)

    def finish(self) -> None:
        self.finished = True


def test_wandb_gets_the_same_lines_and_a_resumed_run_is_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    run = FakeRun()

    def init(**settings: Any) -> FakeRun:
        calls.append(settings)
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for resume_step in (None, 1):
        with MetricsWriter(
            tmp_path / "my-run",
            resume_step=resume_step,
            tensorboard=False,
            wandb=WandbConfig("project", offline=True),
            run_config={"seed": 0},
        ) as writer:
            writer.write(1, {"reward": 0.5})
    assert run.lines == [{"reward": 0.5, "step": 1}] * 2 and run.finished
    assert calls[0] == calls[1]
    assert calls[0]["name"] == "my-run" and calls[0]["mode"] == "offline" and calls[0]["config"] == {"seed": 0}


def test_completions_are_a_table_and_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun()
    fake = types.SimpleNamespace(init=lambda **settings: run, Table=lambda **table: table)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    message = [{"role": "user", "content": "Hi"}]
    row = {"kind": "train", "prompt": "2+2=", "completion": "4\n# <b>", "reward": 1.0, "advantage": 0.5}
    row |= {"rewards": {"right": 1.0}, "extra": {"read": [4]}, "token_ids": [1]}
    other = row | {
        "prompt": message,
        "completion": "\ud800",
        "advantage": None,
        "rewards": {"right": None},
        "extra": {},
    }
    with MetricsWriter(tmp_path, wandb=WandbConfig("p")) as writer:
        writer.show(3, [row, other])
        writer.show(4, [other | {"kind": "eval"}])
        writer.show(5, [])
    columns = ["prompt", "completion", "reward", "advantage", "rewards/right", "read"]
    data = [["2+2=", "4\n# <b>", 1.0, 0.5, 1.0, "[4]"], [json.dumps(message), "\ud800", 1.0, None, None, None]]
    assert run.lines[0] == {"completions": {"columns": columns, "data": data}, "step": 3}
    assert [sorted(line) for line in run.lines[1:]] == [["eval/completions", "step"]]
    texts = [(e.step, v.tag, v.tensor.string_val[0].decode()) for e in events_in(tmp_path) for v in e.summary.value]
    assert [(step, tag) for step, tag, _ in texts] == [
        (3, "completions/text_summary"),
        (4, "eval/completions/text_summary"),
    ]
    # Indented lines are code: nothing in them is read as a heading, or as HTML.
    first = "**reward 1, advantage 0.5**\n\n    2+2=\n\n    4\n    # <b>"
    assert texts[0][2] == first + "\n\n**reward 1**\n\n    Hi\n\n    \\ud800"


def test_missing_wandb_names_the_extra_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"jaxrl-llm\[wandb\]"):
        MetricsWriter(tmp_path, wandb=WandbConfig("project"))
    assert list(tmp_path.iterdir()) == []
