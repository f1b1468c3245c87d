"""The benchmark runs, counts what it says it counts, and compares with a peer."""

from __future__ import annotations

import functools
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from jaxrl_llm.config import ModelSource
from jaxrl_llm.models.config import ModelConfig

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """Imports a file of the folder, which is on the path for its own scripts alone."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.fixture
def grpo(script, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = script("grpo")
    quick = functools.partial(script("device").matmul_peak, seconds=0.0, repeats=1)  # the smallest size only
    monkeypatch.setattr(module, "matmul_peak", quick)
    return module


def small(script, *, lengths: str = "full", **changes):
    shape = script("measure").Shape(prompts=2, prompt_tokens=6, samples=4, completion_tokens=5, lengths=lengths)
    return script("works").Benchmark(repeats=2, shape=shape, **changes)


def check_record(record: dict, *, work: str, tokens: int) -> None:
    assert json.loads(json.dumps(record)) == record
    assert record["work"] == work
    assert record["seconds"]["n"] == 2
    assert 0 < record["seconds"]["min"] <= record["seconds"]["median"] <= record["seconds"]["max"]
    assert record["tokens_per_second"] == pytest.approx(tokens / record["seconds"]["median"], rel=1e-2)
    assert record["compilations"]["after_first"] == {}
    assert 0 < record["ready_s"] <= record["start_up_s"]
    assert record["peak_rss_gib"] > 0.05
    for dtype, peak in record["matmul_peak"].items():
        assert peak["gflops"] > 0
        for name, rate in record["gflops_per_second"].items():
            assert rate == pytest.approx(1e-9 * record["flops"][name] / record["seconds"]["median"], rel=0.05, abs=0.01)
            assert record["fraction_of_peak"][dtype][name] == pytest.approx(rate / peak["gflops"], rel=0.05, abs=1e-3)


def programs(record: dict, name: str) -> int:
    """How many programs with this in their names were compiled."""
    return sum(count for program, count in record["compilations"]["names"].items() if name in program)


def test_sampling(grpo, script):
    record = grpo.measure(small(script), "W1")
    check_record(record, work="W1", tokens=2 * 4 * 5)
    assert programs(record, "sample") == 1
    assert programs(record, "update_step") == 0


@pytest.mark.slow
def test_update_in_bfloat16(grpo, script):
    record = grpo.measure(small(script, model=ModelSource(dtype="bfloat16", remat="full")), "W2")
    check_record(record, work="W2", tokens=2 * 4 * 5)
    assert (record["dtype"], record["param_dtype"], record["remat"]) == ("bfloat16", "float32", "full")
    assert set(record["matmul_peak"]) == {"float32", "bfloat16"}
    assert programs(record, "update_step") == 1
    assert programs(record, "sample") == 0
    assert record["temporaries_gib"]["update_step"] > 0


def test_update_of_packed_rows_of_lognormal_lengths(grpo, script):
    config = small(script, lengths="lognormal", work=("W2",), tokens_per_micro_batch=32)
    lengths = config.shape.completion_lengths
    assert 1 <= min(map(min, lengths)) < max(map(max, lengths)) <= 5
    record = grpo.measure(config, "W2")
    check_record(record, work="W2", tokens=sum(map(sum, lengths)))
    assert record["cpu_seconds"]["n"] == 2
    # Each of the eight devices has a row, a prompt and a completion in it.
    assert record["devices"].startswith("8 ×")
    assert record["useful_tokens"] * 8 * 32 == pytest.approx(8 * 6 + sum(map(sum, lengths)), abs=0.1)
    assert "useful" in grpo.describe(record)


def test_lognormal_lengths(script):
    """Always the same, a quarter of the longest on average, and none beyond it."""
    shape = functools.partial(script("measure").Shape, prompts=64, completion_tokens=1024, lengths="lognormal")
    lengths = [length for row in shape().completion_lengths for length in row]
    assert len(lengths) == 64 * 8
    assert 1 <= min(lengths) < 64
    assert max(lengths) == 1024
    assert sum(lengths) / len(lengths) == pytest.approx(256, rel=0.1)
    assert shape().completion_lengths == shape().completion_lengths


def test_sampling_of_lognormal_lengths_in_slots(grpo, script):
    config = small(script, lengths="lognormal", work=("W1",), slots=2, room=9)
    record = grpo.measure(config, "W1")
    check_record(record, work="W1", tokens=sum(map(sum, config.shape.completion_lengths)))


def test_room_that_completions_do_not_fit_into_is_refused(script):
    with pytest.raises(ValueError, match=r"room=4 must be at least shape\.completion_tokens=5"):
        small(script, room=4)


@pytest.mark.slow
def test_iteration_on_a_checkpoint_with_a_reference(grpo, script, tmp_path):
    script("make_model").make(str(tmp_path / "tiny"), size="tiny")
    source = ModelSource(path=str(tmp_path / "tiny"), remat="none")
    record = grpo.measure(small(script, model=source, kl_coef=0.04, cache_dtype="int8"), "W3")
    check_record(record, work="W3", tokens=2 * 4 * 5)
    assert record["parameters"] == 1_049_728
    assert record["flops"]["convention"] == 10 * 1_049_728 * 2 * 4 * (6 + 5)  # 2 sampled, 6 trained, 2 reference
    assert programs(record, "sample") == programs(record, "update_step") == 1
    assert set(record["phases"]) == {"sample", "reward", "update"}
    assert sum(record["phases"].values()) <= record["seconds"]["max"]
    assert 1e-5 < record["logp_gap"]["mean"] < record["logp_gap"]["max"] < 0.1
    table = grpo.describe(record)
    assert "nats apart" in table
    assert "W3: one GRPO iteration" in table
    assert "after the first run none" in table


def test_flops_of_a_model_that_fits_on_paper(script):
    config = ModelConfig(
        vocab_size=5, embed_dim=2, mlp_dim=3, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2, tie_embeddings=True
    )
    shape = script("measure").Shape(prompts=1, prompt_tokens=2, samples=2, completion_tokens=2)
    count = functools.partial(script("device").computed_flops, config=config, shape=shape)
    # A token's products in the layer: 2·2·(2 + 2 + 2 + 2 + 3·3) = 68. A query with one key: 2·(2 + 2) = 8. A
    # distribution: 2·2·5 = 20. Sampling feeds the prompt's 2 tokens and 1 of each completion, which see 1 + 2 and
    # 3 keys, and draws from the prompt's distribution and 2 more.
    sampling = (2 + 2) * 68 + (3 + 2 * 3) * 8 + (1 + 2) * 20
    # Learning feeds 2 of each completion, which see 3 and 4 keys, and scores 4 tokens.
    learning = (2 + 4) * 68 + (3 + 2 * 7) * 8 + 4 * 20
    assert count("W1", reference=False) == sampling
    assert count("W2", reference=False) == 3 * learning
    assert count("W2", reference=True) == 4 * learning
    assert count("W3", reference=False) == sampling + 3 * learning

    conventional = functools.partial(script("measure").conventional_flops, parameters=100, shape=shape)
    assert conventional("W1", reference=False) == 2 * 100 * 8
    assert conventional("W2", reference=True) == (6 + 2) * 100 * 8
    assert conventional("W3", reference=False) == (2 + 6) * 100 * 8


def test_ratios_are_taken_pair_by_pair(grpo, script, monkeypatch, tmp_path, capsys):
    def record(system: str, seconds: float, start_up: float) -> dict:
        return {
            "system": system,
            "seconds": {"median": seconds, "min": seconds, "max": seconds, "n": 1},
            "start_up_s": start_up,
        }

    ours, theirs = iter([1.0, 2.0, 1.0]), iter([3.0, 8.0, 2.0])
    monkeypatch.setattr(grpo, "measure_afresh", lambda config, work: record("jaxrl_llm", next(ours), 4.0))
    monkeypatch.setattr(grpo, "run_and_read", lambda command: record(command, next(theirs), 6.0))
    monkeypatch.setattr(grpo, "describe", lambda record: "")
    found = grpo.compare(small(script, json=str(tmp_path / "out.jsonl"), pairs=3), "W3", "peer {work}")
    assert found["ratios"] == [3.0, 4.0, 2.0]
    assert found["ratio"]["median"] == 3.0
    assert found["start_up_ratios"] == [1.5] * 3
    assert found["peer"] == "peer W3"
    lines = [json.loads(line)["system"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert lines == ["jaxrl_llm", "peer W3"] * 3
    assert "peer W3 / ours: 4.00" in capsys.readouterr().out


def test_script_beside_a_peer(tmp_path):
    """A real run, in processes of its own."""
    peer = tmp_path / "peer.py"
    peer.write_text(
        """import sys; print('RESULT {"system": "peer", "seconds": {"median": 1e6, "min": 1, "max": 1e6, "n": 1}}')"""
    )
    command = [sys.executable, str(FOLDER / "grpo.py"), "--work", "W1", "--repeats", "1", "--pairs", "1"]
    command += ["--shape.prompts", "1", "--shape.samples", "2", "--shape.completion-tokens", "3"]
    command += ["--beside", f"{sys.executable} {peer} {{work}}", "--json", str(tmp_path / "out.jsonl")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    ours, theirs, comparison = (json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines())
    assert ours["system"] == "jaxrl_llm"
    assert theirs["system"] == "peer"
    assert comparison["ratios"][0] == pytest.approx(1e6 / ours["seconds"]["median"], rel=1e-3)
    assert "W1: peer takes" in ran.stdout


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise SystemExit('no such model')", "status 1.*\n.*no such model"),
        ("print('nothing')", "printed 0 RESULT lines"),
        ("print('RESULT {\"seconds\": {}}')", "no seconds.median"),
    ],
)
def test_a_peer_that_fails_is_named(script, tmp_path, code, message):
    (tmp_path / "peer.py").write_text(code)
    with pytest.raises(ValueError, match=message):
        script("measure").run_and_read(f"{sys.executable} {tmp_path / 'peer.py'}")


def test_a_peer_must_be_told_its_work(script):
    with pytest.raises(ValueError, match=r"must contain \{work\}"):
        small(script, beside="peer --work W1")
