from __future__ import annotations

from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import cli
from jaxrl_llm.sharding import make_mesh
from jaxrl_llm.training.run.divergence import DivergedError, SkippedSteps, check_finite
from jaxrl_llm.types import Rollout


def after(shares: list[float], *, limit: int = 10) -> SkippedSteps:
    skipped = SkippedSteps(limit)
    for share in shares:
        skipped.count(share)
    return skipped


def test_only_steps_in_a_row_count() -> None:
    assert after([1, 1, 0, 1]).in_a_row == 1
    assert after([0, 0.5, 1]).in_a_row == 2
    assert after([0, 0.25]).in_a_row == 0


@pytest.mark.parametrize(
    ("shares", "limit", "during", "ending"),
    [
        ([0, 0, 0], 10, False, False),
        ([0, 0, 0, 1], 10, False, False),  # one that overflowed
        ([0] * 6 + [1] * 3, 10, False, True),
        ([0, 1], 10, False, True),  # a short run that has learned nothing since its first step
        ([1] * 10, 10, True, True),
        ([1] * 9, 10, False, True),
        ([1] * 50, 0, False, True),
        ([1, 1], 2, True, True),
    ],
)
def test_what_is_divergence(shares, limit, during, ending) -> None:
    skipped = after(shares, limit=limit)
    assert (skipped.diverged(ending=False), skipped.diverged(ending=True)) == (during, ending)


def test_a_good_checkpoint_has_led_to_a_finite_gradient() -> None:
    """Steps 5 and 6 were skipped: the parameters after step 4 are at fault, those after step 3 led to step 4."""
    skipped = after([0, 0, 0, 0, 1, 1])
    assert skipped.good_checkpoint(6, [1, 2, 3, 4, 5]) == "checkpoint 3 is from before"
    assert skipped.good_checkpoint(6, [4, 5]) == skipped.good_checkpoint(6, []) == "no checkpoint is from before"


def rollout(logprobs: Any, lengths: Any) -> Rollout:
    logprobs, lengths = jnp.asarray(logprobs, jnp.float32)[None], jnp.asarray(lengths)[None]
    blank = jnp.zeros(logprobs.shape, jnp.int32)
    return Rollout(blank[:, 0], lengths[:, 0], blank, lengths, lengths > 0, logprobs, logprobs)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_was_sampled_is_looked_at_and_padding_is_not(bad: float) -> None:
    check_finite(rollout([[-1, bad], [-1, -2]], [1, 2]))
    with pytest.raises(DivergedError, match="logits are not finite in 1 of 2 completions"):
        check_finite(rollout([[-1, bad], [-1, -2]], [2, 2]))


FLAGS = ["--evaluation.every=0", "--training.checkpoint-every=1", "--training.keep-checkpoints=9"]


@pytest.mark.parametrize("evaluated", [False, True])
def test_a_policy_that_diverges_ends_with_one_line_and_no_model(
    tiny: ModuleType, tmp_path, capsys: pytest.CaptureFixture[str], evaluated: bool
) -> None:
    flags = [*FLAGS[evaluated:], *["--evaluation.every=1"] * evaluated, "--optimizer.learning-rate=1e30"]
    with pytest.raises(SystemExit) as ended:
        tiny.main([f"--run-dir={tmp_path / 'run'}", "--update.minibatches=1", "--training.steps=6", *flags])
    error = capsys.readouterr().err
    assert ended.value.code == 1 and error.count("\n") == 1 and not (tmp_path / "run/model").exists()
    assert "after step 1 the model's logits are not finite in" in error
    assert error.endswith("lower optimizer.learning_rate; no checkpoint is from before\n")


def test_gradients_that_stay_infinite_end_the_run_and_displace_no_checkpoint(
    tiny: ModuleType, tmp_path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From step 4 on the update finds nothing finite; its parameters stay what they were after step 3."""
    config = cli.start(
        cli.parse(
            tiny.CONFIG,
            [f"--run-dir={tmp_path / 'run'}", "--training.steps=20", "--training.max-skipped-steps=5", *FLAGS],
        )
    )
    _, trainer = tiny.make(config, make_mesh(config.mesh))
    iterate = trainer.iterate

    def skipping(step: int, phase: Any) -> Any:
        outcome = iterate(step, phase)
        outcome.metrics["frac_steps_skipped"] = float(step > 3)
        return outcome

    monkeypatch.setattr(trainer, "iterate", skipping)
    with pytest.raises(SystemExit) as ended:
        cli.train(trainer)
    out, error = capsys.readouterr()
    assert ended.value.code == 1 and error == (
        "error: after step 8 the gradients of the last 5 step(s) were not finite: lower optimizer.learning_rate; "
        "checkpoint 2 is from before\n"
    )
    said = "step 6: the gradients of the last 3 step(s) were not finite; training.max_skipped_steps=5 ends the run."
    assert " ".join(out.split()).count(said) == 1
    kept = {path.name for path in (tmp_path / "run/checkpoints").iterdir() if path.name.isdigit()}
    assert kept == {"1", "2", "3"}


def test_a_step_that_is_skipped_now_and_then_ends_nothing(
    tiny: ModuleType, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [f"--run-dir={tmp_path / 'run'}", "--training.steps=4", "--training.max-skipped-steps=2", *FLAGS]
    config = cli.start(cli.parse(tiny.CONFIG, flags))
    _, trainer = tiny.make(config, make_mesh(config.mesh))
    iterate = trainer.iterate

    def skipping(step: int, phase: Any) -> Any:
        outcome = iterate(step, phase)
        outcome.metrics["frac_steps_skipped"] = float(step in (1, 3))
        return outcome

    monkeypatch.setattr(trainer, "iterate", skipping)
    assert cli.train(trainer).step == 4
    kept = {path.name for path in (tmp_path / "run/checkpoints").iterdir() if path.name.isdigit()}
    assert kept == {"2", "4"}  # those of 1 and 3 waited for the next step
