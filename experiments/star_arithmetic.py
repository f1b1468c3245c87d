"""STaR from nothing: a character-level model teaches itself to add by writing down how.

    python experiments/star_arithmetic.py

A rationale of 47+38= is the sum digit by digit with its carry, then the answer: 7+8=15;4+3+1=08;085. A small
transformer is shown few of them, some with the answer as a hint: 47+38(085)=. Then it goes on alone: it solves what it
can, tries the rest again with the answer in sight, and is trained, each time anew from where it began, on what came out
right, without the hints.

Hardware: two CPU cores, shared when it was measured. Time: about 20 seconds an iteration.
Expected (seed 0, after two iterations): problems solved without a hint from 0.173 to 0.239, held-out ones from 0.152
to 0.18. The gain is small: with a hint in sight this model learns to make its lines fit the answer, and such rationales
teach it little; after training without hints it cannot use them as well. Longer training has not been tried.
Killed, it goes on after the last phase that it finished: --resume --run-dir=<folder>. Any setting is a flag:
--star.no-rationalize --star.no-restart-from-base --star.iterations=6; see --help.
"""

from __future__ import annotations

import dataclasses
import random
import re
import time
from pathlib import Path
from typing import Any

import jax

from jaxrl_llm.algorithms.offline import make_offline_step
from jaxrl_llm.algorithms.optimizer import OptimizerConfig, make_optimizer, make_schedule
from jaxrl_llm.algorithms.state import make_train_state
from jaxrl_llm.algorithms.supervised import SupervisedObjective
from jaxrl_llm.cli import Policy, finish, make_star_trainer, parse, plain_errors, start, train
from jaxrl_llm.config import DataConfig, StarExperiment
from jaxrl_llm.data.demonstrations import DemonstrationFormat
from jaxrl_llm.data.formats import PromptFormat
from jaxrl_llm.data.prompts import PromptDataset
from jaxrl_llm.data.rows import RowLoader
from jaxrl_llm.data.tokenizers import CharTokenizer
from jaxrl_llm.launch.demo import WarmStart, character_model
from jaxrl_llm.models.checkpoints.pretrained import load_params, save_pretrained
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import make_mesh
from jaxrl_llm.training.episodes.evaluate import EvaluationConfig
from jaxrl_llm.training.run.distributed import is_main_process
from jaxrl_llm.training.stage import TrainingResult
from jaxrl_llm.training.star.trainer import StarConfig, StarTrainer

Row = dict[str, str]

WARM_START = "warm_start"
"""Folder of the base model, in the run's own."""


FORM = re.compile(r"\d\+\d=\d(\d);\d\+\d\+\d=(\d\d);(\d\d\d)")


def right_answer(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """1 if the last number is the sum and is made of the digits of the two lines before it.

    That it follows from these keeps out most rationales that only copy the hint: with a hint an answer proves little.
    """

    def is_right(text: str, right: str) -> bool:
        found = FORM.fullmatch(text)
        return found is not None and found[3] == right == found[2] + found[1]

    return [float(is_right(text, right)) for text, right in zip(completions, answer, strict=True)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StarArithmetic(StarExperiment):
    """A `StarExperiment` of a model that writes its own training data."""

    problems: int = 1500
    """Sums to learn from."""
    held_out: int = 500
    """Sums kept for evaluation."""
    warm_start: WarmStart = WarmStart(demonstrations=400, steps=200, batch_size=64, learning_rate=2e-3)
    """What the base model is shown."""

    def __post_init__(self) -> None:
        """Rejects more sums than there are."""
        shown = self.warm_start.demonstrations
        if min(self.problems, self.held_out) < 1 or shown + self.problems + self.held_out > 10_000:
            raise ValueError(
                f"warm_start.demonstrations={shown}, problems={self.problems} and held_out={self.held_out} must be "
                "positive and at most 10000 together"
            )


CONFIG = StarArithmetic(
    name="star_arithmetic",
    rewards=(right_answer,),
    data=DataConfig(max_prompt_length=12),
    sampling=SamplingConfig(max_tokens=24, temperature=0),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=10),
    evaluation=EvaluationConfig(every=1, max_prompts=500),
    star=StarConfig(iterations=3, start_steps=60, rows_per_step=64, problems_per_batch=500),
)


def sums(config: StarArithmetic) -> tuple[list[Row], list[Row], list[Row]]:
    """Random sums of two digits each: those that are shown, those to learn from, and those held out."""
    numbers = [(a, b) for a in range(100) for b in range(100)]
    random.Random(config.seed).shuffle(numbers)
    rows = []
    for a, b in numbers[: config.warm_start.demonstrations + config.problems + config.held_out]:
        answer, low = f"{a + b:03d}", a % 10 + b % 10
        solution = f"{a % 10}+{b % 10}={low:02d};{a // 10}+{b // 10}+{low // 10}={a // 10 + b // 10 + low // 10:02d};"
        row = {"prompt": f"{a:02d}+{b:02d}=", "hinted": f"{a:02d}+{b:02d}({answer})=", "answer": answer}
        rows.append(row | {"solution": solution + answer})
    shown, learned = config.warm_start.demonstrations, config.warm_start.demonstrations + config.problems
    return rows[:shown], rows[shown:learned], rows[learned:]


def base_model(config: StarArithmetic, tokenizer: CharTokenizer, mesh: jax.sharding.Mesh) -> Policy:
    """A new model after a few demonstrations, half of them with hints; read again by a run that goes on."""
    model = character_model(tokenizer)
    folder, shardings = Path(config.run_dir or "") / WARM_START, None
    shardings = model.shardings(mesh)
    if config.resume and folder.exists():
        params = load_params(folder, model, shardings)
    else:
        params = fine_tune(config, model, tokenizer, mesh, shardings)
        save_pretrained(folder, model, params, tokenizer=tokenizer, overwrite=True)
    return Policy(model, params, tokenizer, (tokenizer.eos_token_id,))


def fine_tune(
    config: StarArithmetic, model: Transformer, tokenizer: CharTokenizer, mesh: jax.sharding.Mesh, shardings: Any
) -> Params:
    """Parameters after supervised steps on solved sums."""
    settings = config.warm_start
    schedule = OptimizerConfig(learning_rate=settings.learning_rate, schedule="cosine")
    optimizer = make_optimizer(schedule, make_schedule(schedule, settings.steps))
    rows = [
        {"prompt": row[column], "completion": row["solution"]}
        for number, row in enumerate(sums(config)[0])
        for column in ("prompt", "hinted")[number % 2 :][:1]
    ]
    shown = DemonstrationFormat().dataset(
        rows,
        tokenizer,
        max_prompt_length=config.data.max_prompt_length,
        max_completion_length=config.sampling.max_tokens,
    )
    loader, metrics = RowLoader(shown, batch_size=settings.batch_size, seed=config.seed), {}
    with jax.set_mesh(mesh):
        params = jax.jit(model.init, out_shardings=shardings)(jax.random.key(config.seed))
        state = jax.jit(lambda p: make_train_state(p, optimizer, config.seed))(params)
        step = jax.jit(make_offline_step(model, optimizer, SupervisedObjective()), donate_argnums=0)
        for _ in range(settings.steps):
            state, metrics = step(state, next(loader).rows)
    if is_main_process():
        print(f"base model: {settings.steps} steps on {len(shown)} sums, nll {float(metrics['nll']):.3f}")
    return state.params


def make_star(config: StarArithmetic, policy: Policy, mesh: jax.sharding.Mesh) -> StarTrainer:
    """The loop on these sums."""
    _, learned, held_out = sums(config)

    def prompts(rows: list[Row], column: str) -> PromptDataset:
        given = PromptFormat(prompt_column=column)
        return PromptDataset(
            rows, policy.tokenizer, max_prompt_length=config.data.max_prompt_length, prompt_format=given
        )

    return make_star_trainer(
        config,
        policy,
        mesh,
        problems=prompts(learned, "prompt"),
        hinted=prompts(learned, "hinted") if config.star.rationalize else None,
        held_out=prompts(held_out[: config.evaluation.max_prompts], "prompt"),
    )


def main(args: list[str] | None = None) -> TrainingResult:
    """Runs the experiment."""
    config = start(parse(CONFIG, args, description=__doc__ or ""))
    began = time.perf_counter()
    with plain_errors():
        mesh = make_mesh(config.mesh)
        policy = base_model(config, CharTokenizer("0123456789+=();"), mesh)
        trainer = make_star(config, policy, mesh)
    result = train(trainer)
    finish(config, policy, result, seconds=time.perf_counter() - began)
    return result


if __name__ == "__main__":
    main()
