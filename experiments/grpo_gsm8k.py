"""GRPO on grade-school mathematics (GSM8K, Cobbe et al. 2021) with a language model.

On a CPU, small settings (SmolLM2-135M-Instruct, two cores, a minute or more a step):

    python experiments/grpo_gsm8k.py --model.path=SmolLM2-135M-Instruct.gguf \\
        --data.train=gsm8k_train.jsonl --data.eval=gsm8k_test.jsonl

On a pod, the same line on every host (tpu_scripts/launch.sh adds --distributed):

    python experiments/grpo_gsm8k.py --distributed --model.path=Qwen/Qwen2.5-1.5B-Instruct --model.dtype=bfloat16 \\
        --data.train=hf:openai/gsm8k,config=main,split=train --data.eval=hf:openai/gsm8k,config=main,split=test \\
        --training.prompts-per-step=128 --training.steps=500 --sampling.max-tokens=512 --mesh.fsdp=-1

The data are JSON lines with the columns question and answer, as published. Two rewards: `format`, that the
completion ends in a line `#### <number>`, and `gsm8k_reward`, that the number is right.
Expected on the CPU: on held-out problems, decoded greedily, the format reward rises from 0.11 to above 0.8 within 15
steps; the model is too small to gain much correctness.
"""

from __future__ import annotations

from jaxrl_llm.algorithms.optimizer import OptimizerConfig
from jaxrl_llm.algorithms.policy_gradient.objective import PolicyGradient
from jaxrl_llm.cli import run
from jaxrl_llm.config import DataConfig, Experiment, ModelSource
from jaxrl_llm.data.formats import PromptFormat
from jaxrl_llm.rewards import gsm8k_reward, make_regex_reward
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.training.episodes.evaluate import EvaluationConfig
from jaxrl_llm.training.on_policy import TrainingConfig

SYSTEM = """\
Solve the problem in a few short lines of arithmetic, then write the answer alone on the last line after ####. \
For example:
Tom has 3 boxes of 4 pens and gives 5 pens away. How many are left?
3 * 4 = 12 pens in all.
12 - 5 = 7 pens are left.
#### 7"""

FORMAT = r"[^#]*\n#### -?\$?[\d,]+(\.\d+)?\s*"
"""Some lines of working, then one line with the answer, and nothing after it."""

CONFIG = Experiment(
    name="grpo_gsm8k",
    rewards=(make_regex_reward(FORMAT, name="format"), gsm8k_reward),
    reward_weights=(0.5, 1.0),
    algorithm=PolicyGradient(),
    model=ModelSource(remat="none"),
    data=DataConfig(max_prompt_length=256, overlong="drop", format=PromptFormat(template="{question}", system=SYSTEM)),
    sampling=SamplingConfig(max_tokens=96, temperature=0.7),
    training=TrainingConfig(steps=30, prompts_per_step=4, samples_per_prompt=8, checkpoint_every=10, samples_every=5),
    optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=2),
    evaluation=EvaluationConfig(every=15, max_prompts=64, solved_by="gsm8k_reward"),
)

if __name__ == "__main__":
    run(CONFIG, description=__doc__ or "")
