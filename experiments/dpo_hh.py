"""DPO on human preferences (HH-RLHF, Bai et al. 2022), with low-rank adapters: the reference is the base itself.

On a CPU, small settings (SmolLM2-135M-Instruct, two cores), the published test split cut in two:

    gunzip -c hh_harmless_base_test.jsonl.gz | head -n 1800 > hh_train.jsonl
    gunzip -c hh_harmless_base_test.jsonl.gz | tail -n 512 > hh_eval.jsonl
    python experiments/dpo_hh.py --model.path=<folder of SmolLM2-135M-Instruct> \\
        --data.train=hh_train.jsonl --data.eval=hh_eval.jsonl

On a pod, the same line on every host (tpu_scripts/launch.sh adds --distributed):

    python experiments/dpo_hh.py --distributed --model.path=Qwen/Qwen2.5-1.5B-Instruct --model.dtype=bfloat16 \\
        --data.train=hf:Anthropic/hh-rlhf,split=train --data.eval=hf:Anthropic/hh-rlhf,split=test \\
        --data.max-prompt-length=512 --data.max-completion-length=256 --training.rows-per-step=64 --mesh.fsdp=-1

Rows have the columns chosen and rejected, whole dialogues, as published; those whose beginnings differ, and longer
ones, are dropped and counted. `eval/rewards/accuracies` begins at 0, since policy and reference are then the same and
all margins are 0; measured after 60 steps on 188 held-out pairs: 0.617 (docs/results/hh_rlhf.md), in 38 minutes on one
busy core. Another loss of pairs is another record in CONFIG (`jaxrl_llm.algorithms.preference.presets`). Any setting is
a flag: --objective.pair-loss.beta=0.05 --objective.nll-coef=0.1; see --help.
"""

from __future__ import annotations

from jaxrl_llm.algorithms.optimizer import OptimizerConfig
from jaxrl_llm.algorithms.preference.presets import dpo
from jaxrl_llm.cli import run_offline
from jaxrl_llm.config import ModelSource, OfflineDataConfig, OfflineExperiment
from jaxrl_llm.data.formats import PromptFormat
from jaxrl_llm.data.preferences import PreferenceFormat
from jaxrl_llm.models.config import LoraConfig
from jaxrl_llm.training.offline import OfflineEvaluationConfig, OfflineTrainingConfig

PAIRS = PreferenceFormat(prompt=PromptFormat(conversational=True), whole_dialogues=True)
"""Both dialogues whole, with their common beginning as the prompt."""

CONFIG = OfflineExperiment(
    name="dpo_hh",
    objective=dpo(),
    model=ModelSource(remat="none", lora=LoraConfig(rank=16, alpha=32.0)),
    data=OfflineDataConfig(
        max_prompt_length=128,
        max_completion_length=64,
        overlong="drop",
        format=PAIRS,
    ),
    training=OfflineTrainingConfig(steps=60, rows_per_step=8, checkpoint_every=20),
    optimizer=OptimizerConfig(learning_rate=2e-4, schedule="linear", warmup_steps=6),
    evaluation=OfflineEvaluationConfig(every=20, max_rows=256),
)

if __name__ == "__main__":
    run_offline(CONFIG, description=__doc__ or "")
