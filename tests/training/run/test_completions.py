"""What a run leaves of its completions: written in the background, whole at each checkpoint, the same after a kill."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxrl_llm.data.tokenizers import CharTokenizer
from jaxrl_llm.training.episodes.completions import RecordedCompletions
from jaxrl_llm.training.episodes.episodes import Episodes
from jaxrl_llm.training.run.completions import CompletionsConfig, CompletionsWriter, read_completions
from jaxrl_llm.training.run.damaged_files import DamagedRunError

FORMATS = ("jsonl", "parquet")


def row(step: int, sample: int, kind: str = "train") -> dict[str, Any]:
    prompt = [{"role": "user", "content": f"é {step}"}]
    extra = {"read": [None, 1.5, "x"][sample % 3]} if sample else {}
    rewards = {"right": None if sample else float(step), "length": 0.5}
    told = {
        "kind": kind,
        "sample": sample,
        "prompt": prompt,
        "completion": "a\né",
        "rewards": rewards,
        "extra": extra,
    }
    return told | ({"token_ids": [1, 2], "token_logprobs": [-0.5, -0.25]} if sample == 0 else {})


def write(folder: Path, first: int, last: int, form: str, resume_step: int | None = None) -> None:
    with CompletionsWriter(folder, CompletionsConfig(format=form), resume_step=resume_step) as writer:
        for step in range(first, last + 1):
            writer.write(step, lambda step=step: [row(step, sample) for sample in range(3)])
            if step % 2 == 0:
                writer.write(step, lambda step=step: [row(step, 0, "eval")])


@pytest.mark.parametrize("form", FORMATS)
def test_a_killed_and_resumed_run_leaves_what_an_uninterrupted_one_does(tmp_path: Path, form: str) -> None:
    write(tmp_path / "whole", 0, 5, form)
    whole = list(read_completions(tmp_path / "whole"))
    expected = [{"step": step} | row(step, sample) for step in range(6) for sample in range(3)]
    assert [one for one in whole if one["kind"] == "train"] == expected
    assert [one["step"] for one in whole if one["kind"] == "eval"] == [0, 2, 4]
    write(tmp_path / "parts", 0, 4, form)  # killed after step 4; the last checkpoint is of step 2
    if form == "jsonl":
        with (tmp_path / "parts" / "completions.jsonl").open("a") as file:
            file.write('{"step": 4, "sam')
    write(tmp_path / "parts", 3, 5, form, resume_step=2)
    assert list(read_completions(tmp_path / "parts")) == whole
    write(tmp_path / "parts", 0, 1, form)  # anew
    assert {one["step"] for one in read_completions(tmp_path / "parts")} == {0, 1}


def test_lines_are_strict_json_that_others_read(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    with CompletionsWriter(tmp_path, CompletionsConfig()) as writer:
        writer.write(7, lambda: [{"reward": math.nan, "rewards": {"a": -math.inf}, "completion": "\udcff\u2028é"}])
    text = (tmp_path / "completions.jsonl").read_bytes().decode()  # UTF-8, in one line
    assert text.startswith('{"step": 7, ') and text.count("\n") == 1
    read = json.loads(text, parse_constant=refuse)
    assert read == {"step": 7, "reward": None, "rewards": {"a": None}, "completion": "\udcff\u2028é"}


def test_parquet_holds_what_utf8_has_not_as_escapes(tmp_path: Path) -> None:
    with CompletionsWriter(tmp_path, CompletionsConfig(format="parquet")) as writer:
        writer.write(1, lambda: [{"completion": "\udcff", "prompt": "\udcff", "token_texts": ["é", "\ud800"]}])
    [read] = read_completions(tmp_path)
    assert read == {"step": 1, "completion": "\\udcff", "prompt": "\udcff", "token_texts": ["é", "\\ud800"]}


def test_it_is_written_behind_the_back_of_the_run_and_whole_when_flushed(tmp_path: Path) -> None:
    may_write = threading.Event()

    def rows() -> Iterator[dict[str, Any]]:
        assert may_write.wait(10)
        yield {"sample": 0}

    with CompletionsWriter(tmp_path, CompletionsConfig()) as writer:
        writer.write(1, rows)
        writer.write(2, rows)
        assert list(read_completions(tmp_path)) == []
        may_write.set()
        writer.flush()
        assert [one["step"] for one in read_completions(tmp_path)] == [1, 2]


@pytest.mark.parametrize("call", ["write", "flush", "close"])
def test_what_goes_wrong_is_raised_by_the_next_call(tmp_path: Path, call: str) -> None:
    def full() -> Iterator[dict[str, Any]]:
        raise OSError(28, "No space left on device")

    writer = CompletionsWriter(tmp_path, CompletionsConfig())
    writer.write(1, full)
    writer._queue.join()
    with pytest.raises(OSError, match=r"\[Errno 28\] No space left on device: '.*/completions.jsonl'"):
        writer.write(2, lambda: []) if call == "write" else getattr(writer, call)()
    writer.close()


def test_what_is_not_written(tmp_path: Path) -> None:
    for config, is_main in ((CompletionsConfig(every=0), True), (CompletionsConfig(), False)):
        with CompletionsWriter(tmp_path / "run", config, is_main_process=is_main) as writer:
            writer.write(1, lambda: [{"sample": 0}])
            writer.flush()
    assert not (tmp_path / "run").exists()
    with pytest.raises(FileNotFoundError, match=r"holds no completions.jsonl: completions.every says when"):
        next(read_completions(tmp_path / "run"))
    config = CompletionsConfig(every=4, rows=10)
    assert [step for step in range(1, 11) if config.is_due(step, 10)] == [4, 8, 10]
    assert [config.groups(*sizes) for sizes in ((8, 4), (1, 4), (8, 64))] == [2, 1, 1]
    assert CompletionsConfig(rows=None).groups(8, 4) == 8
    for wrong in ({"rows": 0}, {"every": -1}, {"tokens": -1}, {"format": "csv"}):
        with pytest.raises(ValueError, match=rf"completions.{next(iter(wrong))}="):
            CompletionsConfig(**wrong)


def test_a_damaged_line_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "completions.jsonl"
    path.write_bytes(b'{"step": 1, "sample": 0}\n{"sample": 1}\n')
    with pytest.raises(DamagedRunError, match=r"completions\.jsonl, line 2: expected a completion, got .*; delete the"):
        CompletionsWriter(tmp_path, CompletionsConfig(), resume_step=5)
    with pytest.raises(DamagedRunError, match="line 2"):
        list(read_completions(tmp_path))
    assert path.read_bytes().count(b"\n") == 2


def test_rows_of_a_step_by_hand() -> None:
    """Of two prompts with three samples each, the last of which is a greedy one, only the first prompt is told."""
    rewards = np.float32([[1, 0.5, 9], [2, 3, 9]])
    episodes = Episodes(
        rewards=rewards,
        by_name={"half": rewards / 2},
        prompts=["ab", "b"],
        completion_ids=[[2, 3, 1], [3, 3], [2], [2], [2], [2]],
        finished=[True, False, True, True, True, True],
        openings=["c", ""],
        extra={"read": ["x", None, "y", "z", "z", "z"]},
        ended=[True, False, True, True, True, True],
        rows=[17, 4],
    ).first(2)

    class Drawn:
        logprobs = -np.arange(24, dtype=np.float32).reshape(2, 3, 4) / 8

    told = RecordedCompletions.of(episodes, CharTokenizer("abc"), kind="train", groups=1, rollout=Drawn(), tokens=1)
    by_token = np.arange(16.0).reshape(2, 2, 4)
    first, second = told.with_observed({"advantages": by_token, "entropy": -by_token}).rows()
    assert first == {
        "kind": "train",
        "row": 17,
        "sample": 0,
        "prompt": "ab",
        "completion": "cab",
        "reward": 1.0,
        "rewards": {"half": 0.5},
        "advantage": 1.0,  # the mean of 0, 1, 2
        "logprob": -3 / 8,
        "tokens": 3,
        "finished": True,
        "extra": {"read": "x"},
        "token_ids": [2, 3, 1],
        "token_texts": ["a", "b", "<eos>"],
        "token_logprobs": [0, -0.125, -0.25],
        "token_advantages": [0, 1, 2],
        "token_entropy": [0, -1, -2],
    }
    assert second["completion"] == "cbb" and not second["finished"] and second["advantage"] == 4.5
    assert second["logprob"] == -9 / 8 and not any(name.startswith("token_") for name in second)
    plain = next(told.with_observed({"advantages": np.float32([[0.25, -0.25]])}).rows())
    assert plain["advantage"] == 0.25 and "token_advantages" not in plain
    assert next(told.rows())["advantage"] is None
