"""GRPO from nothing: sums, a small character-level model that learns them, and the run of it. The demo, and a bench.

A small transformer is first fine-tuned on a few hundred solved sums, until it gets some of the rest right. Then GRPO
with a verifiable reward (the sum is right or it is not) takes over: no more solutions are shown. Other experiments on
sums take their task, model and warm start from here.
"""

from __future__ import annotations

import dataclasses
import math
import random
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrl_llm.algorithms.offline import make_offline_step
from jaxrl_llm.algorithms.optimizer import OptimizerConfig, make_optimizer, make_schedule
from jaxrl_llm.algorithms.policy_gradient.objective import PolicyGradient
from jaxrl_llm.algorithms.state import make_train_state
from jaxrl_llm.algorithms.supervised import SupervisedObjective
from jaxrl_llm.config import DataConfig, Experiment, ModelSource
from jaxrl_llm.data.demonstrations import DemonstrationFormat
from jaxrl_llm.data.rows import RowDataset
from jaxrl_llm.data.tokenizers import CharTokenizer
from jaxrl_llm.launch.errors import plain_errors, train
from jaxrl_llm.launch.flags import program
from jaxrl_llm.launch.folder import start
from jaxrl_llm.launch.loading import Policy
from jaxrl_llm.launch.on_policy import make_trainer, parse
from jaxrl_llm.launch.summary import finish
from jaxrl_llm.models.checkpoints.pretrained import load_params, save_pretrained
from jaxrl_llm.models.config import ModelConfig, Params
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.models.unrolling import compiler_options
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import make_mesh
from jaxrl_llm.training.episodes.evaluate import EvaluationConfig
from jaxrl_llm.training.on_policy import TrainingConfig, TrainingResult
from jaxrl_llm.training.run.distributed import is_main_process
from jaxrl_llm.training.run.resume import find_run

Row = dict[str, str]

WARM_START = "warm_start"
"""Folder of the fine-tuned model, in the run's own."""


def exact_answer(prompts: list[Any], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """1 if the completion is the sum and nothing else, else 0."""
    return [float(completion == right) for completion, right in zip(completions, answer, strict=True)]


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """Supervised fine-tuning before reinforcement learning."""

    demonstrations: int = 300
    """Solved problems that are shown."""
    steps: int = 200
    """Optimizer steps."""
    batch_size: int = 128
    """Demonstrations per step."""
    learning_rate: float = 2e-3
    """Peak of a cosine schedule."""

    def __post_init__(self) -> None:
        """Rejects what shows nothing."""
        for field in ("demonstrations", "steps", "batch_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"warm_start.{field}={getattr(self, field)} must be at least 1")
        if not 0 <= self.learning_rate < math.inf:
            raise ValueError(f"warm_start.learning_rate={self.learning_rate} must be finite and not negative")


@dataclasses.dataclass(frozen=True)
class ArithmeticExperiment(Experiment):
    """An `Experiment` on generated sums with a model made here."""

    largest: int = 49
    """Largest summand."""
    held_out: int = 500
    """Problems kept for evaluation."""
    warm_start: WarmStart = WarmStart()
    """Supervised fine-tuning before reinforcement learning."""

    def __post_init__(self) -> None:
        """Rejects sums that do not fit, and settings that would have no effect here."""
        if self.largest < 1:
            raise ValueError(f"largest={self.largest} must be at least 1")
        sums = (self.largest + 1) ** 2
        if not 1 <= self.held_out < sums:
            raise ValueError(
                f"held_out={self.held_out} must be between 1 and {sums - 1}, since there are {sums} sums up to "
                f"largest={self.largest} and some are to train on: hold out fewer, or raise largest"
            )
        for field, value, least in (
            ("data.max_prompt_length", self.data.max_prompt_length, len(f"{self.largest}+{self.largest}=")),
            ("sampling.max_tokens", self.sampling.max_tokens, len(str(2 * self.largest)) + 1),  # one ends it
        ):
            if value < least:
                raise ValueError(f"{field}={value} must be at least {least} for sums up to largest={self.largest}")
        idle = [name for name, value in vars(self.model).items() if value != getattr(ModelSource(), name)]
        idle = [f"model.{name}" for name in idle] + [f"data.{n}" for n in ("train", "eval") if getattr(self.data, n)]
        if idle:
            raise ValueError(
                f"{', '.join(idle)} would have no effect: this experiment makes its own model and its own sums. "
                "Leave it out, or use jaxrl-llm grpo"
            )


CONFIG = ArithmeticExperiment(
    name="grpo_arithmetic",
    rewards=(exact_answer,),
    algorithm=PolicyGradient(),
    data=DataConfig(max_prompt_length=6),
    sampling=SamplingConfig(max_tokens=4),
    training=TrainingConfig(
        steps=840, prompts_per_step=48, samples_per_prompt=8, checkpoint_every=200, samples_every=200
    ),
    optimizer=OptimizerConfig(learning_rate=5e-4, schedule="linear", warmup_steps=30, b2=0.98),
    evaluation=EvaluationConfig(every=50, max_prompts=500),
)


def problems(config: ArithmeticExperiment) -> tuple[list[Row], list[Row]]:
    """All sums in random order: those to train on, and those held out."""
    numbers = range(config.largest + 1)
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in numbers for b in numbers]
    random.Random(config.seed).shuffle(rows)
    return rows[config.held_out :], rows[: config.held_out]


def character_model(tokenizer: CharTokenizer) -> Transformer:
    """The small transformer of all experiments on sums."""
    return Transformer(
        ModelConfig(
            vocab_size=len(tokenizer),
            embed_dim=96,
            mlp_dim=288,
            num_layers=3,
            num_heads=3,
            num_kv_heads=3,
            head_dim=32,
            max_position_embeddings=64,
            tie_embeddings=True,
            scan_layers=False,
            remat="none",
        )
    )


def warm_start(config: ArithmeticExperiment, tokenizer: CharTokenizer, mesh: jax.sharding.Mesh) -> Policy:
    """A new model, fine-tuned on the first training problems; a run that goes on reads it from its folder."""
    model = character_model(tokenizer)
    run_dir = Path(config.run_dir or "")
    if find_run(run_dir, config.settings(), resume=config.resume):
        shardings = model.shardings(mesh)
        params = load_params(run_dir / WARM_START, model, shardings)
    else:
        shown = DemonstrationFormat(completion_column="answer").dataset(
            problems(config)[0][: config.warm_start.demonstrations],
            tokenizer,
            max_prompt_length=config.data.max_prompt_length,
            max_completion_length=config.sampling.max_tokens,
        )
        params = fine_tune(config.warm_start, model, shown, mesh, seed=config.seed)
    return Policy(model, params, tokenizer, (tokenizer.eos_token_id,))


def fine_tune(
    settings: WarmStart, model: Transformer, shown: RowDataset, mesh: jax.sharding.Mesh, *, seed: int
) -> Params:
    """Parameters of a new model after supervised steps on solved problems."""
    adam = OptimizerConfig(learning_rate=settings.learning_rate, schedule="cosine", warmup_steps=settings.steps // 10)
    optimizer = make_optimizer(adam, make_schedule(adam, settings.steps))
    shardings = model.shardings(mesh)
    order = np.random.default_rng(seed)
    if is_main_process():
        print(f"warm start: {settings.steps} steps on {len(shown)} problems …", flush=True)
    with jax.set_mesh(mesh):
        params = jax.jit(model.init, out_shardings=shardings)(jax.random.key(seed))
        state = jax.jit(lambda p: make_train_state(p, optimizer, seed))(params)
        step = make_offline_step(model, optimizer, SupervisedObjective())
        step = jax.jit(step, donate_argnums=0, compiler_options=compiler_options(model.config, mesh))
        metrics = {}
        for _ in range(settings.steps):
            state, metrics = step(state, shown.batch(order.integers(len(shown), size=settings.batch_size)))
    if is_main_process():
        print(f"warm start: nll {float(metrics['nll']):.3f}")
    return state.params


def run_demo(
    args: list[str] | None = None, *, config: ArithmeticExperiment = CONFIG, description: str = ""
) -> TrainingResult:
    """Runs it.

    Args:
        args: the command line; `None`: the program's own.
        config: other settings, of another algorithm for instance.
        description: for `--help`.
    """
    config = start(parse(config, args, description=description))
    began = time.perf_counter()
    with plain_errors():
        mesh = make_mesh(config.mesh)
        policy = warm_start(config, CharTokenizer("0123456789+="), mesh)
        train_rows, eval_rows = problems(config)
        trainer = make_trainer(config, policy, mesh, train_rows=train_rows, eval_rows=eval_rows)
        if trainer.saved is None:
            folder = trainer.setup.folder / WARM_START
            save_pretrained(folder, policy.model, policy.params, tokenizer=policy.tokenizer, overwrite=True)
    result = train(trainer)
    next_steps = (
        f"harder sums:        {program()} --largest=99 --training.steps=1600",
        f"another objective:  {program()} --preset=gspo",
        "a language model:   jaxrl-llm grpo --model=<checkpoint> --data=<rows.jsonl> --rewards <file.py:function>",
    )
    finish(config, policy, result, seconds=time.perf_counter() - began, next_steps=next_steps)
    return result
