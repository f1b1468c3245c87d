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

import re

from jaxrl_llm.algorithms.optimizer import OptimizerConfig
from jaxrl_llm.cli import run_star
from jaxrl_llm.config import DataConfig, ModelSource, StarExperiment
from jaxrl_llm.data.formats import PromptFormat
from jaxrl_llm.data.interfaces import Row
from jaxrl_llm.data.sources import open_source
from jaxrl_llm.rewards import gsm8k_reward
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.training.episodes.evaluate import EvaluationConfig
from jaxrl_llm.training.star.trainer import StarConfig

SYSTEM = """\
Solve the problem in a few short lines of arithmetic, then write the answer alone on the last line after ####. \
For example:
Tom has 3 boxes of 4 pens and gives 5 pens away. How many are left?
3 * 4 = 12 pens in all.
12 - 5 = 7 pens are left.
#### 7"""

HINT = "{question}\n(The answer is {number}. Show the steps that lead to it.)"


CONFIG = StarExperiment(
    name="star_gsm8k",
    rewards=(gsm8k_reward,),
    hint=HINT,
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


if __name__ == "__main__":
    run_star(CONFIG, description=__doc__ or "", rows=with_number)
