"""All on-policy algorithms on one task, from one warm start, with several seeds: a table and a figure.

    python experiments/compare_algorithms.py
    python experiments/compare_algorithms.py --presets grpo gspo ppo --seeds=3 --training.steps=200

The task is that of grpo_arithmetic.py: sums, with a reward of 1 for the right answer. Every algorithm trains the same
fine-tuned model on the same number of samples with the same optimizer, four steps on each batch (two epochs of two
minibatches), so that the ratios of the policies are not 1 and clipping has something to do. Nothing is tuned for any of
them: the learning rate, which suits one better than another, is part of what is compared.

Hardware: two CPU cores. Time: 20 to 45 seconds a run, compilation included.
Expected: not yet run in whole. Accuracy on held-out sums, from 0.442: dapo 0.784, ppo 0.782, grpo 0.756, dr_grpo 0.746,
rloo 0.610 (--presets dapo ppo grpo dr_grpo rloo --seeds=1).
A comparison that was cut off goes on with --run-dir=FOLDER --resume: finished runs are not repeated.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from grpo_arithmetic import CONFIG as ARITHMETIC
from grpo_arithmetic import ArithmeticExperiment, problems, warm_start

from jaxrl_llm.algorithms.batching import UpdateConfig
from jaxrl_llm.algorithms.optimizer import OptimizerConfig
from jaxrl_llm.algorithms.presets import PRESETS
from jaxrl_llm.cli import Policy, make_trainer, parse, plain_errors, start, train
from jaxrl_llm.data.tokenizers import CharTokenizer
from jaxrl_llm.sharding import make_mesh
from jaxrl_llm.training.evaluate import EvaluationConfig
from jaxrl_llm.training.formatting import duration
from jaxrl_llm.training.metrics import METRICS_FILE, read_metrics
from jaxrl_llm.training.trainer import CriticSource, TrainingConfig

NAMES = tuple(preset.__name__ for preset in PRESETS)
FAMILIES = {
    "one sample at a time": ("reinforce", "remax", "reinforce_plus_plus", "ppo"),
    "advantages of a group": ("rloo", "reinforce_plus_plus_baseline", "opo", "gpg", "grpo", "dr_grpo", "lite_ppo"),
    "other surrogates": ("dapo", "sapo", "cispo", "gmpo", "gspo", "gspo_token", "luspo", "vespo"),
    "shaped, filtered, judged": ("gtpo", "grpo_s", "ha_dw", "gfpo", "gdpo", "pass_at_k", "brpo", "grpo_threshold"),
    "entropy looked after": ("clip_cov", "kl_cov"),
}
"""Rows of the figure."""
PANELS = {"reward": "reward", "entropy": "entropy", "completions/mean_length": "length"}
"""Columns of the figure, beside the reward over time."""
RESULT, TABLE, FIGURE, ALL_RUNS = "result.json", "table.md", "figure.png", "runs.json"


@dataclasses.dataclass(frozen=True)
class Comparison(ArithmeticExperiment):
    """An arithmetic experiment, run with many algorithms."""

    presets: tuple[str, ...] = NAMES
    """Which of `jaxrl_llm.algorithms.presets`."""
    seeds: int = 2
    """Runs of each; the warm start is the same for all."""

    def __post_init__(self) -> None:
        """Rejects unknown names, and no run at all."""
        super().__post_init__()
        unknown = [name for name in self.presets if name not in NAMES]
        if unknown or not self.presets:
            raise ValueError(f"presets={unknown or self.presets} must be some of {', '.join(NAMES)}")
        if self.seeds < 1:
            raise ValueError(f"seeds={self.seeds} must be at least 1")


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


def run_one(config: Comparison, policy: Policy, mesh: jax.sharding.Mesh, name: str, seed: int) -> dict[str, Any]:
    """One algorithm with one seed, from the warm start; its result, which is also written to its folder."""
    folder = Path(config.run_dir or "") / f"{name}-{seed}"
    if (folder / RESULT).exists():
        return json.loads((folder / RESULT).read_text())
    preset = PRESETS[NAMES.index(name)]()
    own = dataclasses.replace(
        config, algorithm=preset, seed=seed, run_dir=str(folder), resume=False, name=f"{name}-{seed}"
    )
    train_rows, eval_rows = problems(dataclasses.replace(config, seed=0))  # the same for all
    began = time.perf_counter()
    with plain_errors():
        judge = right_beats_wrong if "verdicts" in preset.advantage.needs else None
        trainer = make_trainer(own, policy, mesh, train_rows=train_rows, eval_rows=eval_rows, judge=judge)
    done = train(trainer)
    lines = [line for line in read_metrics(folder / METRICS_FILE) if "reward" in line]
    last = lines[-max(1, len(lines) // 10) :]
    result = {
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
    if done.stopped is None:
        (folder / RESULT).write_text(json.dumps(result, indent=2) + "\n")
    return result


def table(results: list[dict[str, Any]]) -> str:
    """Means over seeds as Markdown, the best accuracy first; behind an accuracy its range."""
    rows = []
    for name in dict.fromkeys(result["preset"] for result in results):
        runs = [result for result in results if result["preset"] == name]
        mean = {key: float(np.mean([run[key] for run in runs])) for key in ("accuracy", *_COLUMNS)}
        spread = sorted(run["accuracy"] for run in runs)
        cells = [
            f"{mean['accuracy']:.3f} ({spread[0]:.3f}–{spread[-1]:.3f})",
            *(f"{mean[key]:.3g}" for key in _COLUMNS),
        ]
        rows.append((mean["accuracy"], f"| `{name}` | {' | '.join(cells)} |"))
    head = f"| preset | accuracy | {' | '.join(_COLUMNS)} |\n|---|{'---|' * (len(_COLUMNS) + 1)}"
    return "\n".join([head, *(row for _, row in sorted(rows, reverse=True))]) + "\n"


_COLUMNS = ("reward", "entropy", "length", "seconds a step")


def draw(config: Comparison, path: Path) -> None:
    """Draws reward over samples and over time, entropy and length: a row a family, means over the seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    families = {name: [p for p in members if p in config.presets] for name, members in FAMILIES.items()}
    families = {name: members for name, members in families.items() if members}
    figure = Figure(figsize=(17, 3.4 * len(families)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(families), len(PANELS) + 1, squeeze=False)
    samples = config.training.prompts_per_step * config.training.samples_per_prompt
    for row, (family, members) in zip(axes, families.items(), strict=True):
        for name in members:
            folders = [Path(config.run_dir or "") / f"{name}-{seed}" for seed in range(config.seeds)]
            runs = [[line for line in read_metrics(f / METRICS_FILE) if "reward" in line] for f in folders]
            length = min(len(run) for run in runs)
            seconds = np.cumsum(np.median([[line["step_time"] for line in run[:length]] for run in runs], axis=0))
            for column, metric in zip(row, [*PANELS, "reward"], strict=True):
                values = np.mean([[line[metric] for line in run[:length]] for run in runs], axis=0)
                over_time = column is row[-1]
                column.plot(seconds if over_time else np.arange(1, length + 1) * samples, smooth(values), label=name)
        for column, label in zip(row, [*PANELS.values(), "reward over seconds"], strict=True):
            column.set_title(label, fontsize=10)
            column.grid(alpha=0.25, linewidth=0.6)
            column.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(family)
        row[0].legend(frameon=False, fontsize=8)
        row[0].set_xlabel("samples")
        row[-1].set_xlabel("seconds, without the first step's compilation" if row is axes[-1] else "seconds")
    figure.savefig(path, dpi=110)


def smooth(values: np.ndarray, window: int = 5) -> np.ndarray:
    """The mean of each value with those before it."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def main(args: list[str] | None = None) -> list[dict[str, Any]]:
    """Runs the comparison."""
    config = parse(CONFIG, args, description=__doc__ or "")
    resumed = config.resume
    config = start(dataclasses.replace(config, resume=False))
    folder = Path(config.run_dir or "")
    began = time.perf_counter()
    with plain_errors():
        settings = json.dumps(config.settings(), indent=2, sort_keys=True)
        if (folder / ALL_RUNS).exists() and (not resumed or (folder / ALL_RUNS).read_text() != settings):
            raise ValueError(
                f"{folder} holds another comparison: pass --resume with the same settings, or another folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ALL_RUNS).write_text(settings)
        mesh = make_mesh(config.mesh)
        policy = warm_start(dataclasses.replace(config, seed=0), CharTokenizer("0123456789+="), mesh)
    results = []
    for name in config.presets:
        for seed in range(config.seeds):
            result = run_one(config, policy, mesh, name, seed)
            results.append(result)
            print(
                f"{name}, seed {seed}: accuracy {result['accuracy before']:.3f} → {result['accuracy']:.3f}, "
                f"{duration(result['seconds'])}",
                flush=True,
            )
            if result["stopped"]:
                print(f"stopped ({result['stopped']}); go on with the same command and --resume --run-dir={folder}")
                return results
    (folder / TABLE).write_text(table(results))
    draw(config, folder / FIGURE)
    print(table(results))
    print(f"{len(results)} runs in {duration(time.perf_counter() - began)}; {folder / TABLE}, {folder / FIGURE}")
    return results


if __name__ == "__main__":
    main()
