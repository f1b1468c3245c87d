"""On-policy distillation: a small model learns sums from larger ones, on what it writes itself, without any reward.

    python experiments/distill_arithmetic.py
    python experiments/distill_arithmetic.py --algorithm.divergence=sampled --teacher.models=1

A character-level model is fine-tuned on a few hundred solved sums (as in grpo_arithmetic.py), two larger ones, each
with its own seed, on all that may be trained on. Then the small one samples answers, and at each of its tokens is drawn
to what the larger ones would have said: KL(policy ‖ teacher) over the whole vocabulary, averaged over the teachers.
Student and teachers are one program from prompts to update: nothing waits for the host, and no reward is asked. Whether
an answer is right is only measured (eval/accuracy), on sums that none of them was trained on.

Hardware: two CPU cores. Time: 4m19s of a core's time, most of it for the teachers and for compiling (ten minutes where
eight other processes shared the machine).
Expected (seed 0): accuracy on held-out sums from 0.442 to 0.818 after 150 steps of 96 samples, and 0.898 after 200.
Any setting is a flag: --algorithm.beta=0 --teacher.models=1 --training.steps=300; see --help.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import jax

from jaxrl_llm.algorithms.distillation.objective import Distillation
from jaxrl_llm.algorithms.optimizer import OptimizerConfig
from jaxrl_llm.cli import finish, make_trainer, parse, plain_errors, start, train
from jaxrl_llm.data.demonstrations import DemonstrationFormat
from jaxrl_llm.data.tokenizers import CharTokenizer
from jaxrl_llm.launch.demo import CONFIG as ARITHMETIC
from jaxrl_llm.launch.demo import (
    WARM_START,
    ArithmeticExperiment,
    WarmStart,
    character_model,
    exact_answer,
    fine_tune,
    problems,
    warm_start,
)
from jaxrl_llm.models.checkpoints.pretrained import load_params, save_pretrained
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sharding import make_mesh
from jaxrl_llm.training.episodes.evaluate import EvaluationConfig
from jaxrl_llm.training.episodes.scoring import RewardSum
from jaxrl_llm.training.on_policy import TrainingConfig, TrainingResult
from jaxrl_llm.training.run.resume import find_run
from jaxrl_llm.training.teachers import Teacher

PANELS = (("distillation/divergence",), ("eval/accuracy",), ("entropy",))
"""The picture of a run: what is learned, what comes of it, and what it costs."""


@dataclasses.dataclass(frozen=True)
class TeacherStage:
    """How the teachers are made."""

    models: int = 2
    """How many there are."""
    fine_tuning: WarmStart = WarmStart(demonstrations=2001, steps=600)
    """Of each."""

    def __post_init__(self) -> None:
        """Rejects a stage that makes none."""
        if self.models < 1:
            raise ValueError(f"teacher.models={self.models} must be at least 1")


@dataclasses.dataclass(frozen=True)
class DistilledArithmetic(ArithmeticExperiment):
    """The sums of grpo_arithmetic.py, learned from models that can add."""

    teacher: TeacherStage = TeacherStage()
    """The stage before distillation."""


CONFIG = DistilledArithmetic(
    name="distill_arithmetic",
    rewards=(),  # nothing is rewarded
    algorithm=Distillation(),
    data=ARITHMETIC.data,
    sampling=ARITHMETIC.sampling,
    training=TrainingConfig(
        steps=200, prompts_per_step=48, samples_per_prompt=2, checkpoint_every=100, samples_every=100
    ),
    optimizer=OptimizerConfig(learning_rate=1e-3, schedule="linear", warmup_steps=10, b2=0.98),
    evaluation=EvaluationConfig(every=50, max_prompts=500),
)


def larger_model(tokenizer: CharTokenizer) -> Transformer:
    """A teacher: a third wider than the student."""
    width = {"embed_dim": 128, "mlp_dim": 384, "num_heads": 4, "num_kv_heads": 4}
    return Transformer(dataclasses.replace(character_model(tokenizer).config, **width))


def make_teachers(config: DistilledArithmetic, tokenizer: CharTokenizer, mesh: jax.sharding.Mesh) -> list[Teacher]:
    """Models fine-tuned on solved sums; a run that goes on reads them from its folder."""
    model, run_dir, stage = larger_model(tokenizer), Path(config.run_dir or ""), config.teacher.fine_tuning
    goes_on = find_run(run_dir, config.settings(), resume=config.resume)
    shown = DemonstrationFormat(completion_column="answer").dataset(
        problems(config)[0][: stage.demonstrations],
        tokenizer,
        max_prompt_length=config.data.max_prompt_length,
        max_completion_length=config.sampling.max_tokens,
    )
    teachers = []
    for number in range(config.teacher.models):
        name, seed = f"teacher_{number}", config.seed + 1 + number
        if goes_on:
            params = load_params(run_dir / name, model, model.shardings(mesh))
        else:
            params = fine_tune(stage, model, shown, mesh, seed=seed)
        teachers.append(Teacher(name, model, params, tokenizer))
    return teachers


def main(args: list[str] | None = None) -> TrainingResult:
    """Runs the experiment."""
    config = start(parse(CONFIG, args, description=__doc__ or ""))
    began = time.perf_counter()
    with plain_errors():
        mesh, tokenizer = make_mesh(config.mesh), CharTokenizer("0123456789+=")
        policy, teachers = warm_start(config, tokenizer, mesh), make_teachers(config, tokenizer, mesh)
        train_rows, eval_rows = problems(config)
        trainer = make_trainer(
            config,
            policy,
            mesh,
            train_rows=train_rows,
            eval_rows=eval_rows,
            eval_rewards=RewardSum((exact_answer,)),
            teachers=teachers,
        )
        if trainer.saved is None:
            folder = trainer.setup.folder
            save_pretrained(folder / WARM_START, policy.model, policy.params, tokenizer=tokenizer, overwrite=True)
            for teacher in teachers:
                model, params = teacher.model, teacher.params
                save_pretrained(folder / teacher.name, model, params, tokenizer=tokenizer, overwrite=True)
    result = train(trainer)
    finish(config, policy, result, seconds=time.perf_counter() - began, panels=PANELS)
    return result


if __name__ == "__main__":
    main()
