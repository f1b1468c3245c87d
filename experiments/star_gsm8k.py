"""STaR on grade-school mathematics (GSM8K, Cobbe et al. 2021) with a language model.

On a CPU, small settings (SmolLM2-135M-Instruct, two cores):

    python experiments/star_gsm8k.py --model.path=SmolLM2-135M-Instruct.gguf \\
        --data.train=gsm8k_train.jsonl --data.eval=gsm8k_test.jsonl --data.max-train-prompts=64 --evaluation.every=0

On a pod, the same line on every host (tpu_scripts/launch.sh adds --distributed):

    python experiments/star_gsm8k.py --distributed --model.path=Qwen/Qwen2.5-1.5B-Instruct --model.dtype=bfloat16 \\
        --data.train=hf:openai/gsm8k,config=main,split=train --data.eval=hf:openai/gsm8k,config=main,split=test \\
        --star.problems-per-batch=1024 --star.rows-per-step=128 --sampling.max-tokens=512 --mesh.fsdp=-1

The data are JSON lines with the columns question and answer, as published; of the answers only the number after ####
is shown, and that only as a hint. Several rationales of each problem, as in rejection-sampling fine-tuning:
--star.samples=4 --sampling.temperature=0.7.

SmolLM2-135M-Instruct is too weak a beginning: of 96 problems it solved none, and 3 with hints; trained on those 3 it
answered 0 of 64 held-out problems right, 1 before (--data.max-train-prompts=96 --star.iterations=1, seed 0).
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Sequence

from jaxrl_llm.algorithms.optimizer import OptimizerConfig
from jaxrl_llm.cli import Policy, finish, load_policy, make_star_trainer, parse, plain_errors, start, train
from jaxrl_llm.config import DataConfig, ModelSource, StarExperiment
from jaxrl_llm.data.formats import PromptFormat
from jaxrl_llm.data.interfaces import Row
from jaxrl_llm.data.prompts import PromptDataset
from jaxrl_llm.data.sources import open_source
from jaxrl_llm.rewards import gsm8k_reward
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import make_mesh
from jaxrl_llm.training.episodes.evaluate import EvaluationConfig
from jaxrl_llm.training.loop import TrainingResult
from jaxrl_llm.training.star.trainer import StarConfig

SYSTEM = """\
Solve the problem in a few short lines of arithmetic, then write the answer alone on the last line after ####. \
For example:
Tom has 3 boxes of 4 pens and gives 5 pens away. How many are left?
3 * 4 = 12 pens in all.
12 - 5 = 7 pens are left.
#### 7"""

HINT = "{question}\n(The answer is {number}. Show the steps that lead to it.)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StarGsm8k(StarExperiment):
    """A `StarExperiment` of a model that writes its own training data."""

    hint: str = HINT
    """What the prompt is where the answer is given; a format string over the columns and `number`."""


CONFIG = StarGsm8k(
    name="star_gsm8k",
    rewards=(gsm8k_reward,),
    model=ModelSource(remat="none"),
    data=DataConfig(max_prompt_length=320, format=PromptFormat(template="{question}", system=SYSTEM)),
    sampling=SamplingConfig(max_tokens=128, temperature=0),
    optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=4),
    evaluation=EvaluationConfig(every=1, max_prompts=64),
    star=StarConfig(iterations=3, start_steps=10, rows_per_step=8, problems_per_batch=32),
)


def with_number(source: str, limit: int | None) -> list[Row]:
    """The rows that have a number after `####`, which is added as a column."""
    rows, numbered = open_source(source), []
    for index in range(len(rows) if limit is None else min(limit, len(rows))):
        if found := re.search(r"####\s*(\S+)", str(rows[index].get("answer"))):
            numbered.append({**rows[index], "number": found[1]})
    if not numbered:
        raise ValueError(f"{source} has no row whose column answer ends in #### <number>")
    return numbered


def load_problems(config: StarGsm8k, policy: Policy) -> tuple[PromptDataset, PromptDataset | None, PromptDataset]:
    """Problems, the same with hints, and held-out ones."""
    data = config.data
    if data.train is None or (config.evaluation.every and data.eval is None):
        raise ValueError("pass --data.train=<gsm8k> and --data.eval=<gsm8k>, or --evaluation.every=0")

    def prompts(rows: Sequence[Row], form: PromptFormat) -> PromptDataset:
        limits = {"max_prompt_length": data.max_prompt_length, "overlong": data.overlong}
        return PromptDataset(rows, policy.tokenizer, prompt_format=form, **limits)

    rows = with_number(data.train, data.max_train_prompts)
    hinted = prompts(rows, dataclasses.replace(data.format, template=config.hint)) if config.star.rationalize else None
    held_out = rows if data.eval is None else with_number(data.eval, config.evaluation.max_prompts)
    return prompts(rows, data.format), hinted, prompts(held_out, data.format)


def main(args: list[str] | None = None) -> TrainingResult:
    """Runs the experiment."""
    config = start(parse(CONFIG, args, description=__doc__ or ""))
    began = time.perf_counter()
    with plain_errors():
        mesh = make_mesh(config.mesh)
        policy = load_policy(config, mesh)
        problems, hinted, held_out = load_problems(config, policy)
        trainer = make_star_trainer(config, policy, mesh, problems=problems, hinted=hinted, held_out=held_out)
    result = train(trainer)
    finish(config, policy, result, seconds=time.perf_counter() - began)
    return result


if __name__ == "__main__":
    main()
