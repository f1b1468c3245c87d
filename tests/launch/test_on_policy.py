from __future__ import annotations

import atexit
import dataclasses
import errno
import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import pytest
from safetensors import SafetensorError

from jaxrl_llm import cli
from jaxrl_llm.algorithms.policy_gradient import presets
from jaxrl_llm.algorithms.policy_gradient.surrogates import Clipped
from jaxrl_llm.algorithms.preference.objective import PreferenceObjective
from jaxrl_llm.algorithms.preference.online import OnlinePreference
from jaxrl_llm.algorithms.preference.pair_losses import DPO
from jaxrl_llm.config import DataConfig, Experiment, ModelSource
from jaxrl_llm.data.formats import PromptFormat
from jaxrl_llm.launch import folder, loading, on_policy, summary
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import make_mesh
from jaxrl_llm.training.episodes.evaluate import EvaluationConfig
from jaxrl_llm.training.on_policy import TrainingConfig, TrainingResult
from jaxrl_llm.training.run.metrics import read_metrics


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def right(prompts: list[Any], completions: list[Any], answer: list[str]) -> list[float]:
    return [float(len(str(completion)) % 3) for completion in completions]


def write(name: str, *rows: dict[str, Any] | str) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    Path(name).write_text("".join(f"{line}\n" for line in lines))
    return name


ROW = {"question": "1+1?", "answer": "2"}


@pytest.fixture(scope="module")
def checkpoint(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def config(checkpoint: Path) -> Experiment:
    return Experiment(
        name="test",
        rewards=(right,),
        model=ModelSource(path=str(checkpoint), remat="none"),
        data=DataConfig(max_prompt_length=48, format=PromptFormat(prompt_column="question")),
        sampling=SamplingConfig(max_tokens=4),
        training=TrainingConfig(steps=2, prompts_per_step=8, samples_per_prompt=2, checkpoint_every=0),
    )


# ---- The command line ---------------------------------------------------------------------------------


def test_an_unknown_flag_ends_at_once_and_names_the_nearest(
    tiny: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tiny, "start", lambda config: pytest.fail("went on"))
    with pytest.raises(SystemExit) as ended:
        tiny.main(["--algorithm.surrogate.clp-high=0.3"])
    assert ended.value.code == 2
    text = capsys.readouterr().err
    assert text == (
        "error: there is no setting --algorithm.surrogate.clp-high; did you mean --algorithm.surrogate.clip-high?\n"
    )
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [
        ("--algorithm.clp-high=0.3", "--algorithm.surrogate.clip-high"),
        ("--clip_high=0.3", "--algorithm.surrogate.clip-high"),
        ("--critic.lerning-rate=1", "--critic.optimizer.learning-rate"),
    ],
)
def test_a_misplaced_flag_names_where_it_belongs(
    tiny: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flag: str, nearest: str
) -> None:
    monkeypatch.setattr(tiny, "start", lambda config: pytest.fail("went on"))
    with pytest.raises(SystemExit) as ended:
        tiny.main([flag])
    assert ended.value.code == 2
    given = flag.partition("=")[0].replace("_", "-")
    assert capsys.readouterr().err == f"error: there is no setting {given}; did you mean {nearest}?\n"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--training.steps=0", "training.steps=0 must be at least 1"),
        ("--algorithm.surrogate.clip-high=much", "--algorithm.surrogate.clip-high"),
        ("--algorithm.surrogate.dual-clip=0.5", "algorithm.surrogate.dual_clip=0.5 must be None, or above 1"),
        ("--optimizer.schedule=step", "--optimizer.schedule"),
    ],
)
def test_an_impossible_value_is_refused_with_its_flag(
    config: Experiment, capsys: pytest.CaptureFixture[str], flag: str, message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.parse(config, [flag])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_flags_change_what_they_name(config: Experiment) -> None:
    args = "--algorithm.surrogate.clip-high=0.28 --mesh.fsdp=-1 --reward-weights 0.5 --wandb.project=p"
    args += " --data.format.system=s --algorithm.surrogate.clip-low=None --resume"
    args += " --model.dtype=bfloat16 --evaluation.every=1 --evaluation.max-prompts=7"
    parsed = cli.parse(config, args.split())
    assert parsed.algorithm.surrogate == Clipped(clip_low=None, clip_high=0.28)
    assert (parsed.reward_weights, parsed.wandb.project, parsed.resume) == ((0.5,), "p", True)
    assert (parsed.data.format.system, parsed.data.format.prompt_column) == ("s", "question")
    assert (parsed.model.dtype, parsed.model.path) == ("bfloat16", config.model.path)
    assert parsed.rewards == config.rewards
    assert cli.parse(config, []) == config


def test_flags_of_the_model_reach_it(config: Experiment) -> None:
    flags = ["--model.dtype=bfloat16", "--model.remat=dots", "--model.no-scan-layers"]
    model = cli.load_policy(cli.parse(config, flags), make_mesh()).model.config
    assert (model.dtype, model.param_dtype, model.remat, model.scan_layers) == ("bfloat16", "float32", "dots", False)
    assert not cli.load_policy(config, make_mesh()).model.config.scan_layers  # of few small layers, on a CPU
    looped = cli.load_policy(cli.parse(config, ["--model.scan-layers"]), make_mesh())
    assert looped.model.config.scan_layers


# ---- The folder of a run ------------------------------------------------------------------------------


def test_runs_that_start_in_the_same_second_have_folders_of_their_own(
    config: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "strftime", lambda form: "20260101-120000")
    folders = [cli.start(config).run_dir for _ in range(3)]
    assert folders == [f"runs/test-20260101-120000{suffix}" for suffix in ("", "-2", "-3")]
    assert not any(list(Path(folder or "").iterdir()) for folder in folders)


def test_a_folder_that_is_taken_stays_as_it_is(config: Experiment, capsys: pytest.CaptureFixture[str]) -> None:
    config = dataclasses.replace(config, run_dir="taken")
    Path("taken").mkdir()
    write("taken/config.json", {"seed": 0})
    before = Path("taken/config.json").read_bytes()
    write("taken/metrics.jsonl", {"step": 1})
    with pytest.raises(SystemExit) as ended:
        cli.start(dataclasses.replace(config, seed=1))
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: taken holds a run (no checkpoint): go on with --resume, or choose another --run-dir\n"
    )
    assert Path("taken/config.json").read_bytes() == before


def test_resuming_needs_to_know_what(config: Experiment, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.start(dataclasses.replace(config, resume=True))
    assert capsys.readouterr().err == "error: --resume needs --run-dir=<folder of the run>\n"
    assert not Path("runs").exists()


def test_a_folder_that_cannot_be_made(config: Experiment, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.start(dataclasses.replace(config, run_dir="x" * 300))  # longer than file systems allow
    assert ended.value.code == 1
    assert re.fullmatch(r"error: \[Errno \d+\] File name too long: 'x+'\n", capsys.readouterr().err)


def test_a_run_that_never_began_leaves_no_folder(
    config: Experiment, monkeypatch: pytest.MonkeyPatch, tiny: ModuleType
) -> None:
    at_exit: list[Callable[[], None]] = []
    monkeypatch.setattr(atexit, "register", lambda call, *args: at_exit.append(lambda: call(*args)))
    train = f"--data.train={write('train.jsonl', ROW)}"
    wrong = (["--model.path=./nowhere"], ["--data.train=nowhere.jsonl"], ["--sampling.max-tokens=9999", train])
    for flags in (*wrong, ["--model.path=./nowhere", "--run-dir=mine"]):
        with pytest.raises(SystemExit):
            cli.run(config, flags)
        assert [path for path in Path().rglob("*") if path.is_file()] == [Path("train.jsonl")], flags
    for call in reversed(at_exit):
        call()
    assert set(Path().rglob("*")) == {Path("train.jsonl")}
    at_exit.clear()
    Path("own").mkdir()
    cli.start(dataclasses.replace(config, run_dir="own"))  # it was there before
    used = Path(cli.start(config).run_dir or "", "file")
    used.touch()
    for call in at_exit:
        call()
    assert set(Path().rglob("*")) == {Path("runs"), used.parent, used, Path("own"), Path("train.jsonl")}


def test_a_full_disk_and_ctrl_c_end_with_one_line(
    config: Experiment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever they come: before the model, in training, at the export."""
    full = OSError(errno.ENOSPC, "No space left on device", "somewhere")
    model: Any = SimpleNamespace(abstract_params=dict)
    result = TrainingResult(params={}, step=1, first_evaluation={}, last_evaluation={}, stopped=None)
    parts = {
        (folder, "find_run"): lambda: cli.start(config),
        (on_policy, "make_mesh"): lambda: cli.run(config, []),
        (summary, "save_pretrained"): lambda: cli.finish(config, cli.Policy(model, {}, None, ()), result, seconds=1.0),
    }

    def fails(error: BaseException) -> Any:
        def fail(*_: Any, **__: Any) -> None:
            raise error

        return fail

    def check(call: Callable[[], Any], code: int, line: str) -> None:
        with pytest.raises(SystemExit) as ended:
            call()
        assert (ended.value.code, capsys.readouterr().err) == (code, line)

    trainer: Any = SimpleNamespace(run=fails(full))
    check(lambda: cli.train(trainer), 1, "error: [Errno 28] No space left on device: 'somewhere'\n")
    trainer.run = fails(KeyboardInterrupt())
    check(lambda: cli.train(trainer), 130, "interrupted\n")
    for (module, name), call in parts.items():
        monkeypatch.setattr(module, name, fails(full))
        check(call, 1, "error: [Errno 28] No space left on device: 'somewhere'\n")
        monkeypatch.setattr(module, name, fails(KeyboardInterrupt()))
        check(call, 130, "interrupted\n")
        monkeypatch.undo()
    monkeypatch.setattr(summary, "save_pretrained", fails(SafetensorError("I/O error: No space left on device")))
    check(parts[summary, "save_pretrained"], 1, "error: I/O error: No space left on device\n")


# ---- Several processes --------------------------------------------------------------------------------


def test_the_address_of_the_others_is_given_by_flags(
    config: Experiment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    joined: list[Any] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **silence: joined.append((*args, silence)))
    flags = ["--cluster.coordinator-address=host:1234", "--cluster.num-processes=1", "--cluster.process-id=0"]
    cli.start(cli.parse(config, ["--distributed", *flags, "--cluster.lost-after=60"]))
    cli.start(cli.parse(config, ["--distributed"]))
    assert [given[:3] for given in joined] == [("host:1234", 1, 0), (None, None, None)]
    assert [given[3]["heartbeat_timeout_seconds"] for given in joined] == [60, 30]
    with pytest.raises(SystemExit) as ended:
        cli.start(cli.parse(config, flags))
    assert ended.value.code == 2
    assert "add --distributed" in capsys.readouterr().err
    assert len(joined) == 2


# ---- Errors before the model is loaded ----------------------------------------------------------------


@pytest.fixture
def refused(config: Experiment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs with these flags; the one line that it ends with. No model may be loaded before."""
    monkeypatch.setattr(loading, "load_params", lambda *_, **__: pytest.fail("the model was loaded"))

    def refused(*args: str, **changes: Any) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.run(dataclasses.replace(config, **changes), list(args))
        assert ended.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ") and err.count("\n") == 1, err
        return err.removeprefix("error: ").rstrip("\n")

    return refused


def test_what_no_memory_holds_is_refused(config: Experiment, monkeypatch: pytest.MonkeyPatch, refused) -> None:
    train = f"--data.train={write('train.jsonl', ROW)}"
    assert "a step's tokens" in refused(train, "--training.samples-per-prompt=2000000000")
    monkeypatch.setattr("jaxrl_llm.device_memory.host_memory", lambda: 10**4)
    assert refused(train).endswith("or take a smaller model")


@pytest.mark.parametrize(
    ("change", "remark"), [({}, None), ({"stop_tokens": ()}, "No token ends a completion: each has")]
)
def test_a_model_that_never_ends_is_told(config: Experiment, change: dict[str, Any], remark: str | None) -> None:
    config = dataclasses.replace(config, run_dir="run")
    policy = dataclasses.replace(cli.load_policy(config, make_mesh()), **change)
    trainer = cli.make_trainer(config, policy, make_mesh(), train_rows=[ROW] * 8)
    assert ("No token ends" in trainer.what_a_step_is) == (remark is not None) and (
        remark or ""
    ) in trainer.what_a_step_is


def test_a_reward_function_that_never_returns_ends_the_run(
    config: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    def endless(completions: list[Any], **columns: Any) -> list[float]:
        time.sleep(60)
        return [0.0 for _ in completions]

    train = f"--data.train={write('train.jsonl', *[ROW] * 8)}"
    with pytest.raises(SystemExit) as ended:
        cli.run(dataclasses.replace(config, rewards=(endless,)), [train, "--reward-timeout=0.2"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert "'endless'" in error and "took longer than 0.2 s" in error


def test_no_model_and_no_such_model(refused) -> None:
    assert refused("--model.path=None") == "no model given: pass --model.path=<folder, .gguf file or hub id>"
    assert "./nowhere/model" in refused("--model.path=./nowhere/model")


def test_a_model_that_is_not_implemented(refused, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its tokenizer, of which transformers would warn on its own."""
    monkeypatch.setattr(loading, "load_tokenizer", lambda *_: pytest.fail("the tokenizer was loaded"))
    Path("mamba").mkdir()
    write("mamba/config.json", {"model_type": "mamba", "architectures": ["MambaForCausalLM"]})
    write("mamba/tokenizer.json", {})
    assert "mamba" in refused("--model.path=./mamba")


def test_no_data(refused) -> None:
    assert "pass --data.train=" in refused()
    train = f"--data.train={write('train.jsonl', ROW)}"
    assert "evaluation.every=5 needs held-out prompts: pass --data.eval=" in refused(train, "--evaluation.every=5")
    assert refused(train, "--data.eval=eval.jsonl") == (
        "data.eval=eval.jsonl would never be used, since evaluation.every=0: pass --evaluation.every=<steps>, or "
        "--data.eval=None"
    )


def test_a_missing_file_names_those_near_it(refused) -> None:
    write("train.jsonl", ROW)
    message = refused("--data.train=trian.jsonl")
    assert message.startswith("no data file trian.jsonl; files near it: train.jsonl")


def test_an_empty_data_set(refused) -> None:
    assert refused(f"--data.train={write('empty.jsonl')}") == "empty.jsonl has no rows"
    good, empty = write("train.jsonl", ROW), write("empty.jsonl")
    assert refused(f"--data.train={good}", f"--data.eval={empty}", "--evaluation.every=1") == "empty.jsonl has no rows"


def test_data_without_a_name(refused) -> None:
    assert refused("--data.train=hf:").startswith("hf: names no data set; write one after it")


def test_a_line_that_is_no_json(refused) -> None:
    assert refused(f"--data.train={write('train.jsonl', ROW, '{oops')}").startswith("train.jsonl:2: not valid JSON")


def test_a_misspelt_column(refused) -> None:
    train = f"--data.train={write('train.jsonl', ROW, ROW)}"
    assert refused(train, "--data.format.prompt-column=questoin") == (
        "training prompts: row 0: no column 'questoin'; did you mean 'question'? (columns: question, answer); "
        "prompt_column names the column"
    )
    message = refused(train, "--data.format.template={question} {anwser}")
    assert "no column 'anwser'; did you mean 'answer'?" in message


def test_a_column_that_a_reward_needs(refused) -> None:
    train = f"--data.train={write('train.jsonl', ROW)}"
    held_out = f"--data.eval={write('eval.jsonl', {'question': '1+2?', 'solution': '3'})}"
    assert refused(train, held_out, "--evaluation.every=1") == (
        "held-out prompts: the reward function 'right' requires the column(s) ['answer'], which the data set lacks; "
        "its columns are ['solution']"
    )


def test_a_prompt_that_is_too_long(refused) -> None:
    message = refused(f"--data.train={write('train.jsonl', ROW, {**ROW, 'question': 'x' * 50})}")
    assert message.startswith("training prompts: row 1: the prompt has 50 tokens, more than max_prompt_length=48")


def test_lengths_beyond_the_model(refused) -> None:
    message = refused(f"--data.train={write('train.jsonl', ROW)}", "--data.max-prompt-length=513")
    assert message == "data.max_prompt_length=513 is more than the model's 512 positions; lower it"


def test_a_gold_answer_that_no_reward_reads(refused) -> None:
    """Also of held-out rows, before the model is read."""
    good, bad = write("train.jsonl", ROW), write("eval.jsonl", ROW, {**ROW, "answer": "none"})
    right.check_row = lambda *, answer, **columns: None if answer.isdigit() else f"'answer': {answer!r} is no number"
    try:
        message = refused(f"--data.train={good}", f"--data.eval={bad}", "--evaluation.every=1")
    finally:
        del right.check_row
    assert message.startswith(
        "held-out prompts: row 1: the reward function 'right' cannot score it: 'answer': 'none' is"
    )


def test_a_mesh_that_does_not_fit(refused) -> None:
    assert "8 devices" in refused("--mesh.tensor=3")
    assert "sampling.tensor=3 must be a multiple" in refused("--sampling.tensor=3")
    train = f"--data.train={write('train.jsonl', *[ROW] * 8)}"
    for flag in ("--mesh.tensor=8", "--sampling.tensor=8"):
        told, setting = refused(train, flag), flag.removeprefix("--").removesuffix("=8")
        assert "8 devices cannot hold whole heads: it does not divide the 4 query heads" in told
        assert f"set {setting} to one of 1, 2, 4" in told


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--algorithm.keep-sampling-mask"], r"sampling\.top_k=None .* set sampling\.top_k, or leave out algorithm"),
        (["--sampling.stop", "a\ufffd"], "the stop text 'a\ufffd' is empty or holds what stands for no character"),
    ],
)
def test_what_cannot_be_sampled(flags, message, refused) -> None:
    assert re.search(message, refused(*flags, f"--data.train={write('train.jsonl', ROW)}"))


def test_weights_that_do_not_match(refused) -> None:
    message = refused(f"--data.train={write('train.jsonl', ROW)}", "--reward-weights", "1.0", "2.0")
    assert "reward weights must be one finite number a function, got [1.0, 2.0]" in message


# ---- Whole runs ---------------------------------------------------------------------------------------


def test_a_conversational_run_from_a_checkpoint_to_a_checkpoint(config: Experiment, checkpoint: Path) -> None:
    seen: list[tuple[Any, Any]] = []

    def polite(prompts: list[Any], completions: list[Any], answer: list[str]) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return right(prompts, completions, answer)

    train = write("train.jsonl", *({"question": f"{n}+1?", "answer": str(n + 1)} for n in range(8)))
    config = dataclasses.replace(config, rewards=(polite,), evaluation=EvaluationConfig(every=2, max_prompts=3))
    args = [f"--data.train={train}", f"--data.eval={train}", "--data.format.system=Add.", "--run-dir=run"]
    result = cli.run(config, args)
    assert result.step == 2
    prompt, completion = seen[0]
    assert prompt == [{"role": "system", "content": "Add."}, {"role": "user", "content": "0+1?"}]
    assert [message["role"] for message in completion] == ["assistant"]
    assert [line["step"] for line in read_metrics("run/metrics.jsonl")] == [0, 1, 2, 2]
    written = json.loads(Path("run/config.json").read_text())
    assert (written["run_dir"], written["sampling.max_tokens"], written["rewards"]) == ("run", 4, ["polite"])
    # What came out can be trained again, or read by transformers: the same files as those that went in.
    assert {path.name for path in checkpoint.iterdir()} <= {path.name for path in Path("run/model").iterdir()}
    again = dataclasses.replace(config, run_dir="again", model=ModelSource(path="run/model"))
    lean = [args[0], args[2], "--training.steps=1", "--evaluation.every=0", "--model.no-scan-layers"]
    assert cli.run(again, lean).step == 1
    assert read_metrics("again/metrics.jsonl")[0]["num_tokens"] == read_metrics("run/metrics.jsonl")[1]["num_tokens"]


def test_a_reward_that_fails_ends_with_one_line(config: Experiment, capsys: pytest.CaptureFixture[str]) -> None:
    def right(prompts: list[Any], completions: list[Any], answer: list[str]) -> list[float]:
        raise LookupError("no such key")

    config = dataclasses.replace(config, rewards=(right,))
    with pytest.raises(SystemExit) as ended:
        cli.run(config, [f"--data.train={write('train.jsonl', ROW)}"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert re.fullmatch(
        r"error: the reward function 'right' raised LookupError on 16 samples: no such key "
        r"\(.*test_on_policy.py:\d+\)\n",
        error,
    )


def test_weights_and_biases_that_is_not_installed(
    config: Experiment, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit):
        cli.run(config, [f"--data.train={write('train.jsonl', ROW)}", "--wandb.project=p"])
    assert "error: Weights & Biases is not installed: pip install 'jaxrl-llm[wandb]'" in capsys.readouterr().err


def spoil(pattern: str, text: str | None) -> None:
    """Overwrites the files that match, or deletes them."""
    paths = list(Path("run").glob(pattern))
    assert paths
    for path in paths:
        path.unlink() if text is None else path.write_text(text)


def test_a_run_whose_files_are_damaged_goes_on_before_the_damage_or_ends_with_one_line(
    config: Experiment, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    args = [f"--data.train={write('train.jsonl', ROW)}", "--run-dir=run", "--training.checkpoint-every=1"]
    cli.run(config, args)
    shutil.move("run", "whole")
    damaged = "error: none of the checkpoints \\[1, 2\\] in .*/run/checkpoints is whole: delete them all to start anew"
    for pattern, text, message in (
        ("checkpoints/*/extra/metadata", None, rf"{damaged}.*checkpoint 2 .* is damaged \(FileNotFoundError: .*\n"),
        ("checkpoints/*/extra/metadata", "{}", rf"{damaged}.*checkpoint 2 .* is damaged \(its settings.*\n"),
        ("checkpoints/*/state/d/*", "short", rf"{damaged}.*checkpoint 2 .* is damaged \(ValueError: .*\n"),
        (
            "metrics.jsonl",
            '{"step": 1}\noops\n{"step": 2}\n',
            r"error: run/metrics.jsonl, line 2: expected .*, got 'oops'; delete the line, or the file\n",
        ),
    ):
        shutil.copytree("whole", "run")
        spoil(pattern, text)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.run(config, [*args, "--resume"])
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert re.fullmatch(message, error), error
        shutil.rmtree("run")

    shutil.copytree("whole", "run")
    spoil("checkpoints/2/state/d/*", "short")
    cli.run(config, [*args, "--resume"])
    output = capsys.readouterr()
    assert "/run/checkpoints is damaged (ValueError:" in output.out and "goes on from checkpoint 1\n" in output.out
    assert output.err == ""
    model = "model/model.safetensors"
    assert Path("run", model).read_bytes() == Path("whole", model).read_bytes()


def test_a_preset_takes_the_place_of_the_algorithm_and_flags_change_it(config: Experiment) -> None:
    assert cli.parse(config, ["--preset=gspo"]).algorithm == presets.gspo()
    parsed = cli.parse(config, ["--preset", "gspo-token", "--algorithm.surrogate.clip-high=0.01", "--seed=3"])
    assert parsed.algorithm.surrogate == dataclasses.replace(presets.gspo_token().surrogate, clip_high=0.01)
    assert parsed.seed == 3


def test_an_unknown_preset_ends_at_once_and_names_the_nearest(
    config: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.parse(config, ["--preset=gsop"])
    assert ended.value.code == 2
    assert "no preset is named 'gsop'; did you mean 'gspo'?" in capsys.readouterr().err


def test_every_preset_has_flags(config: Experiment) -> None:
    for preset in (*presets.POLICY_GRADIENTS, *presets.OF_ROLES):
        parsed = cli.parse(config, [f"--preset={preset.__name__}", "--algorithm.entropy-coef=0.5"])
        assert parsed.algorithm == dataclasses.replace(preset(), entropy_coef=0.5)
    parsed = cli.parse(config, ["--preset=online-dpo", "--algorithm.objective.pair-loss.beta=0.5"])
    assert parsed.algorithm == OnlinePreference(PreferenceObjective(DPO(beta=0.5)))
