"""All methods of preference optimisation on one set of pairs, from one warm start: a table and a figure.

    python experiments/compare_preferences.py
    python experiments/compare_preferences.py --presets dpo ipo kto --seeds=3 --training.steps=300

The pairs are those of preference_arithmetic.py: a right sum and a wrong one near it. Every method of
`jaxrl_llm.algorithms.preference.presets` trains the same fine-tuned model on the same pairs with the same optimizer,
and sees as many completions a step; to a method of single completions, a pair is two rows. A seed changes the order of
rows alone. Nothing is tuned for any of them: the settings are the presets', but for the beta of KTO and its relatives,
which is preference_arithmetic.py's; the learning rate, which suits one better than another, is part of what is
compared.

Hardware: two CPU cores. Time: 20 minutes for one seed, on cores that were busy with other work.
Expected (--seeds=1): greedy accuracy on held-out sums from 0.502 to 0.830 with orpo, 0.818 with cpo and 0.808 with rpo
and mpo, which have a likelihood term of weight 1; 0.60 to 0.67 with most others. wpo (0.548) and f_dpo (0.502) gain
little or nothing; discopop (0.220) and apo_down (0.000) do harm. See docs/results/compare_preferences.md.
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
from preference_arithmetic import CONFIG as ARITHMETIC
from preference_arithmetic import HeldOut, PreferenceArithmetic, Row, configured, problems, warm_start

from jaxrl_llm.algorithms.preference.presets import PAIRED, UNPAIRED, dpo
from jaxrl_llm.cli import Policy, parse_offline, plain_errors, run_setup, train
from jaxrl_llm.data.preferences import PreferenceFormat
from jaxrl_llm.data.rows import RowDataset
from jaxrl_llm.data.tokenizers import CharTokenizer
from jaxrl_llm.data.unpaired import UnpairedFormat
from jaxrl_llm.sharding import make_mesh
from jaxrl_llm.training.offline import OfflineEvaluationConfig, OfflineTrainer, OfflineTrainingConfig
from jaxrl_llm.training.run.metrics import METRICS_FILE, read_metrics
from jaxrl_llm.training.stage import Outcome, Phase

NAMES = (*PAIRED, *UNPAIRED)
FAMILIES = {
    "DPO and what it weighs": ("dpo", "reference_free_dpo", "length_normalized_dpo", "f_dpo", "wpo", "ld_dpo"),
    "other losses of the margin": ("cdpo", "robust_dpo", "ipo", "hinge", "exo", "discopop", "aot"),
    "each side by itself": ("nca", "aot_unpaired", "apo_zero", "apo_down", "sppo", "bco_pair"),
    "no reference, or likelihood": ("simpo", "cpo", "slic", "orpo", "rpo", "mpo"),
    "single completions": ("kto", "kto_other_side", "apo_zero_unpaired", "one_sided_dpo", "bco"),
}
"""Rows of the figure."""
HELD_OUT = {
    "accuracy": "right sums, greedily",
    "likelier": "right sum likelier than the wrong one",
    "logps/right": "log-probability of the right sum",
    "logps/wrong": "log-probability of the wrong sum",
}
"""What is the same for all methods, by the names of `HeldOut`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison(PreferenceArithmetic):
    """The experiment on pairs of sums, run with many methods."""

    presets: tuple[str, ...] = NAMES
    """Which of `jaxrl_llm.algorithms.preference.presets`."""
    seeds: int = 2
    """Runs of each; the warm start is the same for all."""
    desirable_share: float = 0.5

    def __post_init__(self) -> None:
        """Rejects unknown names, and no run at all."""
        check_runs(self.presets, self.seeds, NAMES)

    @property
    def without_effect(self) -> dict[str, str]:
        """What the presets and the pairs decide."""
        return {
            "objective": "each preset is an objective, with its own settings",
            "data": "the data are the pairs of sums",
            "desirable_share": "half of the single completions are right ones",
        }


CONFIG = Comparison(
    name="compare_preferences",
    objective=dpo(),
    data=ARITHMETIC.data,
    training=OfflineTrainingConfig(steps=120, rows_per_step=64, checkpoint_every=0),
    optimizer=ARITHMETIC.optimizer,
    evaluation=OfflineEvaluationConfig(every=30),
)


class ComparedTrainer(OfflineTrainer):
    """Measures, beside what its objective reports, what is the same for all methods."""

    held_out: HeldOut
    """To be set before it runs."""

    def evaluate(self, phase: Phase) -> Outcome:
        outcome = super().evaluate(phase)
        with phase("compare"):
            found = self.held_out(self.state.params)
        return Outcome(outcome.metrics | {f"eval/{name}": found[key] for name, key in HELD_OUT.items()})


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all runs share: compiled and tokenised once."""

    policy: Policy
    held_out: HeldOut
    pairs: tuple[RowDataset, RowDataset]
    """To train on, and held out."""
    singles: tuple[RowDataset, RowDataset]
    """The same, one completion a row."""
    mesh: jax.sharding.Mesh


def set_up(config: Comparison) -> Bench:
    """The warm start and the rows."""
    mesh = make_mesh(config.mesh)
    policy = warm_start(config, CharTokenizer("0123456789+="), mesh)
    training, held_out = problems(config)
    data = config.data

    def load(rows: list[Row], row_format: PreferenceFormat | UnpairedFormat) -> RowDataset:
        return row_format.dataset(
            rows,
            policy.tokenizer,
            max_prompt_length=data.max_prompt_length,
            max_completion_length=data.max_completion_length,
        )

    def both(row_format: PreferenceFormat | UnpairedFormat) -> tuple[RowDataset, RowDataset]:
        return load(training, row_format), load(held_out, row_format)

    return Bench(
        policy,
        HeldOut(policy, held_out, mesh),
        pairs=both(PreferenceFormat()),
        singles=both(UnpairedFormat(from_pairs=True)),
        mesh=mesh,
    )


def objective_of(name: str) -> Any:
    """The objective of a preset, as preference_arithmetic.py trains it when both labels are as frequent."""
    return configured([f"--preset={name}", "--desirable-share=0.5"]).objective


def make_trainer(config: Comparison, bench: Bench, name: str, seed: int) -> ComparedTrainer:
    """The trainer of one method."""
    single, training = name in UNPAIRED, config.training
    train_set, eval_set = bench.singles if single else bench.pairs
    if single:  # as many completions a step
        training = dataclasses.replace(training, rows_per_step=2 * training.rows_per_step)
    own = dataclasses.replace(
        config,
        objective=objective_of(name),
        seed=seed,
        name=f"{name}-{seed}",
        run_dir=str(run_folder(config, name, seed)),
    )
    trainer = ComparedTrainer(
        model=bench.policy.model,
        params=bench.policy.params,
        objective=own.objective,
        dataset=train_set,
        eval_dataset=eval_set,
        setup=run_setup(own, bench.mesh),
        training=training,
        update=config.update,
        optimizer=config.optimizer,
        evaluation=config.evaluation,
    )
    trainer.held_out = bench.held_out
    return trainer


def run_one(config: Comparison, bench: Bench, name: str, seed: int) -> Result:
    """One method with one order of rows, from the warm start."""
    began = time.perf_counter()
    with plain_errors():
        trainer = make_trainer(config, bench, name, seed)
    done = train(trainer)
    lines = [line for line in read_metrics(trainer.setup.folder / METRICS_FILE) if "loss" in line]
    first, last = ({key[5:]: value for key, value in e.items()} for e in (done.first_evaluation, done.last_evaluation))
    return {
        "preset": name,
        "seed": seed,
        **{f"{key} before": first[key] for key in HELD_OUT},
        **{key: last[key] for key in HELD_OUT},
        "rewards/accuracies": last.get("rewards/accuracies"),
        "margin of rewards": last["rewards/chosen"] - last["rewards/rejected"] if "rewards/chosen" in last else None,
        "seconds a step": float(np.median([line["step_time"] for line in lines[1:] or lines])),
        "stopped": done.stopped,
        "seconds": time.perf_counter() - began,
    }


def table(results: list[Result]) -> str:
    """Means over seeds as Markdown with the warm start among them, the best accuracy first."""
    own = ("rewards/accuracies", "margin of rewards")
    before = {key: results[0][f"{key} before"] for key in HELD_OUT}
    start = {"preset": "warm_start", **before, **dict.fromkeys((*own, "seconds a step"))}
    accuracy, likelier, *logprobs = HELD_OUT
    return results_table([*results, start], ranged=(accuracy, likelier), columns=(*logprobs, *own, "seconds a step"))


def draw(config: Comparison, path: Path) -> None:
    """Draws what is the same for all methods over steps: a row a family, means over the seeds."""

    def curves(name: str) -> list[Curve]:
        folders = [run_folder(config, name, seed) for seed in range(config.seeds)]
        runs = [[line for line in read_metrics(f / METRICS_FILE) if "eval/accuracy" in line] for f in folders]
        mean = {key: np.mean([[line[f"eval/{key}"] for line in run] for run in runs], axis=0) for key in HELD_OUT}
        steps = [line["step"] for line in runs[0]]
        margin = mean["logps/right"] - mean["logps/wrong"]
        return [(steps, y) for y in (mean["accuracy"], mean["likelier"], margin, mean["logps/right"])]

    titles = ["sums right, greedily", "right sum likelier than the wrong one", "log p(right) − log p(wrong)"]
    figure, axes = draw_families(FAMILIES, config.presets, [*titles, "log p(right)"], curves)
    for row in axes:
        row[0].set_xlabel("steps")
    save_figure(figure, path, dpi=75)


def main(args: list[str] | None = None) -> list[Result]:
    """Runs the comparison."""
    config = begin(parse_offline(CONFIG, args, description=__doc__ or ""))
    with plain_errors():
        bench = set_up(config)
    return compare(
        config,
        lambda name, seed: run_one(config, bench, name, seed),
        table=table,
        draw=lambda path: draw(config, path),
    )


if __name__ == "__main__":
    main()
