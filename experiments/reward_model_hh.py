"""A reward model of human preferences (HH-RLHF, Bai et al. 2022), with low-rank adapters on a chat model.

On a CPU, small settings (SmolLM2-135M-Instruct, two cores), the published test split cut in two:

    gunzip -c hh_harmless_base_test.jsonl.gz | head -n 1800 > hh_train.jsonl
    gunzip -c hh_harmless_base_test.jsonl.gz | tail -n 512 > hh_eval.jsonl
    python experiments/reward_model_hh.py --model.path=<folder of SmolLM2-135M-Instruct> \\
        --data.train=hh_train.jsonl --data.eval=hh_eval.jsonl

On a pod, the same line on every host (tpu_scripts/launch.sh adds --distributed):

    python experiments/reward_model_hh.py --distributed --model.path=Qwen/Qwen2.5-1.5B-Instruct \\
        --model.dtype=bfloat16 --data.train=hf:Anthropic/hh-rlhf,split=train \\
        --data.eval=hf:Anthropic/hh-rlhf,split=test --data.max-prompt-length=512 \\
        --data.max-completion-length=256 --training.rows-per-step=64 --mesh.fsdp=-1

Rows have the columns chosen and rejected, whole dialogues, as published; those whose beginnings differ, and longer
ones, are dropped and counted. `eval/accuracy` is the share of held-out pairs whose chosen reply scores higher; measured
after 80 steps on 188 pairs: 0.622 (docs/results/hh_rlhf.md), in 26 minutes on one busy core. The model's folder is one
of `AutoModelForSequenceClassification`. Any setting is a flag: --objective.center-coef=0.01 --model.lora.rank=0 (all
weights) --optimizer.learning-rate=1e-5; see --help.
"""

from __future__ import annotations

import dataclasses

from dpo_hh import CONFIG as DPO

from jaxrl_llm.algorithms.score_models.reward_model import RewardModelObjective
from jaxrl_llm.cli import run_offline, with_reward_head

CONFIG = dataclasses.replace(DPO, name="reward_model_hh", objective=RewardModelObjective())


if __name__ == "__main__":
    run_offline(CONFIG, description=__doc__ or "", prepare=with_reward_head)
