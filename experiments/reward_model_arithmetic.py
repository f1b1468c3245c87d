"""A reward model from nothing: which of two sums is right, and then the best of several samples by its score.

    python experiments/reward_model_arithmetic.py

A small character-level transformer is first fine-tuned on a few hundred solved sums, so that it gets some of the rest
right. With a scalar head in place of its LM head it then learns from pairs of a right sum and a wrong one, of the
first model's own making where there is one. At the end that model writes several answers to each held-out sum, and the
reward model chooses.

Hardware: two CPU cores. Time: a minute and a half, compilation included.
Expected: accuracy on held-out pairs from 0.493 to 0.941; of samples for held-out sums 0.331 are right, of the best of
eight by score 0.488, and any of the eight is in 0.623 (seed 0).
Any setting is a flag: --objective.center-coef=0.01 --training.steps=600 --candidates=16; see --help.
"""

from __future__ import annotations

import dataclasses
import random
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrl_llm.advantages.selection import best_of_n
from jaxrl_llm.algorithms.optimizer import OptimizerConfig
from jaxrl_llm.algorithms.score_models.reward_model import RewardModelObjective, make_score_pass, make_score_statistics
from jaxrl_llm.cli import (
    OFFLINE_PANELS,
    Policy,
    finish,
    load_rows,
    make_offline_trainer,
    parse_offline,
    plain_errors,
    start,
    train,
)
from jaxrl_llm.config import OfflineDataConfig, OfflineExperiment
from jaxrl_llm.data.demonstrations import DemonstrationFormat
from jaxrl_llm.data.preferences import PreferenceFormat
from jaxrl_llm.data.prompts import PromptDataset
from jaxrl_llm.data.tokenizers import CharTokenizer
from jaxrl_llm.launch.demo import WarmStart, character_model, fine_tune
from jaxrl_llm.models.checkpoints.score_pretrained import write_statistics
from jaxrl_llm.models.heads import ScoreModel
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import make_mesh
from jaxrl_llm.training.offline import OfflineEvaluationConfig, OfflineTrainingConfig
from jaxrl_llm.training.run.distributed import is_main_process
from jaxrl_llm.training.stage import TrainingResult
from jaxrl_llm.types import Rollout

Row = dict[str, Any]

LARGEST = 49
"""Largest summand."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModelArithmetic(OfflineExperiment):
    """An `OfflineExperiment` on generated sums with a model made here."""

    held_out: int = 496
    """Sums kept for evaluation."""
    demonstrations: int = 300
    """Solved sums that are shown before."""
    warm_up_steps: int = 200
    """Supervised steps on them, of 128 sums each."""
    wrong_answers: int = 6
    """Pairs of each sum, of the right answer and a wrong one each."""
    candidates: int = 8
    """Samples of which the reward model chooses one."""


CONFIG = RewardModelArithmetic(
    name="reward_model_arithmetic",
    objective=RewardModelObjective(),
    data=OfflineDataConfig(max_prompt_length=6, max_completion_length=4, format=PreferenceFormat()),
    training=OfflineTrainingConfig(steps=1000, rows_per_step=64, checkpoint_every=0),
    optimizer=OptimizerConfig(learning_rate=1e-3, schedule="linear", warmup_steps=20, b2=0.98),
    evaluation=OfflineEvaluationConfig(every=200),
)


def problems(config: RewardModelArithmetic) -> tuple[list[Row], list[Row]]:
    """All sums in random order: those to train on, and those held out."""
    rows = [{"a": a, "b": b, "prompt": f"{a}+{b}="} for a in range(LARGEST + 1) for b in range(LARGEST + 1)]
    random.Random(config.seed).shuffle(rows)
    for row in rows:
        row["chosen"] = str(row["a"] + row["b"])
    return rows[config.held_out :], rows[: config.held_out]


def pairs(rows: list[Row], samples: list[list[str]], wrong_answers: int, seed: int) -> list[Row]:
    """Each sum several times: its right answer, and wrong ones of the policy's own or, where these are few, near it."""
    rng, found = random.Random(seed), []
    for row, written in zip(rows, samples, strict=True):
        right = row["a"] + row["b"]
        near = [str(n) for n in range(max(0, right - 20), min(99, right + 20) + 1)]
        wrong = [*dict.fromkeys(written), *rng.sample(near, wrong_answers + 1)]
        chosen = [text for text in wrong if 0 < len(text) <= 3 and text != row["chosen"]][:wrong_answers]
        found += [{"prompt": row["prompt"], "chosen": row["chosen"], "rejected": text} for text in chosen]
    return found


def warm_start(config: RewardModelArithmetic, tokenizer: CharTokenizer, mesh: jax.sharding.Mesh) -> Policy:
    """A new model, fine-tuned on the first training problems."""
    model = character_model(tokenizer)
    shown = DemonstrationFormat(completion_column="chosen").dataset(
        problems(config)[0][: config.demonstrations], tokenizer, max_prompt_length=6, max_completion_length=4
    )
    params = fine_tune(WarmStart(steps=config.warm_up_steps), model, shown, mesh, seed=config.seed)
    return Policy(model, params, tokenizer, (tokenizer.eos_token_id,))


def sampled(
    config: RewardModelArithmetic, policy: Policy, rows: list[Row], mesh: jax.sharding.Mesh, step: int
) -> tuple[Rollout, list[list[str]]]:
    """Several answers of the policy to each sum."""
    sampling, stops = SamplingConfig(max_tokens=config.data.max_completion_length), policy.stop_tokens
    sampler = Sampler(policy.model, sampling, group=config.candidates, stop_tokens=stops, mesh=mesh)
    prompts = PromptDataset(rows, policy.tokenizer, max_prompt_length=6).batch(range(len(rows)))
    rollout = sampler(policy.params, prompts.tokens, prompts.lengths, np.zeros(2, np.uint32), step)
    every = zip(np.asarray(rollout.completion), np.asarray(rollout.completion_lengths), strict=True)
    return rollout, [
        [policy.tokenizer.decode(ids[:length], skip_special_tokens=True) for ids, length in zip(*group, strict=True)]
        for group in every
    ]


def best_samples(
    config: RewardModelArithmetic, policy: Policy, judge: Policy, rows: list[Row], mesh: jax.sharding.Mesh
) -> dict[str, float]:
    """How often the policy's samples are right: any one, the one with the highest score, and at least one of them."""
    rollout, texts = sampled(config, policy, rows, mesh, step=1)
    with jax.set_mesh(mesh):
        scores = np.asarray(jax.jit(make_score_pass(judge.model))(judge.params, rollout))
    right = np.array([[text == row["chosen"] for text in group] for row, group in zip(rows, texts, strict=True)])
    chosen = np.asarray(best_of_n(scores))
    return {
        "a sample": float(right.mean()),
        f"the best of {config.candidates} by score": float(right[np.arange(len(rows)), chosen].mean()),
        f"any of {config.candidates}": float(right.any(axis=1).mean()),
    }


def main(args: list[str] | None = None) -> TrainingResult:
    """Runs the experiment."""
    config = start(parse_offline(CONFIG, args, description=__doc__ or ""))
    began = time.perf_counter()
    with plain_errors():
        mesh = make_mesh(config.mesh)
        policy = warm_start(config, CharTokenizer("0123456789+="), mesh)
        training, held_out = problems(config)
        compared = [
            pairs(part, sampled(config, policy, part, mesh, step=0)[1], config.wrong_answers, config.seed)
            for part in (training, held_out)
        ]
        rows = load_rows(config, policy.tokenizer, train_rows=compared[0], eval_rows=compared[1])
        model = ScoreModel(policy.model)
        params = model.from_trunk(policy.params, jax.random.key(config.seed))
        judge = dataclasses.replace(policy, model=model, params=params)
        trainer = make_offline_trainer(config, judge, mesh, rows=rows)
    result = train(trainer)
    judge = dataclasses.replace(judge, params=result.params)
    finish(config, judge, result, seconds=time.perf_counter() - began, panels=OFFLINE_PANELS)
    if result.stopped:
        return result
    found = best_samples(config, policy, judge, held_out, mesh)
    with jax.set_mesh(mesh):
        statistics = jax.jit(make_score_statistics(model))(result.params, rows[0].batch(range(min(512, len(rows[0])))))
    if is_main_process():
        write_statistics(Path(config.run_dir or "") / "model", statistics)
        for name, share in found.items():
            print(f"right, {name:28s} {share:.3f}")
    return result


if __name__ == "__main__":
    main()
