from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxrl_llm.advantages import group_advantages
from jaxrl_llm.algorithms.batching import UpdateConfig
from jaxrl_llm.algorithms.policy_gradient.objective import PolicyGradient
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sharding import MeshConfig, make_mesh
from jaxrl_llm.training.compilation import CompilationCounter
from jaxrl_llm.training.episodes.evaluate import EvaluationConfig
from jaxrl_llm.training.episodes.user_functions import RewardError
from jaxrl_llm.training.loop import RecompilationWarning
from jaxrl_llm.training.on_policy import Trainer, TrainingConfig
from jaxrl_llm.training.run.completions import read_completions
from jaxrl_llm.training.run.divergence import DivergedError
from jaxrl_llm.training.run.metrics import comparable_metrics, read_metrics

FULL: dict[str, Any] = {}
"""The tiny experiment as it is: a reference, minibatches, evaluation by greedy decoding and by samples."""
LEAN: dict[str, Any] = {"algorithm": PolicyGradient(), "update": UpdateConfig(), "evaluation": EvaluationConfig()}
"""Nothing but sampling and one gradient, which compile in half the time."""
ONE_DEVICE = make_mesh(MeshConfig(), jax.devices()[:1])
CHECKSUMS = {"_checksums": 1}
"""What checkpoints compile, once for all runs of these shapes."""


@pytest.fixture
def make(tiny: ModuleType, tmp_path: Path):
    """Makes a trainer on one device; keyword arguments change fields of its records."""

    def make(folder: str = "run", base: dict[str, Any] = LEAN, mesh: Mesh = ONE_DEVICE, **changes: Any) -> Trainer:
        config = changed(changed(tiny.CONFIG, **base), run_dir=str(tmp_path / folder), **changes)
        return tiny.make(config, mesh)[1]

    return make


@pytest.fixture(scope="module")
def whole(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """The full run of four steps on one device, done."""
    trainer = tiny.make(changed(tiny.CONFIG, run_dir=str(tmp_path_factory.mktemp("whole"))), ONE_DEVICE)[1]
    trainer.run()
    return trainer


@pytest.fixture(scope="module")
def lean_whole(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """The lean run of four steps, done."""
    config = changed(changed(tiny.CONFIG, **LEAN), run_dir=str(tmp_path_factory.mktemp("lean")))
    trainer = tiny.make(config, ONE_DEVICE)[1]
    trainer.run()
    return trainer


def changed(config: Any, **changes: Any) -> Any:
    """`training={"steps": 2}` changes one field of a record; anything else is the new value."""
    new = {
        name: dataclasses.replace(getattr(config, name), **value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return dataclasses.replace(config, **new)


def test_stop_texts_end_completions_and_are_read(make) -> None:
    """A reward function sees the text with the stop text at its end; such a completion is finished."""
    seen: list[str] = []

    def spy(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
        seen.extend(completions)
        return [float(len(text)) for text in completions]

    stop = ("1", "-3", "+")
    trainer = make(sampling={"stop": stop}, rewards=(spy,), training={"steps": 1, "checkpoint_every": 0})
    trainer.run()
    ended = [text.endswith(stop) for text in seen]
    assert len(seen) == 16 and 4 < sum(ended) < 16
    assert not any(one in text[:-1] for text in seen for one in stop)
    assert 1 - metrics_of(trainer)[0]["completions/clipped_ratio"] >= np.mean(ended)


def metrics_of(trainer: Trainer) -> list[dict[str, float]]:
    return comparable_metrics(trainer.setup.folder / "metrics.jsonl")


def completions_of(trainer: Trainer) -> list[dict[str, Any]]:
    return list(read_completions(trainer.setup.folder))


def checkpoints_of(trainer: Trainer) -> set[str]:
    return {path.name for path in (trainer.setup.folder / "checkpoints").iterdir() if path.name.isdigit()}


# ---- Programs -----------------------------------------------------------------------------------------


def test_an_iteration_is_two_programs(lean_whole: Trainer) -> None:
    assert lean_whole.compilations.counts | CHECKSUMS == {"sample": 1, "update_step": 1} | CHECKSUMS


def test_a_whole_run_compiles_each_program_once(whole: Trainer) -> None:
    # Samples to train on, greedy and drawn samples to evaluate; reference, minibatches and old log-probs are
    # in the one update.
    assert whole.compilations.counts | CHECKSUMS == {"sample": 3, "update_step": 1} | CHECKSUMS


def test_changed_shape_is_warned_of_by_name(make) -> None:
    trainer = make(training={"checkpoint_every": 0})
    batches = list(next(trainer.loader) for _ in range(4))
    batches[2] = dataclasses.replace(batches[2], tokens=np.pad(batches[2].tokens, ((0, 0), (0, 1))))

    class Loader:
        def __next__(self):
            return batches.pop(0)

        def get_state(self):
            return {}

        def set_state(self, state):
            pass

    trainer.loader = Loader()
    with pytest.warns(RecompilationWarning) as caught:
        trainer.run()
    assert [str(warning.message) for warning in caught] == [
        "compiled again after step 2 (sample): sample (1×); a shape or a static argument changed",
        "compiled again after step 2 (update): update_step (1×); a shape or a static argument changed",
    ]


def test_a_resumed_run_does_not_warn_of_its_first_evaluation(make) -> None:
    make(training={"steps": 2}, evaluation={"every": 2}).run()
    resumed = make(training={"steps": 6}, evaluation={"every": 3}, resume=True)
    resumed.run()  # a warning is an error here
    assert [line["step"] for line in metrics_of(resumed) if "eval/reward" in line] == [0, 2, 3, 6]


def test_given_parameters_are_neither_changed_nor_consumed(tiny: ModuleType, tmp_path: Path) -> None:
    config = changed(tiny.CONFIG, run_dir=str(tmp_path), evaluation={"every": 0})
    policy, trainer = tiny.make(config, ONE_DEVICE)
    before = tiny.digest(policy.params)
    trainer.run()
    assert tiny.digest(policy.params) == before == tiny.digest(trainer.reference)
    assert tiny.digest(trainer.state.params) != before


# ---- Meshes -------------------------------------------------------------------------------------------


def assert_close(actual: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert [line["step"] for line in actual] == [line["step"] for line in expected]
    for line, other in zip(expected, actual, strict=True):
        assert other == pytest.approx(line, rel=2e-3, abs=2e-5)


@pytest.fixture
def never_cached() -> Iterator[None]:
    """Programs that are compiled, not loaded: XLA's CPU runs independent collectives of a loaded program in an order
    that differs between devices, which then wait for each other for good (jaxlib 0.10)."""
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


@pytest.mark.usefixtures("never_cached")
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(MeshConfig(fsdp=8), marks=pytest.mark.slow),
        pytest.param(MeshConfig(fsdp=2, tensor=4), marks=pytest.mark.slow),
        MeshConfig(data=2, fsdp=2, context=2),
    ],
    ids=repr,
)
def test_eight_devices_give_the_metrics_of_one(make, whole: Trainer, layout: MeshConfig) -> None:
    eight = make(base=FULL, mesh=make_mesh(layout), training={"checkpoint_every": 0})
    eight.run()
    assert_close(metrics_of(eight), metrics_of(whole))
    assert eight.compilations.counts | CHECKSUMS == {"sample": 3, "update_step": 1} | CHECKSUMS


@pytest.mark.usefixtures("never_cached")
def test_another_mesh_may_resume(make, lean_whole: Trainer) -> None:
    make(training={"steps": 2}).run()
    resumed = make(mesh=make_mesh(MeshConfig(fsdp=2, tensor=4)), training={"steps": 4}, resume=True)
    resumed.run()
    assert_close(metrics_of(resumed), metrics_of(lean_whole))


@pytest.mark.slow
def test_resumed_with_slots_is_bit_equal(make, tiny: ModuleType, lean_whole: Trainer) -> None:
    """And finds what all completions together find."""
    given: dict[str, Any] = {"sampling": {"slots": 3}, "training": {"steps": 4}}
    whole = make("slots", **given)
    whole.run()
    make(sampling={"slots": 3}, training={"steps": 2}).run()
    resumed = make(resume=True, **given)
    resumed.run()
    assert tiny.digest(resumed.state) == tiny.digest(whole.state)
    assert metrics_of(resumed) == metrics_of(whole)
    assert_close(metrics_of(whole), metrics_of(lean_whole))


def test_packed_rows_may_resume(make, lean_whole: Trainer) -> None:
    """With their padding at first, then in rows of tokens: one program, whatever the lengths."""
    make(training={"steps": 2}).run()
    resumed = make(update=UpdateConfig(tokens_per_micro_batch=23), training={"steps": 4}, resume=True)
    resumed.run()
    assert resumed.compilations.counts | CHECKSUMS == {"sample": 1, "update_step": 1} | CHECKSUMS
    assert_close(metrics_of(resumed), metrics_of(lean_whole))


def test_speculation_changes_no_metric(make) -> None:
    """Ten prompts in steps of four, with what they got in the last epoch; a run that goes on has nothing at first."""
    plain = make("plain", training={"steps": 6})
    plain.run()
    speculating = {"slots": 3, "speculate": "history", "speculative_tokens": 2}
    ours = make("ours", training={"steps": 6}, sampling=speculating)
    ours.run()
    assert ours.compilations.counts | CHECKSUMS == {"sample": 1, "update_step": 1} | CHECKSUMS
    make("again", training={"steps": 4}, sampling=speculating).run()
    resumed = make("again", training={"steps": 6}, sampling=speculating, resume=True)
    resumed.run()
    for trainer in (ours, resumed):
        lines = metrics_of(trainer)
        taken = [line.pop("sampling/tokens_per_pass") for line in lines]
        assert all(rate >= 1 for rate in taken)
        assert max(taken) > 1
        assert_close(lines, metrics_of(plain))


# ---- Resuming -----------------------------------------------------------------------------------------


def test_a_run_is_extended_as_if_it_had_been_longer(make, whole: Trainer, tiny: ModuleType) -> None:
    make(base=FULL, training={"steps": 2}).run()
    longer = make(base=FULL, training={"steps": 4}, resume=True)
    result = longer.run()
    assert tiny.digest(longer.state) == tiny.digest(whole.state)
    assert metrics_of(longer) == metrics_of(whole)
    assert (result.step, result.stopped) == (4, None)
    assert result.first_evaluation == {name: metrics_of(whole)[0][name] for name in result.first_evaluation}
    # Once more: nothing is left to do.
    again = make(base=FULL, training={"steps": 4}, resume=True)
    assert again.run() == dataclasses.replace(result, params=again.state.params)
    assert tiny.digest(again.state) == tiny.digest(whole.state)
    assert metrics_of(again) == metrics_of(whole)


def test_resuming_without_a_checkpoint_starts_anew(make, lean_whole: Trainer) -> None:
    lost = make(training={"checkpoint_every": 0})
    lost.run()
    again = make(resume=True)
    again.run()
    assert metrics_of(again) == metrics_of(lean_whole)


def test_resuming_without_saving_goes_on(make) -> None:
    make(training={"steps": 2}).run()
    resumed = make(training={"steps": 3, "checkpoint_every": 0}, resume=True)
    resumed.run()
    assert metrics_of(resumed)[-1]["step"] == 3
    assert checkpoints_of(resumed) == {"2"}


def test_evaluation_may_be_switched_on_and_off(make) -> None:
    make(training={"steps": 2}).run()
    make(training={"steps": 4}, evaluation={"every": 2}, resume=True).run()
    last = make(training={"steps": 6}, resume=True)
    last.run()
    assert [line["step"] for line in metrics_of(last) if "eval/reward" in line] == [4]


def test_a_folder_that_is_taken_is_refused_before_anything_is_compiled(make, tiny: ModuleType) -> None:
    trainer = make(training={"steps": 2})
    trainer.run()
    before = (trainer.setup.folder / "metrics.jsonl").read_bytes()
    mesh = ONE_DEVICE
    policy = tiny.make_policy(mesh)
    config = changed(changed(tiny.CONFIG, **LEAN), run_dir=str(trainer.setup.folder))
    rows = {"train_rows": tiny.TRAIN_ROWS, "eval_rows": tiny.EVAL_ROWS}
    with CompilationCounter() as counter:
        with pytest.raises(ValueError, match=r"run holds a run \(a checkpoint of step 2\): go on with --resume, or"):
            tiny.make_trainer(config, policy, mesh, **rows)
        other = changed(config, resume=True, seed=1, optimizer={"learning_rate": 0.5})
        with pytest.raises(ValueError, match=r"with other settings: optimizer.learning_rate was 0.01 and is 0.5; seed"):
            tiny.make_trainer(other, policy, mesh, **rows)
        other_rows = rows | {"train_rows": tiny.TRAIN_ROWS[1:]}
        with pytest.raises(ValueError, match="rows was 10 and is 9"):
            tiny.make_trainer(changed(config, resume=True), policy, mesh, **other_rows)
    assert counter.counts == {}
    assert (trainer.setup.folder / "metrics.jsonl").read_bytes() == before


def test_metrics_without_a_checkpoint_are_not_overwritten(make) -> None:
    make(training={"checkpoint_every": 0}).run()
    with pytest.raises(ValueError, match=r"holds a run \(no checkpoint\)"):
        make()


# ---- Settings that do not fit -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": {"max_tokens": 13}}, "a prompt of 4 tokens and sampling.max_tokens=13 exceed the model's 16"),
        ({"sampling": {"temperature": 0.0}}, "temperature 0.0 .greedily. has no gradient"),
        ({"training": {"samples_per_prompt": 1}}, "training.samples_per_prompt=1 cannot learn"),
        ({"seed": -1}, "seed must be between 0 and"),
        ({"update": {"minibatches": 3}}, "4 prompts per step are not divisible by update.minibatches=3"),
        ({"optimizer": {"warmup_steps": 4, "schedule": "linear"}}, "warmup_steps=4 leaves nothing of 4 optimizer"),
        (
            {"evaluation": {"every": 1, "solved_by": "right"}},
            "solved_by='right' is no reward function; there are",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_compiled(make, changes: dict[str, Any], message: str) -> None:
    with CompilationCounter() as counter, pytest.raises(ValueError, match=message):
        make(**changes)
    assert "<lambda>" not in counter.counts and "copy" not in counter.counts


@pytest.mark.parametrize("field", ["steps", "prompts_per_step", "samples_per_prompt", "keep_checkpoints"])
def test_counts_of_nothing(field: str) -> None:
    with pytest.raises(ValueError, match=f"training.{field}=0 must be at least 1"):
        TrainingConfig(**{field: 0})
    with pytest.raises(ValueError, match=r"training.checkpoint_every=-1 must be at least 0"):
        TrainingConfig(checkpoint_every=-1)


# ---- Interruptions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_returns(make, tiny: ModuleType, capfd: pytest.CaptureFixture[str], name: str) -> None:
    trainer = make()
    tiny.send_signal(trainer, name, "update:3")
    result = trainer.run()
    assert (result.step, result.stopped) == (3, name)
    assert checkpoints_of(trainer) >= {"3"}
    captured = capfd.readouterr()
    assert f"Stopped after step 3 ({name}) and saved. Go on with the same command and --resume" in captured.out
    assert captured.err == f"\n{name}: Stopping as soon as this phase ends; Ctrl-C again aborts.\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(
    ("place", "done"),
    [
        ("evaluate:0", 0),
        ("sample:3", 2),
        pytest.param("reward:4", 3, marks=pytest.mark.slow),
        pytest.param("evaluate:2", 2, marks=pytest.mark.slow),
    ],
)
def test_a_signal_in_any_phase_saves_and_what_goes_on_is_the_same(
    make, whole: Trainer, tiny: ModuleType, capsys: pytest.CaptureFixture[str], place: str, done: int
) -> None:
    trainer = make(base=FULL)
    tiny.send_signal(trainer, "SIGTERM", place)
    assert (trainer.run().step, int(trainer.state.step)) == (done, done)
    said = "Stopped before the first step, with nothing to save" if not done else f"Stopped after step {done} (SIGTERM)"
    assert said in capsys.readouterr().out
    assert checkpoints_of(trainer) >= ({str(done)} if done else set())
    resumed = make(base=FULL, resume=True)
    resumed.run()
    assert tiny.digest(resumed.state) == tiny.digest(whole.state)
    assert metrics_of(resumed) == metrics_of(whole)


def test_a_second_signal_while_the_last_checkpoint_is_written(make, tiny: ModuleType) -> None:
    trainer = make()
    tiny.send_signal(trainer, "SIGTERM", "update:3")
    tiny.send_signal(trainer, "SIGTERM", "checkpoint:3")
    assert trainer.run().stopped == "SIGTERM"
    assert checkpoints_of(trainer) >= {"3"}


def test_a_signal_in_the_last_step_changes_nothing(make, tiny: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make()
    tiny.send_signal(trainer, "SIGTERM", "update:4")
    result = trainer.run()
    assert (result.step, result.stopped) == (4, None)
    assert "Stopped" not in capsys.readouterr().out


def test_a_signal_where_nothing_is_saved(make, tiny: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make(training={"checkpoint_every": 0})
    tiny.send_signal(trainer, "SIGTERM", "update:1")
    assert trainer.run().step == 1
    assert "nothing was saved, since training.checkpoint_every is 0" in capsys.readouterr().out
    assert not (trainer.setup.folder / "checkpoints").exists()


def test_a_reward_that_raises_loses_no_step(
    make, lean_whole: Trainer, tiny: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def shared_characters(prompts: list[str], completions: list[str], answer: list[str]) -> list[float]:
        calls.append(len(prompts))
        if len(calls) == 4:
            raise KeyError("answers")
        return tiny.shared_characters(prompts, completions, answer)

    failing = make(rewards=(shared_characters,))
    with pytest.raises(RewardError, match=r"'shared_characters' raised KeyError .*test_on_policy.py:\d+\)") as caught:
        failing.run()
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert "Failed after step 3 and saved. Go on with the same command and --resume" in capsys.readouterr().out
    assert checkpoints_of(failing) >= {"3"}
    mended = make(rewards=(shared_characters,), resume=True)
    mended.run()
    assert tiny.digest(mended.state) == tiny.digest(lean_whole.state)
    assert metrics_of(mended) == metrics_of(lean_whole)
    assert completions_of(mended) == completions_of(lean_whole)


def test_a_reward_that_fails_at_once_after_resuming(make) -> None:
    make(training={"steps": 2}).run()

    def shared_characters(prompts: list[str], completions: list[str]) -> list[float]:
        return [0.0]

    failing = make(rewards=(shared_characters,), resume=True)
    with pytest.raises(RewardError, match="'shared_characters' must return 16 values, one a sample, got 1"):
        failing.run()
    assert checkpoints_of(failing) == {"2"}


def test_a_reward_that_fails_before_the_first_step(make) -> None:
    def nothing(prompts: list[str], completions: list[str]) -> list[None]:
        return [None] * len(prompts)

    failing = make(rewards=(nothing,), evaluation={"every": 1})
    with pytest.raises(RewardError, match=r"every reward function \(nothing\) returned None for sample 0"):
        failing.run()
    assert checkpoints_of(failing) == set()


# ---- Metrics and completions --------------------------------------------------------------------------


def test_completions_hold_what_was_sampled_scored_and_learned(whole: Trainer, tiny: ModuleType) -> None:
    every = completions_of(whole)
    rows = [row for row in every if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [step for step in range(1, 5) for _ in range(16)]
    assert {row["step"]: row["advantage"] for row in every if row["kind"] == "eval"} == dict.fromkeys((0, 2, 4))
    for row in rows:
        data = tiny.TRAIN_ROWS[row["row"]]
        assert row["prompt"] == data["prompt"] and (row["finished"] or row["tokens"] == 5)
        [reward] = tiny.shared_characters([], [row["completion"]], [data["answer"]])
        assert row["reward"] == row["rewards"]["shared_characters"] == pytest.approx(reward, abs=1e-5)
    rewards = np.array([row["reward"] for row in rows]).reshape(-1, 4)
    advantages = np.array([row["advantage"] for row in rows]).reshape(-1, 4)
    np.testing.assert_allclose(advantages, group_advantages(rewards), atol=2e-3)
    told = [row for row in rows if "token_ids" in row]
    assert [(row["step"], row["sample"]) for row in told] == [
        (step, sample) for step in range(1, 5) for sample in (0, 1)
    ]
    for row in told:
        assert tiny.TOKENIZER.decode(row["token_ids"]) == "".join(row["token_texts"])
        assert row["logprob"] == pytest.approx(sum(row["token_logprobs"]), abs=1e-4)
        assert row["token_old_logprobs"] == pytest.approx(row["token_logprobs"], abs=1e-4)
        assert len(row["token_ids"]) == len(row["token_entropy"]) == len(row["token_ref_logprobs"]) == row["tokens"]
        assert (row["step"] == 1) == (row["token_ref_logprobs"] == pytest.approx(row["token_old_logprobs"], abs=1e-5))


def test_what_reward_functions_are_told_of_a_run_and_tell(
    make, tiny: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    async def fixed(completions: list[str], trainer_state: Any, log_metric: Any, log_extra: Any) -> list[float]:
        states.append(trainer_state)
        log_metric("steps_done", trainer_state.global_step)
        log_metric("reward", 7.0)
        log_extra("text", completions)
        return [1.0] * len(completions)

    states: list[Any] = []
    trainer = make(rewards=(tiny.shared_characters, fixed), training={"steps": 6, "checkpoint_every": 0})
    trainer.run()
    seen = [(state.global_step, state.max_steps, state.epoch, state.num_train_epochs) for state in states]
    assert seen == [(step, 6, step * 0.4, 6 * 0.4) for step in range(6)]  # four of ten prompts a step
    assert [line["steps_done"] for line in metrics_of(trainer)] == list(range(6))
    assert {line["told/reward"] for line in metrics_of(trainer)} == {7.0}
    rows = completions_of(trainer)
    assert len(rows) == 6 * 16 and all(row["extra"] == {"text": row["completion"]} for row in rows)
    said = [line for line in capsys.readouterr().out.splitlines() if "'fixed'" in line or "log_metric" in line]
    assert ["step 1: log_metric('reward', …)" in said[0], "step 5: for 5 steps the reward" in said[1]] == [True] * 2
    assert len(said) == 2


def test_a_reward_that_does_not_apply_to_all(make, tiny: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def even_only(prompts: list[str], completions: list[str]) -> list[float | None]:
        return [
            None if int(prompt[0]) % 2 else float(len(text)) for prompt, text in zip(prompts, completions, strict=True)
        ]

    def never(prompts: list[str], completions: list[str]) -> list[None]:
        return [None] * len(prompts)

    def known(prompts: list[str], completions: list[str], answer: list[str]) -> list[float | None]:
        points = tiny.shared_characters(prompts, completions, answer)
        return [None if prompt[0] in "135" else point for prompt, point in zip(prompts, points, strict=True)]

    rewards = {"rewards": (known, even_only, never), "reward_weights": (1.0, 0.5, 2.0)}
    trainer = make(**rewards, evaluation={"every": 2})
    trainer.run()
    told = [line for line in capsys.readouterr().out.splitlines() if "returned None" in line]
    assert told == [
        "step 1: the reward function 'never' returned None for all 16 samples, and has no part in their reward; can it "
        "read the gold answers in the data?"
    ]
    for line in metrics_of(trainer):
        if "reward" in line:
            assert np.isnan(line["rewards/never/mean"]) and np.isnan(line["rewards/never/std"])
            assert np.isfinite(line["reward"]) and np.isfinite(line["grad_norm"])
        else:
            assert np.isnan(line["eval/rewards/never"]) and np.isfinite(line["eval/rewards/even_only"])
            weighted = line["eval/rewards/known"] + 0.5 * line["eval/rewards/even_only"]
            assert line["eval/reward"] == pytest.approx(weighted, rel=1e-5)  # to 1+1= and 3+1= none applies
    rows = [row for row in completions_of(trainer) if row["kind"] == "train"]
    lacking = [row for row in rows if row["prompt"][0] in "135"]
    assert lacking and all(row["reward"] is None and row["advantage"] == 0 for row in lacking)
    assert any(row["advantage"] for row in rows)


def test_a_gradient_that_is_not_finite_is_told(make, tiny: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make(training={"steps": 1, "checkpoint_every": 0})
    before, update = tiny.digest(trainer.state.params), trainer.update
    trainer.update = lambda state, rollout, given, reference: update(
        state, rollout, given._replace(rewards=given.rewards * np.nan), reference
    )
    with pytest.raises(DivergedError, match="after step 1 the gradients of the last 1 step"):  # there are no others
        trainer.run()
    assert tiny.digest(trainer.state.params) == before
    assert metrics_of(trainer)[0]["frac_steps_skipped"] == 1
    assert "step 1: the gradient is not finite, its update was skipped\n" in capsys.readouterr().out


def test_the_phases_are_timed_where_the_device_works(make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(training={"steps": 3})
    sample = Sampler.__call__
    wait = jax.jit(lambda x: jax.pure_callback(lambda y: (time.sleep(0.2), y)[1], x, x))

    def slow(*args: Any, **more: Any) -> Any:
        rollout = sample(*args, **more)
        return rollout.replace(completion_lengths=wait(rollout.completion_lengths))  # returns at once

    monkeypatch.setattr(Sampler, "__call__", slow)
    trainer.run()
    last = read_metrics(trainer.setup.folder / "metrics.jsonl")[-1]
    assert last["perf/sample_seconds"] >= 0.2 > last["perf/update_seconds"]
    phases = sum(last[f"perf/{name}_seconds"] for name in ("sample", "reward", "update"))
    assert phases <= last["step_time"] < phases + 0.2
    assert last["perf/tokens_per_second"] == pytest.approx(last["num_tokens"] / last["step_time"])


def test_learning_rate_is_that_of_the_step(make) -> None:
    # Eight optimizer steps, two of them of warm-up.
    trainer = make(update={"minibatches": 2}, optimizer={"schedule": "linear", "warmup_steps": 2})
    trainer.run()
    rates = [line["learning_rate"] for line in metrics_of(trainer) if "learning_rate" in line]
    # Step i ends with optimizer step 2i: 2 of 2 of the warm-up, then 1, 3 and 5 of 6 of the way down.
    assert rates == pytest.approx([0.01 * 2 / 3, 0.01 * 5 / 6, 0.01 * 3 / 6, 0.01 * 1 / 6])
