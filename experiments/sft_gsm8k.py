"""Supervised fine-tuning on the solutions of grade-school mathematics (GSM8K, Cobbe et al. 2021).

On a CPU, small settings (SmolLM2-135M-Instruct, two cores, up to a minute a step, 11 GB of memory):

    python experiments/sft_gsm8k.py --model.path=SmolLM2-135M-Instruct \\
        --data.train=gsm8k_train.jsonl --data.eval=gsm8k_test.jsonl

On a pod, the same line on every host (tpu_scripts/launch.sh adds --distributed):

    python experiments/sft_gsm8k.py --distributed --model.path=Qwen/Qwen2.5-1.5B --model.dtype=bfloat16 \\
        --data.train=hf:openai/gsm8k,config=main,split=train --data.eval=hf:openai/gsm8k,config=main,split=test \\
        --training.rows-per-step=128 --training.steps=175 --mesh.fsdp=-1

The data are JSON lines with the columns question and answer, as published.
Expected on the CPU: the loss on held-out solutions falls from 1.46 to 1.18 in 6 steps and to 1.07 in 12, which took
11 minutes on two cores that were shared with other work (--training.steps=12 --evaluation.every=6
--evaluation.max-rows=32). Solutions longer than the limits are dropped, 863 of 7473.
Any setting is a flag:
--objective.kind=dft --optimizer.learning-rate=1e-5; see --help.
"""

from __future__ import annotations

from jaxrl_llm.algorithms.optimizer import OptimizerConfig
from jaxrl_llm.algorithms.supervised import SupervisedObjective
from jaxrl_llm.cli import run_offline
from jaxrl_llm.config import ModelSource, OfflineDataConfig, OfflineExperiment
from jaxrl_llm.data.demonstrations import DemonstrationFormat
from jaxrl_llm.data.formats import PromptFormat
from jaxrl_llm.training.offline import OfflineEvaluationConfig, OfflineTrainingConfig

SYSTEM = "Solve the problem, then write the answer alone on the last line after ####."

CONFIG = OfflineExperiment(
    name="sft_gsm8k",
    objective=SupervisedObjective(),
    model=ModelSource(remat="none"),
    data=OfflineDataConfig(
        max_prompt_length=192,
        max_completion_length=192,
        overlong="drop",
        format=DemonstrationFormat(
            prompt=PromptFormat(template="{question}", system=SYSTEM), completion_column="answer"
        ),
    ),
    training=OfflineTrainingConfig(steps=40, rows_per_step=8, checkpoint_every=20),
    optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=4),
    evaluation=OfflineEvaluationConfig(every=20, max_rows=64),
)

if __name__ == "__main__":
    run_offline(CONFIG, description=__doc__ or "")
