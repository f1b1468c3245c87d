"""STaR's loop: what is kept and trained on, and that a run which was killed between phases ends bit-equal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest

from jaxrl_llm.algorithms.optimizer import OptimizerConfig
from jaxrl_llm.data.formats import PromptFormat
from jaxrl_llm.data.prompts import PromptDataset
from jaxrl_llm.data.tokenizers import CharTokenizer
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import make_mesh
from jaxrl_llm.training.episodes.evaluate import EvaluationConfig
from jaxrl_llm.training.episodes.scoring import RewardSum
from jaxrl_llm.training.run.errors import RunError
from jaxrl_llm.training.run.metrics import comparable_metrics
from jaxrl_llm.training.run.setup import RunSetup
from jaxrl_llm.training.star.rationales import Rationales, kept_rationales
from jaxrl_llm.training.star.trainer import StarConfig, StarTrainer

TOKENIZER = CharTokenizer("0123456789+=()")
ROWS = [{"prompt": f"{n}+1=", "hinted": f"{n}+1({n + 1})=", "answer": str(n + 1)} for n in range(8)]
Folder = Path


def low_digit(completions: list[str], **columns: Any) -> list[float]:
    """Not hard: something a random model writes now and then."""
    return [float(text[:1] in "01234567" and text != "") for text in completions]


def prompts(column: str, rows: list[dict[str, str]] = ROWS) -> PromptDataset:
    return PromptDataset(rows, TOKENIZER, max_prompt_length=8, prompt_format=PromptFormat(prompt_column=column))


@pytest.fixture(scope="module")
def make(tiny_config):
    """A trainer of a random model, all settings open to change."""
    model = Transformer(tiny_config(vocab_size=len(TOKENIZER), num_layers=1))
    params = jax.jit(model.init)(jax.random.key(0))
    mesh = make_mesh(devices=jax.devices()[:1])

    def trainer(run_dir: Path, *, star: StarConfig, resume: bool = False, **changes: Any) -> StarTrainer:
        settings: dict[str, Any] = {
            "problems": prompts("prompt"),
            "hinted": prompts("hinted"),
            "eval_problems": prompts("prompt", ROWS[:3]),
            "evaluation": EvaluationConfig(every=1),
            "optimizer": OptimizerConfig(learning_rate=1e-3),
            "sampling": SamplingConfig(max_tokens=5, temperature=1.0),
            "rewards": RewardSum((low_digit,)),
        }
        return StarTrainer(
            model=model,
            params=jax.tree.map(lambda leaf: leaf.copy(), params),
            tokenizer=TOKENIZER,
            stop_tokens=(TOKENIZER.eos_token_id,),
            setup=RunSetup(run_dir, mesh, resume=resume, settings={"growth": star.growth}),
            star=star,
            **settings | changes,
        )

    return trainer


SMALL = StarConfig(iterations=2, start_steps=3, growth=2, rows_per_step=4, problems_per_batch=3, samples=2)


@pytest.fixture(scope="module")
def whole(make, tmp_path_factory) -> tuple[Path, Any]:
    """A run in one piece: its folder and what it returned."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, make(folder, star=SMALL).run()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_iteration_leaves_what_it_did(whole):
    folder, result = whole
    metrics = comparable_metrics(folder / "metrics.jsonl")
    trained = [line for line in metrics if "star/kept" in line]
    assert [line["star/steps"] for line in trained] == [3, 6] and result.step == 2
    assert [line["step"] for line in metrics] == [0, 1, 1, 2, 2]
    for line in trained:
        phases = folder / "iterations" / f"{line['step']:03d}"
        first, again, kept = (lines(phases / f"{name}.jsonl") for name in ("generated", "rationalized", "kept"))
        assert [record["item"] for record in first] == list(np.repeat(np.arange(8), 2))
        solved = {record["item"] for record in first if record["correct"]}
        assert {record["item"] for record in again} == set(range(8)) - solved
        assert line["accuracy"] == len(solved) / 8 and line["star/kept"] == len(kept)
        right = {(r["item"], tuple(r["ids"])) for r in (*first, *again) if r["correct"]}
        assert {(r["item"], tuple(r["ids"])) for r in kept} == right and len(right) == len(kept)
        assert all(record["ids"][-1] == TOKENIZER.eos_token_id for record in kept)
        assert all(record["rationalized"] == (record["item"] not in solved) for record in kept)
        assert line["star/rationalized"] == sum(record["rationalized"] for record in kept)
    assert any(line["star/rationalized"] for line in trained)


@pytest.mark.parametrize(
    ("phase", "step"), [pytest.param("_train", 1, marks=pytest.mark.slow), ("_keep", 2), ("_sample", 2)]
)
def test_a_killed_run_ends_bit_equal(phase, step, whole, make, tmp_path, monkeypatch):
    """Killed at the start of a phase of an iteration; phases before it are not done again."""
    run_dir = tmp_path / "run"
    dying, done = make(run_dir, star=SMALL), getattr(StarTrainer, phase)

    def die(self: StarTrainer, *args: Any) -> Any:
        second_sampling = phase != "_sample" or args[0] is self.hinted
        if self.state.step == step - 1 and second_sampling:
            raise KeyboardInterrupt
        return done(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(StarTrainer, phase, die)
        with pytest.raises(KeyboardInterrupt):
            dying.run()
    with pytest.raises(ValueError, match="go on with --resume"):
        make(run_dir, star=SMALL)
    resumed, sampled = make(run_dir, star=SMALL, resume=True), []
    sample = StarTrainer._sample

    def count(self: StarTrainer, *args: Any) -> Any:
        sampled.append(args[2])
        return sample(self, *args)

    monkeypatch.setattr(StarTrainer, "_sample", count)
    result = resumed.run()
    folder, expected = whole
    chex.assert_trees_all_equal(result.params, expected.params)
    assert comparable_metrics(run_dir / "metrics.jsonl") == comparable_metrics(folder / "metrics.jsonl")
    assert sampled == {"_train": [(2, 0), (2, 1)], "_keep": [], "_sample": [(2, 1)]}[phase]


def test_other_settings_or_problems_are_not_gone_on_with(whole, make, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(whole[0], run_dir)
    shutil.rmtree(run_dir / "checkpoints")  # as if killed in the first iteration
    with pytest.raises(ValueError, match="other settings or problems: problems differ"):
        fewer = {"problems": prompts("prompt", ROWS[:4]), "hinted": prompts("hinted", ROWS[:4])}
        make(run_dir, star=SMALL, resume=True, **fewer)
    with pytest.raises(ValueError, match="other settings or problems: growth differ"):
        make(run_dir, star=StarConfig(growth=3), resume=True)


def test_each_iteration_starts_from_the_base(whole, make, tmp_path):
    """Without a learning rate nothing moves, and the second iteration's moments are fresh."""
    still = make(tmp_path / "still", star=SMALL, optimizer=OptimizerConfig(learning_rate=0))
    base = jax.device_get(still.state.params)
    chex.assert_trees_all_equal(still.run().params, base)

    trainer = make(tmp_path / "moved", star=SMALL)
    record = {"item": 0, "ids": [5, 1], "completion": "3", "reward": 1.0, "correct": True, "rationalized": False}
    trainer._train([record] * 4, 1)
    once = jax.device_get(trainer.state.params)
    trainer._train([record] * 4, 1)
    chex.assert_trees_all_equal(trainer.state.params, once)


def test_hints_are_removed_unless_they_are_to_be_shown():
    kept = [
        {"item": 2, "ids": [5, 1], "rationalized": True},
        {"item": 3, "ids": [6, 7, 1], "rationalized": False},
    ]
    problems, hinted = prompts("prompt"), prompts("hinted")

    def texts(rows: Any) -> list[str]:
        return [TOKENIZER.decode(row[:length]) for row, length in zip(rows.prompt, rows.prompt_lengths, strict=True)]

    plain = Rationales(kept, problems, None, 4).batch([0, 1])
    assert texts(plain) == ["2+1=", "3+1="]
    assert plain.mask.tolist() == [[[True, True, False, False]], [[True, True, True, False]]]
    assert plain.completion[1, 0].tolist() == [6, 7, 1, 0]
    assert texts(Rationales(kept, problems, hinted, 4).batch([0, 1])) == ["2+1(3)=", "3+1="]


def test_equal_rationales_of_a_problem_count_once():
    first = [
        {"item": item, "ids": [5, 1], "correct": correct}
        for item, correct in zip(np.repeat(np.arange(8), 2), [1, 1, 1, 0] + [0] * 12, strict=True)
    ]
    again = [{"item": 7, "ids": [ids, 1], "correct": True} for ids in (3, 4)]
    kept = kept_rationales(first, again, samples=2, dedup=True)
    assert [(record["item"], record["ids"][0], record["rationalized"]) for record in kept] == [
        (0, 5, False),
        (1, 5, False),
        (7, 3, True),
        (7, 4, True),
    ]
    assert len(kept_rationales(first, again, samples=2, dedup=False)) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": SamplingConfig(max_tokens=5, temperature=0)}, "star.samples=2 would all be equal"),
        ({"optimizer": OptimizerConfig(schedule="linear")}, "so it must be constant"),
        ({"hinted": None}, "star.rationalize needs prompts with the answer as a hint"),
        ({"hinted": prompts("hinted", ROWS[:5])}, "must be of the same rows and width"),
        ({"eval_problems": None}, "there are no held-out prompts"),
        ({"evaluation": EvaluationConfig(solved_by="high")}, "solved_by='high' is no reward function; there are low"),
    ],
    ids=["greedy", "schedule", "no hints", "other rows", "no evaluation", "solved by nothing"],
)
def test_what_does_not_fit_raises(changes, message, make, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "run", star=SMALL, **changes)
    assert not (tmp_path / "run").exists()


def test_settings_that_cannot_be_meant_raise():
    for field in ("iterations", "start_steps", "growth", "rows_per_step", "problems_per_batch", "samples"):
        with pytest.raises(ValueError, match=rf"star\.{field}=0 must be at least 1"):
            StarConfig(**{field: 0})
    with pytest.raises(ValueError, match="no hint to show"):
        StarConfig(rationalize=False, hint_in_train=True)


def test_a_model_that_solves_nothing_says_so(make, tmp_path):
    def never(completions: list[str], **columns: Any) -> list[float]:
        return [0.0] * len(completions)

    trainer = make(tmp_path / "run", star=SMALL, evaluation=EvaluationConfig())
    trainer.rewards, trainer.solved_by = RewardSum((never,)), "never"
    with pytest.raises(RunError, match="none of 8 problems was solved"):
        trainer.run()


def right_digit(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    return [float(text[:1] == right) for text, right in zip(completions, answer, strict=True)]


@pytest.mark.whole_run
@pytest.mark.parametrize("keeps", ["right", "wrong"])
def test_what_is_kept_is_what_is_learned(keeps, make, tmp_path, monkeypatch):
    """A random model finds the answers among its samples; trained on the others, it does not."""

    def keep_wrong(self: StarTrainer, first: list[Any], hinted: list[Any]) -> list[Any]:
        swapped = [record | {"correct": not record["correct"]} for record in first]
        return kept_rationales(swapped, [], samples=self.star.samples, dedup=False)

    if keeps == "wrong":
        monkeypatch.setattr(StarTrainer, "_keep", keep_wrong)
    star = StarConfig(iterations=2, start_steps=60, samples=256, problems_per_batch=8, rationalize=False)
    changes = {"optimizer": OptimizerConfig(learning_rate=1e-2), "sampling": SamplingConfig(max_tokens=3)}
    trainer = make(tmp_path, star=star, rewards=RewardSum((right_digit,)), evaluation=EvaluationConfig(), **changes)
    trainer.run()
    rewards = [line["reward"] for line in lines(tmp_path / "metrics.jsonl") if "reward" in line]
    assert rewards[0] < 0.1
    assert rewards[-1] > 0.5 if keeps == "right" else rewards[-1] < 0.1
