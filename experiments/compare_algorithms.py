"""All on-policy algorithms on one task, from one warm start, with several seeds: a table and a figure.

    python experiments/compare_algorithms.py
    python experiments/compare_algorithms.py --presets grpo gspo ppo --seeds=3 --training.steps=200

The task is that of grpo_arithmetic.py: sums, with a reward of 1 for the right answer. Every algorithm trains the same
fine-tuned model on the same number of samples with the same optimizer, four steps on each batch (two epochs of two
minibatches), so that the ratios of the policies are not 1 and clipping has something to do. Those whose surrogate is a
bare log-prob (REINFORCE, ReMax, RLOO, ...), and on-line DPO, make one, as published: nothing holds them when a batch is
used again, and with four, REINFORCE ended at 0, ReMax at 0.03 and 0.28, on-line DPO at 0.36 and 0.51. Nothing is tuned
for any of them: the learning rate, which suits one better than another, is part of what is compared.

Hardware: two CPU cores. Time: 23 minutes; 11 to 36 seconds a run, TRPO's 130, compilation included.
Expected: accuracy on held-out sums from 0.442 to 0.78 (DAPO), 0.77 (PPO), 0.75 (GRPO), 0.70 (REINFORCE), 0.66 (BRPO).
docs/results/compare_algorithms.md has the table, the figure and what they show.
A comparison that was cut off goes on with --run-dir=FOLDER --resume: finished runs are not repeated.
With more presets or seeds than before, those are added.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from comparison import Curve, Result, begin, check_runs, compare, draw_families, results_table, run_folder, save_figure
from trpo_arithmetic import CONFIG as TRPO

from jaxrl_llm.algorithms.batching import UpdateConfig
from jaxrl_llm.algorithms.optimizer import OptimizerConfig
from jaxrl_llm.algorithms.policy_gradient.objective import PolicyGradient
from jaxrl_llm.algorithms.policy_gradient.presets import PRESETS
from jaxrl_llm.cli import Policy, make_trainer, plain_errors, train
from jaxrl_llm.data.tokenizers import CharTokenizer
from jaxrl_llm.launch.demo import CONFIG as ARITHMETIC
from jaxrl_llm.launch.demo import ArithmeticExperiment, problems, warm_start
from jaxrl_llm.launch.flags import read_flags
from jaxrl_llm.sharding import make_mesh
from jaxrl_llm.training.episodes.evaluate import EvaluationConfig
from jaxrl_llm.training.learner import CriticSource
from jaxrl_llm.training.on_policy import TrainingConfig
from jaxrl_llm.training.run.metrics import METRICS_FILE, read_metrics

ALGORITHMS = {preset.__name__: preset() for preset in PRESETS} | {"trpo": TRPO.algorithm}
NAMES = tuple(ALGORITHMS)
FAMILIES = {
    "one sample at a time": ("reinforce", "remax", "reinforce_plus_plus", "a_star_po", "ppo", "trpo"),
    "advantages of a group": (
        "rloo",
        "reinforce_plus_plus_baseline",
        "opo",
        "gpg",
        "grpo",
        "dr_grpo",
        "lite_ppo",
        "max_rl",
    ),
    "other surrogates": ("dapo", "sapo", "cispo", "gmpo", "gspo", "gspo_token", "luspo", "vespo", "dppo_log2"),
    "shaped, filtered, judged": ("gtpo", "grpo_s", "ha_dw", "gfpo", "gdpo", "pass_at_k", "brpo", "grpo_threshold"),
    "entropy looked after; pairs": ("clip_cov", "kl_cov", "online_dpo"),
}
"""Rows of the figure."""
PANELS = {"reward": "reward", "entropy": "entropy", "completions/mean_length": "length"}
"""Columns of the figure, beside the reward over time."""


@dataclasses.dataclass(frozen=True)
class Comparison(ArithmeticExperiment):
    """An arithmetic experiment, run with many algorithms."""

    presets: tuple[str, ...] = NAMES
    """Which of `jaxrl_llm.algorithms.policy_gradient.presets`, or trpo."""
    seeds: int = 2
    """Runs of each; the warm start is the same for all."""

    def __post_init__(self) -> None:
        """Rejects unknown names, and no run at all."""
        super().__post_init__()
        check_runs(self.presets, self.seeds, NAMES)

    @property
    def without_effect(self) -> dict[str, str]:
        """What the presets decide as well."""
        return super().without_effect | {"algorithm": "each preset is an algorithm, with its own settings"}


CONFIG = Comparison(
    name="compare_algorithms",
    rewards=ARITHMETIC.rewards,
    data=ARITHMETIC.data,
    sampling=ARITHMETIC.sampling,
    training=TrainingConfig(steps=100, prompts_per_step=48, samples_per_prompt=8, checkpoint_every=0, samples_every=0),
    update=UpdateConfig(epochs=2, minibatches=2),
    optimizer=OptimizerConfig(learning_rate=3e-4, schedule="linear", warmup_steps=20, b2=0.98),
    critic=CriticSource(optimizer=OptimizerConfig(learning_rate=1e-3)),
    evaluation=EvaluationConfig(every=50, max_prompts=500),
)


def right_beats_wrong(
    *, prompts: list[Any], first: list[str], second: list[str], columns: dict[str, list[Any]]
) -> list[bool]:
    """The judge of BRPO: a right sum is better than a wrong one, and any two alike are a tie."""
    return [a == right != b for a, b, right in zip(first, second, columns["answer"], strict=True)]


def run_one(config: Comparison, policy: Policy, mesh: jax.sharding.Mesh, name: str, seed: int) -> Result:
    """One algorithm with one seed, from the warm start."""
    folder = run_folder(config, name, seed)
    algorithm = ALGORITHMS[name]
    clips = isinstance(algorithm, PolicyGradient) and not algorithm.surrogate.on_policy
    own = dataclasses.replace(
        config,
        algorithm=algorithm,
        critic=config.critic if algorithm.needs_critic else CriticSource(),
        trust_region=TRPO.trust_region if name == "trpo" else None,
        update=config.update if clips and name != "trpo" else UpdateConfig(),
        seed=seed,
        run_dir=str(folder),
        name=f"{name}-{seed}",
    )
    train_rows, eval_rows = problems(dataclasses.replace(config, seed=0))  # the same for all
    began = time.perf_counter()
    with plain_errors():
        trainer = make_trainer(
            own,
            policy,
            mesh,
            train_rows=train_rows,
            eval_rows=eval_rows,
            judge=right_beats_wrong if "verdicts" in algorithm.needs else None,
        )
    done = train(trainer)
    lines = [line for line in read_metrics(folder / METRICS_FILE) if "reward" in line]
    last = lines[-max(1, len(lines) // 10) :]
    return {
        "preset": name,
        "seed": seed,
        "accuracy before": done.first_evaluation["eval/accuracy"],
        "accuracy": done.last_evaluation["eval/accuracy"],
        "reward": float(np.mean([line["reward"] for line in last])),
        "entropy": float(np.mean([line["entropy"] for line in last])),
        "length": float(np.mean([line["completions/mean_length"] for line in last])),
        "seconds a step": float(np.median([line["step_time"] for line in lines[1:] or lines])),
        "stopped": done.stopped,
        "seconds": time.perf_counter() - began,
    }


def table(results: list[Result]) -> str:
    """Means over seeds as Markdown, the best accuracy first; behind an accuracy its range."""
    return results_table(results, ranged=("accuracy",), columns=("reward", "entropy", "length", "seconds a step"))


def draw(config: Comparison, path: Path) -> None:
    """Draws reward over samples and over time, entropy and length: a row a family, means over the seeds."""
    samples = config.training.prompts_per_step * config.training.samples_per_prompt

    def curves(name: str) -> list[Curve]:
        folders = [run_folder(config, name, seed) for seed in range(config.seeds)]
        runs = [[line for line in read_metrics(f / METRICS_FILE) if "reward" in line] for f in folders]
        length = min(len(run) for run in runs)
        seconds = np.cumsum(np.median([[line["step_time"] for line in run[:length]] for run in runs], axis=0))
        values = {m: smooth(np.mean([[line[m] for line in run[:length]] for run in runs], axis=0)) for m in PANELS}
        over_samples = [(np.arange(1, length + 1) * samples, values[metric]) for metric in PANELS]
        return [*over_samples, (seconds, values["reward"])]

    figure, axes = draw_families(FAMILIES, config.presets, [*PANELS.values(), "reward over seconds"], curves)
    for row in axes:
        row[0].set_xlabel("samples")
        row[-1].set_xlabel("seconds, without the first step's compilation" if row is axes[-1] else "seconds")
    save_figure(figure, path, dpi=110)


def smooth(values: np.ndarray, window: int = 5) -> np.ndarray:
    """The mean of each value with those before it."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def main(args: list[str] | None = None) -> list[Result]:
    """Runs the comparison."""
    config = begin(read_flags(CONFIG, args, __doc__ or ""))
    with plain_errors():
        mesh = make_mesh(config.mesh)
        policy = warm_start(dataclasses.replace(config, seed=0), CharTokenizer("0123456789+="), mesh)
    return compare(
        config,
        lambda name, seed: run_one(config, policy, mesh, name, seed),
        table=table,
        draw=lambda path: draw(config, path),
    )


if __name__ == "__main__":
    main()
