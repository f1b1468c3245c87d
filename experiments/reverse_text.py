"""Reverse-text on SmolLM2-135M-Instruct: a short fine-tuning, then GRPO on the longest common subsequence.

    python experiments/reverse_text.py --model.path=SmolLM2-135M-Instruct.gguf

The model is asked to reverse a text, character by character, and to put it in <reversed_text> tags. A few supervised
steps show it how, until it gets about half; then GRPO takes over, rewarded by how much of the reversed text its answer
has in the right order (`lcs`). Texts are sentences of three words, made here from a few dozen; those of your own (JSON
lines with a column text): --data.train=texts.jsonl --data.eval=others.jsonl. Held-out texts are other sentences.

The model after fine-tuning is left in <run>/sft/model, from which GRPO alone begins again with --sft.steps=0
--model.path=<run>/sft/model. experiments/benchmarks/trl_reverse_text.py trains it in TRL on the same prompts and draws
both curves.

Hardware: two CPU cores, 7 GB of memory. Time: three quarters of an hour beside other work, a minute a step of GRPO.
Expected (seed 0): the reward of the samples from 0.57 (the first five steps) to 0.88 (the last five of 40), where two
different texts have 0.42 in common; of greedy answers to held-out texts from 0.76 to 0.88.
docs/results/reverse_text.md has the figure and the log.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
import time
from pathlib import Path
from typing import Any

import jax

from jaxrl_llm.algorithms.optimizer import OptimizerConfig
from jaxrl_llm.checks import check_fields, count
from jaxrl_llm.cli import (
    OFFLINE_PANELS,
    Policy,
    finish,
    load_policy,
    load_rows,
    make_offline_trainer,
    make_trainer,
    parse,
    plain_errors,
    start,
    train,
)
from jaxrl_llm.config import DataConfig, Experiment, ModelSource, OfflineDataConfig, OfflineExperiment
from jaxrl_llm.data.demonstrations import DemonstrationFormat
from jaxrl_llm.data.formats import PromptFormat, column_of
from jaxrl_llm.data.interfaces import Row, RowSource
from jaxrl_llm.data.sources import open_source
from jaxrl_llm.rewards import completion_text
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import make_mesh
from jaxrl_llm.training.episodes.evaluate import EvaluationConfig
from jaxrl_llm.training.offline import OfflineTrainingConfig
from jaxrl_llm.training.on_policy import TrainingConfig, TrainingResult
from jaxrl_llm.training.run.resume import find_run

SYSTEM = "Reverse the text character-by-character. Put your answer in <reversed_text> tags."

ADJECTIVES = ["big", "cold", "dark", "green", "happy", "old", "red", "small"]
NOUNS = ["bird", "boat", "book", "cat", "dog", "farmer", "garden", "horse", "king", "river"]
VERBS = ["calls", "draws", "feeds", "hears", "keeps", "likes", "moves", "sees"]

SENTENCES = [" ".join(words) for words in itertools.product(ADJECTIVES, NOUNS, VERBS)]
"""All texts that there are: `old river moves`."""

SFT = "sft"
"""Folder of the fine-tuning, in the run's own."""


def lcs(prompts: list[Any], completions: list[Any], text: list[str], **columns: Any) -> list[float]:
    """How much of the reversed text is in the answer: longest common subsequence / length of the longer of the two.

    1 for the reversed text alone: what an answer lacks lowers it, and so does what it has too much. 0 without an answer
    in the tags. Not `difflib`'s ratio, which other frameworks take for it: that one follows the longest common block
    first, finds less than there is, and depends on which of the two texts comes first.
    """
    found = [re.search(r"<reversed_text>(.*?)</reversed_text>", completion_text(c), re.DOTALL) for c in completions]
    answers = ["" if one is None else one[1].strip() for one in found]
    longer = [max(len(answer), len(source), 1) for answer, source in zip(answers, text, strict=True)]
    return [common(a, t[::-1]) / n for a, t, n in zip(answers, text, longer, strict=True)]


def common(one: str, other: str) -> int:
    """Length of the longest common subsequence."""
    best = [0] * (len(other) + 1)  # of what was read of `one` and each beginning of `other`
    for a in one:
        before = 0
        for end, b in enumerate(other, 1):
            before, best[end] = best[end], before + 1 if a == b else max(best[end], best[end - 1])
    return best[-1]


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """Supervised fine-tuning before reinforcement learning."""

    steps: int = 24
    """Optimizer steps; 0: the model is one that was fine-tuned before."""
    rows_per_step: int = 8
    """Reversed texts of each."""
    learning_rate: float = 2e-4
    """Peak; it falls linearly."""

    def __post_init__(self) -> None:
        """Rejects counts that cannot be meant."""
        check_fields("sft", self, steps=count(self.steps, least=0), rows_per_step=count(self.rows_per_step))


@dataclasses.dataclass(frozen=True)
class ReverseText(Experiment):
    """An `Experiment` on texts that are made here, unless `data` names others."""

    texts: int = 576
    """Texts to train on."""
    held_out: int = 64
    """Others, kept for evaluation."""
    sft: FineTuning = FineTuning()
    """The stage before reinforcement learning."""

    def __post_init__(self) -> None:
        """Rejects more texts than there are, or none."""
        if min(self.texts, self.held_out) < 1:
            raise ValueError(f"texts={self.texts} and held_out={self.held_out} must be at least 1 each")
        if self.texts + self.held_out > len(SENTENCES):
            raise ValueError(
                f"texts={self.texts} and held_out={self.held_out} are more than the {len(SENTENCES)} texts that there "
                "are: lower one of them, or name texts of your own by data.train and data.eval"
            )

    @property
    def without_effect(self) -> dict[str, str]:
        """What takes the place of texts that are made here."""
        given = {"texts": self.data.train, "held_out": self.data.eval}
        idle = {name: f"they are those of {path}" for name, path in given.items() if path is not None}
        return super().without_effect | idle


CONFIG = ReverseText(
    name="reverse_text",
    rewards=(lcs,),
    model=ModelSource(remat="none", scan_layers=False),
    data=DataConfig(max_prompt_length=48, format=PromptFormat(template="{text}", system=SYSTEM)),
    sampling=SamplingConfig(max_tokens=32),
    training=TrainingConfig(steps=40, prompts_per_step=4, samples_per_prompt=8, checkpoint_every=0, samples_every=10),
    optimizer=OptimizerConfig(learning_rate=3e-5, schedule="cosine", warmup_steps=5),
    evaluation=EvaluationConfig(every=20, max_prompts=32),
)


def load_texts(config: ReverseText) -> tuple[RowSource, RowSource]:
    """Rows with a column text: those to train on, and those held out."""
    made = random.Random(config.seed).sample(SENTENCES, config.texts + config.held_out)
    rows = [{"text": text} for text in made]
    train_rows = rows[config.held_out :] if config.data.train is None else open_source(config.data.train)
    eval_rows = rows[: config.held_out] if config.data.eval is None else open_source(config.data.eval)
    return train_rows, eval_rows


def solved(row: Row) -> Row:
    """The row with its reversed text as the completion."""
    return {**row, "completion": f"<reversed_text>{column_of(row, 'text')[::-1]}</reversed_text>"}


def fine_tune(config: ReverseText, rows: RowSource, mesh: jax.sharding.Mesh) -> Policy:
    """The model after some steps on reversed texts, left in `sft/model`; a run that goes on reads it from there."""
    folder, source, stage = Path(config.run_dir or "") / SFT, config.model, config.sft
    if find_run(config.run_dir or "", config.settings(), resume=config.resume) and stage.steps:
        return load_policy(dataclasses.replace(source, path=str(folder / "model")), mesh)
    policy = load_policy(config, mesh)
    if not stage.steps:
        return policy
    began = time.perf_counter()
    sft = OfflineExperiment(
        name="reverse_text_sft",
        run_dir=str(folder),
        seed=config.seed,
        model=source,
        data=OfflineDataConfig(
            max_prompt_length=config.data.max_prompt_length,
            max_completion_length=config.sampling.max_tokens,
            format=DemonstrationFormat(prompt=config.data.format),
        ),
        training=OfflineTrainingConfig(steps=stage.steps, rows_per_step=stage.rows_per_step, checkpoint_every=0),
        optimizer=OptimizerConfig(learning_rate=stage.learning_rate, schedule="linear"),
    )
    shown = load_rows(sft, policy.tokenizer, train_rows=[solved(rows[n]) for n in range(len(rows))])
    result = train(make_offline_trainer(sft, policy, mesh, rows=shown))
    finish(sft, policy, result, seconds=time.perf_counter() - began, panels=OFFLINE_PANELS)
    if result.stopped:
        raise SystemExit(f"stopped in the fine-tuning ({result.stopped}): begin again")
    return dataclasses.replace(policy, params=result.params)


def main(args: list[str] | None = None) -> TrainingResult:
    """Runs both stages."""
    config = start(parse(CONFIG, args, description=__doc__ or ""))
    began = time.perf_counter()
    with plain_errors():
        mesh = make_mesh(config.mesh)
        train_rows, eval_rows = load_texts(config)
        policy = fine_tune(config, train_rows, mesh)
        trainer = make_trainer(config, policy, mesh, train_rows=train_rows, eval_rows=eval_rows)
    policy = dataclasses.replace(policy, params=None)  # the trainer has its own copy
    result = train(trainer)
    finish(config, policy, result, seconds=time.perf_counter() - began)
    return result


if __name__ == "__main__":
    main()
