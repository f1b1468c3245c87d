"""A process reward model of grade-school mathematics (GSM8K, Cobbe et al. 2021), its steps labelled by roll-outs.

On a CPU, small settings (SmolLM2-135M-Instruct, two cores):

    python experiments/prm_gsm8k.py --model.path=<folder of SmolLM2-135M-Instruct> \\
        --problems=gsm8k_train.jsonl --eval-problems=gsm8k_test.jsonl

A step is a line. First the checkpoint solves the problems; each step of its solutions and of the published ones is
labelled by whether any of several completions that go on from there ends in the right number (Math-Shepherd, Wang et
al. 2023). That is most of the work, and is saved in the run's folder as steps_train.jsonl and steps_eval.jsonl. Then
the same checkpoint with low-rank adapters and a scalar head learns the labels; its folder is one of
`AutoModelForTokenClassification`. A later run takes labels that are there, from anywhere, as on a pod:

    python experiments/prm_gsm8k.py --distributed --model.path=Qwen/Qwen2.5-1.5B-Instruct --model.dtype=bfloat16 \\
        --data.train=steps_train.jsonl --data.eval=steps_eval.jsonl --training.rows-per-step=64 --mesh.fsdp=-1

Measured on a CPU with --max-problems=24 --solutions=0 --rollouts=2 --training.steps=10 --training.rows-per-step=4
--evaluation.every=10, published solutions alone: on 23 steps of 6 held-out solutions accuracy from 0.391 to 0.696
(always the same: 0.565; a standard error is 0.1) and the loss from 1.62 to 0.52, a beginning. It took 11 minutes on
cores that had other work beside, 7 of them for the labels of 132 steps.
Any setting is a flag: --solutions=4 --rollouts=8 --label-kind=soft --max-problems=1000; see --help.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from star_gsm8k import SYSTEM

from jaxrl_llm.algorithms.optimizer import OptimizerConfig
from jaxrl_llm.algorithms.score_models.process_reward import ProcessRewardObjective
from jaxrl_llm.algorithms.score_models.step_labels import Solution, StepLabelKind, monte_carlo_labels
from jaxrl_llm.cli import (
    OFFLINE_PANELS,
    Policy,
    finish,
    load_policy,
    load_rows,
    make_offline_trainer,
    parse_offline,
    plain_errors,
    start,
    train,
)
from jaxrl_llm.config import ModelSource, OfflineDataConfig, OfflineExperiment
from jaxrl_llm.data.formats import PromptFormat
from jaxrl_llm.data.prompts import PromptDataset
from jaxrl_llm.data.sources import open_source
from jaxrl_llm.data.steps import StepFormat, encode_steps
from jaxrl_llm.launch.loading import load_tokenizer_of
from jaxrl_llm.models.config import LoraConfig
from jaxrl_llm.models.heads import ScoreModel
from jaxrl_llm.rewards import gsm8k_reward
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sampling.stop_texts import check_stop_texts
from jaxrl_llm.sharding import make_mesh
from jaxrl_llm.training.offline import OfflineEvaluationConfig, OfflineTrainingConfig
from jaxrl_llm.training.stage import TrainingResult


@dataclasses.dataclass(frozen=True, kw_only=True)
class PRMExperiment(OfflineExperiment):
    """An `OfflineExperiment` that makes the labels of its rows."""

    problems: str | None = None
    """Problems with the columns question and answer, as published, where `data.train` has no labelled steps."""
    eval_problems: str | None = None
    """The same for held-out ones."""
    max_problems: int = 64
    """Use the first problems only; of those held out a quarter as many."""
    solutions: int = 1
    """Solutions of the checkpoint's own to each problem, beside the published one; those cut off are left out."""
    rollouts: int = 4
    """Completions of each beginning of a solution."""
    label_kind: StepLabelKind = "hard"
    """Whether any of them is right, or the share of right ones."""
    sampling: SamplingConfig = SamplingConfig(max_tokens=128)
    """How solutions and completions are written."""
    rows_per_batch: int = 8
    """Problems or beginnings that are continued at a time."""


CONFIG = PRMExperiment(
    name="prm_gsm8k",
    objective=ProcessRewardObjective(),
    model=ModelSource(remat="none", lora=LoraConfig(rank=16, alpha=32.0)),
    data=OfflineDataConfig(
        max_prompt_length=320,
        max_completion_length=192,
        overlong="drop",
        format=StepFormat(prompt=PromptFormat(template="{question}", system=SYSTEM)),
    ),
    training=OfflineTrainingConfig(steps=60, rows_per_step=8, checkpoint_every=20),
    optimizer=OptimizerConfig(learning_rate=2e-4, schedule="linear", warmup_steps=6),
    evaluation=OfflineEvaluationConfig(every=20),
)


def lines(solution: str) -> list[str]:
    """The steps of a solution, without the calculator's annotations `<<3*4=12>>`."""
    return [line.strip() for line in re.sub(r"<<[^>]*>>", "", solution).splitlines() if line.strip()]


class Labeller:
    """Solves problems with a policy, and labels the steps with more of its samples."""

    def __init__(self, config: PRMExperiment, policy: Policy, mesh: jax.sharding.Mesh):
        self._config, self._policy = config, policy
        self._write, self._go_on = (
            Sampler(
                policy.model,
                config.sampling,
                group=group,
                stop_tokens=policy.stop_tokens,
                mesh=mesh,
                tokenizer=policy.tokenizer,
            )
            for group in (max(config.solutions, 1), config.rollouts)
        )

    def __call__(self, source: str, limit: int) -> list[dict[str, Any]]:
        """Rows for `StepFormat`: question, steps and labels."""
        config, policy, data, form = self._config, self._policy, self._config.data, self._config.data.format
        if not isinstance(form, StepFormat):
            raise ValueError(f"data.format={form} gives no steps with labels: it must be a StepFormat")
        problems = PromptDataset(
            open_source(source),
            policy.tokenizer,
            max_prompt_length=data.max_prompt_length,
            prompt_format=form.prompt,
            overlong=data.overlong,
            max_rows=limit,
        )
        every = problems.batch(range(len(problems)))
        answers = [str(answer) for answer in every.columns["answer"]]
        solved = [*enumerate(map(lines, answers)), *self._written(problems)]
        encoded = [encode_steps(steps, policy.tokenizer, separator=form.separator) for _, steps in solved]
        fitting = [place for place, (ids, _) in enumerate(encoded) if len(ids) <= data.max_completion_length]
        numbers = [solved[place][0] for place in fitting]
        prompts = [every.tokens[number, : every.lengths[number]].tolist() for number in numbers]

        def is_right(chosen: list[int], completions: list[list[int]]) -> list[float]:
            texts = [policy.tokenizer.decode(ids, skip_special_tokens=True) for ids in completions]
            wanted = [answers[numbers[place]] for place in chosen]
            return [score or 0.0 for score in gsm8k_reward([""] * len(texts), texts, answer=wanted)]

        labels = monte_carlo_labels(
            self._go_on,
            policy.params,
            [Solution(prompt, *encoded[place]) for prompt, place in zip(prompts, fitting, strict=True)],
            is_right,
            batch_size=config.rows_per_batch,
            key=np.array([config.seed, 1], np.uint32),
            kind=config.label_kind,
            prefix_width=data.max_prompt_length + data.max_completion_length,
        )
        questions = [every.columns["question"][number] for number in numbers]
        return [
            {"question": question, "completions": solved[place][1], "labels": own.tolist()}
            for question, place, own in zip(questions, fitting, labels, strict=True)
        ]

    def _written(self, problems: PromptDataset) -> list[tuple[int, list[str]]]:
        """Numbers of problems, and the steps of what the policy wrote to its end for them."""
        if not self._config.solutions:
            return []
        size, found = self._config.rows_per_batch, []
        for step, begin in enumerate(range(0, len(problems), size)):
            numbers = [(begin + place) % len(problems) for place in range(size)]  # repeats fill up the last one
            batch = problems.batch(numbers)
            key = np.array([self._config.seed, 0], np.uint32)
            rollout = self._write(self._policy.params, batch.tokens, batch.lengths, key, step)
            written, finished = np.asarray(rollout.completion), np.asarray(rollout.finished)
            for row, group in np.argwhere(finished[: len(problems) - begin]):
                ids = written[row, group, : np.asarray(rollout.completion_lengths)[row, group]]
                if steps := lines(self._policy.tokenizer.decode(ids.tolist(), skip_special_tokens=True)):
                    found.append((numbers[row], steps))
        return found


def with_labels(config: PRMExperiment, labeller: Labeller) -> PRMExperiment:
    """`config` with labelled steps to train and to evaluate on, made unless they are given or in the run's folder.

    Raises:
        ValueError: there are no problems to make them of, or several processes would.
    """
    files, to_make = {"train": config.data.train, "eval": config.data.eval}, []
    for part, problems, flag in (("train", config.problems, ""), ("eval", config.eval_problems, "eval-")):
        path = Path(config.run_dir or "") / f"steps_{part}.jsonl"
        if files[part] is not None or (part == "eval" and not config.evaluation.every):
            continue
        files[part] = str(path)
        if path.exists():
            continue
        if problems is None or jax.process_count() > 1:
            raise ValueError(
                f"no labelled steps: pass --data.{part}=<file>, or in a single process --{flag}problems=<gsm8k>"
            )
        open_source(problems)  # one that there is not is told before the others' labels are made
        to_make.append((path, problems, config.max_problems if part == "train" else config.max_problems // 4))
    for path, problems, limit in to_make:
        began = time.perf_counter()
        rows = labeller(problems, max(limit, 1))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        labels = np.concatenate([row["labels"] for row in rows])
        seconds = time.perf_counter() - began
        print(f"{path}: {len(labels)} steps of {len(rows)} solutions, mean {labels.mean():.3f}, {seconds:.0f} s")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **files))


def main(args: list[str] | None = None) -> TrainingResult:
    """Runs the experiment."""
    config = start(parse_offline(CONFIG, args, description=__doc__ or ""))
    began = time.perf_counter()
    with plain_errors():
        config.sampling.check_no_epochs("labelling")
        check_stop_texts(config.sampling.stop, load_tokenizer_of(config.model))
        mesh = make_mesh(config.mesh)
        policy = load_policy(config, mesh)
        config = with_labels(config, Labeller(config, policy, mesh))
        model = ScoreModel(policy.model, bias=True)
        judge = dataclasses.replace(policy, model=model, params=model.from_trunk(policy.params, jax.random.key(0)))
        rows = load_rows(config, policy.tokenizer)
        trainer = make_offline_trainer(config, judge, mesh, rows=rows)
    result = train(trainer)
    finish(config, judge, result, seconds=time.perf_counter() - began, panels=OFFLINE_PANELS)
    return result


if __name__ == "__main__":
    main()
