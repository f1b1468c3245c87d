"""Runs on given rows: every service of a run, references, meshes, exact continuation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxrl_llm.algorithms.optimizer import OptimizerConfig
from jaxrl_llm.algorithms.router import RouterLosses
from jaxrl_llm.algorithms.scorer import Scorer
from jaxrl_llm.algorithms.supervised import SupervisedObjective
from jaxrl_llm.data.demonstrations import DemonstrationDataset, DemonstrationFormat
from jaxrl_llm.data.encoded_rows import EncodedRows
from jaxrl_llm.data.tokenizers import CharTokenizer
from jaxrl_llm.losses.aggregate import aggregate, aggregation_normalizer
from jaxrl_llm.masking import fill_masked
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.records import Mean, Metrics
from jaxrl_llm.sharding import MeshConfig, make_mesh
from jaxrl_llm.training.compilation import CompilationCounter
from jaxrl_llm.training.loop import RecompilationWarning
from jaxrl_llm.training.offline import (
    OfflineEvaluationConfig,
    OfflineTrainer,
    OfflineTrainingConfig,
    OfflineUpdateConfig,
)
from jaxrl_llm.training.run.metrics import comparable_metrics
from jaxrl_llm.training.run.setup import RunSetup

ONE_DEVICE = make_mesh(MeshConfig(), jax.devices()[:1])
TOKENIZER = CharTokenizer("0123456789+-*=")
SUMS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(10) for b in range(10)]
TRAIN, HELD_OUT = SUMS[::7] + SUMS[1::7], SUMS[3::20]  # 30 rows and 5


class Anchored(NamedTuple):
    prompt: Any
    prompt_lengths: Any
    completion: Any
    mask: Any
    ref_logprobs: Any = None


@dataclasses.dataclass(frozen=True)
class AnchoredObjective:
    """Likelihood, with the squared distance from a reference."""

    needs_reference: bool = True
    whole_groups: bool = False
    whole_batch: bool = False

    def normalizer(self, rows: Anchored) -> jax.Array:
        return aggregation_normalizer(rows.mask, mode="token-mean")

    def scores(self, model: Transformer, params: Params, texts: Any) -> jax.Array:
        return Scorer(model)(params, texts).logprobs

    def loss(self, scores: jax.Array, rows: Anchored, normalizer: Any) -> tuple[jax.Array, Metrics]:
        logprobs = fill_masked(scores, rows.mask)
        gap = logprobs - fill_masked(rows.ref_logprobs, rows.mask)
        loss = aggregate(gap**2 - logprobs, rows.mask, mode="token-mean", normalizer=normalizer)
        return loss, {"gap": Mean.of(jnp.abs(jax.lax.stop_gradient(gap)), rows.mask)}


class AnchoredDataset(DemonstrationDataset):
    def batch(self, items: Sequence[int] | np.ndarray, /) -> Any:
        return Anchored(*super().batch(items))


class AnchoredFormat(DemonstrationFormat):
    def collect(self, encoded: EncodedRows[Any]) -> AnchoredDataset:
        return AnchoredDataset(encoded)


def sums(rows: list[dict[str, str]], form: DemonstrationFormat | None = None) -> Any:
    return (form or DemonstrationFormat()).dataset(rows, TOKENIZER, max_prompt_length=5, max_completion_length=4)


@pytest.fixture(scope="module")
def model_and_params(tiny: ModuleType) -> tuple[Transformer, Params]:
    policy = tiny.make_policy(ONE_DEVICE)
    return policy.model, jax.device_get(policy.params)  # so that any mesh may take them


@pytest.fixture
def make(model_and_params: tuple[Transformer, Params], tmp_path: Path) -> Callable[..., OfflineTrainer]:
    """Makes a trainer on one device; keyword arguments change fields of its records."""
    return factory(model_and_params, tmp_path)


def factory(model_and_params: tuple[Transformer, Params], parent: Path) -> Callable[..., OfflineTrainer]:
    model, params = model_and_params

    def make(
        folder: str = "run",
        *,
        anchored: bool = False,
        mesh: Mesh = ONE_DEVICE,
        seed: int = 0,
        resume: bool = False,
        shared: dict[str, Any] | None = None,
        **changes: Any,
    ) -> OfflineTrainer:
        form = AnchoredFormat() if anchored else DemonstrationFormat()
        settings: dict[str, Any] = {
            "objective": AnchoredObjective() if anchored else SupervisedObjective(),
            "dataset": sums(TRAIN, form),
            "eval_dataset": sums(HELD_OUT, form),
            "training": OfflineTrainingConfig(steps=4, rows_per_step=8, checkpoint_every=2, keep_checkpoints=1),
            "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
            "evaluation": OfflineEvaluationConfig(every=2, batch_size=3),
            "update": OfflineUpdateConfig(),
        }
        setup = RunSetup(parent / folder, mesh, seed, resume=resume, settings=shared or {})
        for name, value in changes.items():
            settings[name] = dataclasses.replace(settings[name], **value) if isinstance(value, dict) else value
        return OfflineTrainer(model=model, params=params, setup=setup, **settings)

    return make


@pytest.fixture(scope="module")
def whole(
    model_and_params: tuple[Transformer, Params], tmp_path_factory: pytest.TempPathFactory
) -> dict[bool, OfflineTrainer]:
    """Runs of four steps on one device, done: plain and with a reference."""
    runs = {}
    for anchored in (False, True):
        folder = tmp_path_factory.mktemp("whole")
        trainer = factory(model_and_params, folder)(anchored=anchored)
        trainer.run()
        runs[anchored] = trainer
    return runs


def metrics_of(trainer: OfflineTrainer) -> list[dict[str, float]]:
    return comparable_metrics(trainer.setup.folder / "metrics.jsonl")


def assert_close(actual: list[dict[str, float]], expected: list[dict[str, float]], tolerance: float = 1e-4) -> None:
    assert [line["step"] for line in actual] == [line["step"] for line in expected]
    for line, other in zip(expected, actual, strict=True):
        assert other == pytest.approx(line, rel=tolerance, abs=1e-5)


# ---- A run --------------------------------------------------------------------------------------------


def test_a_run_writes_its_metrics_and_compiles_each_program_once(whole) -> None:
    trainer = whole[False]
    lines = metrics_of(trainer)
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 3, 4, 4]
    assert set(lines[0]) == {"step", "eval/loss", "eval/nll", "eval/entropy"}
    assert set(lines[1]) == {
        *("step", "loss", "nll", "entropy", "grad_norm", "frac_steps_skipped"),
        *("learning_rate", "epoch", "num_tokens"),
    }
    assert [line["epoch"] for line in lines if "epoch" in line] == [8 * n / 30 for n in (1, 2, 3, 4)]
    assert lines[1]["learning_rate"] == pytest.approx(5e-3) and lines[2]["learning_rate"] == pytest.approx(1e-2)
    assert {path.name for path in (trainer.setup.folder / "checkpoints").iterdir() if path.name.isdigit()} == {"4"}
    programs = {"offline_step": 1, "evaluation": 1, "normalizer": 1, "_merged": 1, "_checksums": 1}
    assert trainer.compilations.counts | {"_checksums": 1} == programs  # those of checkpoints, once for all runs


def test_an_evaluation_is_that_of_one_batch(make, whole) -> None:
    """Five rows in batches of three, the last filled up, as five in one; and the loss of a step before it."""
    once = make(training={"steps": 1, "checkpoint_every": 0}, evaluation={"batch_size": 5})
    once.run()
    assert metrics_of(once)[0] == pytest.approx(metrics_of(whole[False])[0], rel=1e-5)
    same = make("same", eval_dataset=sums(TRAIN), training={"steps": 1, "rows_per_step": 30, "checkpoint_every": 0})
    same.run()
    evaluated, trained = metrics_of(same)[:2]
    assert trained["loss"] == pytest.approx(evaluated["eval/loss"], rel=1e-5)
    tokens = sum(len(row["prompt"]) + len(row["completion"]) + 1 for row in TRAIN)
    assert trained["num_tokens"] == tokens and trained["epoch"] == 1


def test_held_out_rows_are_read_in_what_a_row_of_tokens_would_hold(make) -> None:
    """Their padding has 5 + 4 tokens; of the training's rows of 20 tokens two devices have one each."""
    pair = make_mesh(MeshConfig(), jax.devices()[:2])
    update = {"tokens_per_micro_batch": 20}
    trainer = make(mesh=pair, update=update, evaluation={"batch_size": None})
    assert [len(served.rows.mask) for served in trainer._batches(trainer.eval_dataset)] == [4, 4]
    given = make("given", mesh=pair, update=update)
    assert len(next(iter(given._batches(given.eval_dataset))).rows.mask) == 4  # 3, and one that fills the mesh


def test_packed_data_is_not_packed_again(make) -> None:
    packed = sums(TRAIN, DemonstrationFormat(packed_length=12))
    with pytest.raises(ValueError, match="tokens_per_micro_batch=20: these rows hold several sequences"):
        make(dataset=packed, update={"tokens_per_micro_batch": 20})


def test_held_out_loss_falls(make) -> None:
    """Sums of one digit, of which a tenth is held out: far below a uniform guess of one of sixteen tokens."""
    held_out = SUMS[::10]
    trainer = make(
        dataset=sums([row for row in SUMS if row not in held_out]),
        eval_dataset=sums(held_out),
        training={"steps": 60, "rows_per_step": 32, "checkpoint_every": 0},
        evaluation={"every": 60},
    )
    result = trainer.run()
    assert result.first_evaluation["eval/loss"] == pytest.approx(np.log(16), rel=0.1)
    assert result.last_evaluation["eval/loss"] < 1.2
    assert (result.step, result.stopped) == (60, None)


def test_packed_rows_have_the_loss_of_unpacked_ones(make, model_and_params) -> None:
    once = {"training": {"steps": 1, "checkpoint_every": 0}, "evaluation": {"every": 1, "batch_size": None}}
    plain, packed = (
        make("plain", eval_dataset=sums(TRAIN), **once),
        make("packed", dataset=sums(TRAIN).packed(15), eval_dataset=sums(TRAIN).packed(15), **once),
    )
    assert len(packed.dataset) < 20
    plain.run()
    packed.run()
    assert metrics_of(packed)[0] == pytest.approx(metrics_of(plain)[0], rel=1e-5)
    assert metrics_of(packed)[2]["eval/loss"] < metrics_of(packed)[0]["eval/loss"]


def test_given_parameters_are_neither_changed_nor_consumed(whole, model_and_params, tiny: ModuleType) -> None:
    _, params = model_and_params
    assert tiny.digest(params) == tiny.digest(tiny.make_policy(ONE_DEVICE).params)
    assert tiny.digest(whole[False].state.params) != tiny.digest(params)


def test_the_best_checkpoint_is_kept(make) -> None:
    """With a learning rate that soon does harm, the best one is not the latest."""
    trainer = make(
        training={"steps": 6, "checkpoint_every": 1}, evaluation={"every": 1}, optimizer={"learning_rate": 0.5}
    )
    trainer.run()
    losses = [line["eval/loss"] for line in metrics_of(trainer) if "eval/loss" in line][1:]
    kept = {int(path.name) for path in (trainer.setup.folder / "checkpoints").iterdir() if path.name.isdigit()}
    assert kept == {6, 1 + int(np.argmin(losses))} and len(kept) == 2


# ---- Meshes and micro-batches -------------------------------------------------------------------------


@pytest.mark.parametrize("anchored", [pytest.param(False, marks=pytest.mark.slow), True])
def test_eight_devices_and_micro_batches_give_the_metrics_of_one(make, whole, anchored: bool) -> None:
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    eight = make(anchored=anchored, mesh=mesh, update={"micro_batches": 2}, training={"checkpoint_every": 0})
    eight.run()
    assert_close(metrics_of(eight), metrics_of(whole[anchored]), tolerance=2e-3)
    assert all(count == 1 for count in eight.compilations.counts.values())


# ---- References ---------------------------------------------------------------------------------------


def test_a_reference_ahead_gives_the_same_losses_and_frees_its_parameters(make, whole) -> None:
    ahead = make(anchored=True, update={"reference": "ahead"})
    assert ahead.reference is not None
    ahead.run()
    assert ahead.reference is None and whole[True].reference is not None
    assert_close(metrics_of(ahead), metrics_of(whole[True]))
    assert metrics_of(ahead)[0]["eval/gap"] == pytest.approx(0, abs=1e-5)
    assert metrics_of(ahead)[-1]["eval/gap"] > 0.01
    assert ahead.compilations.counts["logprobs"] == 1


# ---- Resuming -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["in_step", "ahead"])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(make, whole, tiny: ModuleType, reference: Any) -> None:
    update = {"reference": reference}
    expected = whole[True]
    if reference == "ahead":
        expected = make("whole", anchored=True, update=update)
        expected.run()
    stopped = make(anchored=True, update=update)
    tiny.send_signal(stopped, "SIGTERM", "update:3")
    result = stopped.run()
    assert (result.step, result.stopped) == (3, "SIGTERM")
    resumed = make(anchored=True, update=update, resume=True)
    last = resumed.run()
    assert tiny.digest(resumed.state) == tiny.digest(expected.state)
    assert metrics_of(resumed) == metrics_of(expected)
    assert last.first_evaluation["eval/loss"] == metrics_of(expected)[0]["eval/loss"]


def test_another_run_is_not_gone_on_with(make) -> None:
    make(training={"steps": 2}, shared={"seed": 0}).run()
    with CompilationCounter() as counter:
        with pytest.raises(ValueError, match=r"holds a run \(a checkpoint of step 2\)"):
            make(shared={"seed": 0})
        with pytest.raises(ValueError, match="with other settings: seed was 0 and is 1"):
            make(shared={"seed": 1}, resume=True)
        with pytest.raises(ValueError, match="content was"):
            make(shared={"seed": 0}, resume=True, dataset=sums(SUMS[:30]))
    assert counter.counts == {}


# ---- Settings that do not fit -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_dataset": None}, "evaluation.every=2, but there are no held-out rows"),
        ({"objective": AnchoredObjective()}, "training rows: the objective reads ref_logprobs, but rows have prompt, "),
        ({"objective": SupervisedObjective(router=RouterLosses(1.0))}, r"objective\.router=.* no layer .* has experts"),
        ({"update": {"micro_batches": 3}}, r"8 prompts × 1 samples .* update\.micro_batches=3"),
        ({"seed": -1}, "seed must be between 0 and"),
        ({"optimizer": {"warmup_steps": 4, "schedule": "linear"}}, "warmup_steps=4 leaves nothing of 4 optimizer"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_compiled(make, changes: Any, message: str) -> None:
    with CompilationCounter() as counter, pytest.raises(ValueError, match=message):
        make(**changes)
    assert counter.counts == {}


def test_rows_that_the_model_cannot_read(make, tmp_path: Path) -> None:
    other = CharTokenizer("0123456789+-*=abc")
    rows = [*SUMS[:3], {"prompt": "1", "completion": "c"}]
    unknown = DemonstrationFormat().dataset(rows, other, max_prompt_length=5, max_completion_length=4)
    with pytest.raises(ValueError, match="training rows: item 3 has a token outside the model's vocabulary of 16"):
        make(dataset=unknown)
    rows = [*SUMS[:1], {"prompt": "1+1=", "completion": "123456789012"}]
    long = DemonstrationFormat().dataset(rows, TOKENIZER, max_prompt_length=5, max_completion_length=20)
    with pytest.raises(ValueError, match="held-out rows: item 1 has 17 tokens, more than the model's 16 positions"):
        make(eval_dataset=long)


def test_a_best_metric_that_there_is_not_ends_before_the_first_step(make) -> None:
    trainer = make(evaluation={"best_metric": "eval/accuracy"})
    with pytest.raises(ValueError, match="best_metric='eval/accuracy' is no metric; there are eval/entropy, eval/loss"):
        trainer.run()
    assert metrics_of(trainer) == []


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (lambda: OfflineTrainingConfig(rows_per_step=0), "training.rows_per_step=0 must be at least 1"),
        (lambda: OfflineUpdateConfig(micro_batches=0), "update.micro_batches=0 must be at least 1"),
        (lambda: OfflineUpdateConfig(reference="never"), "update.reference='never' is neither"),
        (lambda: OfflineEvaluationConfig(max_rows=0), "evaluation.max_rows=0 must be at least 1"),
        (lambda: OfflineEvaluationConfig(best_mode="least"), "evaluation.best_mode='least' is neither"),
    ],
)
def test_settings_that_cannot_be_meant(record: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        record()


def test_a_changed_shape_is_warned_of(make) -> None:
    trainer = make(training={"checkpoint_every": 0}, evaluation={"every": 0})
    loader, served = trainer.loader, []

    class Loader:
        def __next__(self) -> Any:
            served.append(next(loader))
            rows = served[-1].rows
            wider = rows._replace(prompt=np.pad(rows.prompt, ((0, 0), (0, 1))))
            return served[-1]._replace(rows=wider) if len(served) == 3 else served[-1]

        def get_state(self) -> dict[str, Any]:
            return {}

    trainer.loader = Loader()
    with pytest.warns(RecompilationWarning, match=r"after step 2 \(update\): offline_step \(1×\)"):
        trainer.run()
