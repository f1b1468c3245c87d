"""ORPO on human preferences (HH-RLHF, Bai et al. 2022): fine-tuning and preferences in one stage, no reference at all.

    python experiments/orpo_hh.py --model.path=<folder of SmolLM2-135M> \\
        --data.train=hh_train.jsonl --data.eval=hh_eval.jsonl

Data, pod and flags as experiments/dpo_hh.py; a base model will do. `eval/nll` is to fall and `eval/log_odds_chosen` to
rise: from 2.96 to 2.58 and from -0.04 to 0.02 in 30 steps on a CPU (docs/results/hh_rlhf.md). Any setting is a flag:
--objective.pair-loss.odds-coef=0.25 --model.lora.rank=0; see --help.
"""

from __future__ import annotations

import dataclasses

from dpo_hh import CONFIG as DPO

from jaxrl_llm.algorithms.preference.presets import orpo
from jaxrl_llm.cli import run_offline

CONFIG = dataclasses.replace(DPO, name="orpo_hh", objective=orpo())

if __name__ == "__main__":
    run_offline(CONFIG, description=__doc__ or "")
