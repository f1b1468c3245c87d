"""ORPO on human preferences (HH-RLHF, Bai et al. 2022): fine-tuning and preferences in one stage, no reference at all.

    python experiments/orpo_hh.py --model.path=<folder of SmolLM2-135M> \\
        --data.train=hh_train.jsonl --data.eval=hh_eval.jsonl

Data, pod and flags as experiments/dpo_hh.py; a base model will do. `eval/nll` is to fall and `eval/log_odds_chosen` to
rise. Any setting is a flag: --objective.pair-loss.odds-coef=0.25 --model.lora.rank=0; see --help.
"""

from __future__ import annotations

from jaxrl_llm.algorithms.optimizer import OptimizerConfig
from jaxrl_llm.algorithms.preference_presets import orpo
from jaxrl_llm.config import ModelSource, OfflineDataConfig, OfflineExperiment
from jaxrl_llm.data.formats import PromptFormat
from jaxrl_llm.data.preferences import PreferenceFormat
from jaxrl_llm.models.config import LoraConfig
from jaxrl_llm.offline_cli import run_offline
from jaxrl_llm.training.offline import OfflineEvaluationConfig, OfflineTrainingConfig

CONFIG = OfflineExperiment(
    name="orpo_hh",
    objective=orpo(),
    model=ModelSource(remat="none", lora=LoraConfig(rank=16, alpha=32.0)),
    data=OfflineDataConfig(
        max_prompt_length=128,
        max_completion_length=64,
        overlong="drop",
        format=PreferenceFormat(prompt=PromptFormat(conversational=True), whole_dialogues=True),
    ),
    training=OfflineTrainingConfig(steps=60, rows_per_step=8, checkpoint_every=20),
    optimizer=OptimizerConfig(learning_rate=2e-4, schedule="linear", warmup_steps=6),
    evaluation=OfflineEvaluationConfig(every=20, max_rows=256),
)

if __name__ == "__main__":
    run_offline(CONFIG, description=__doc__ or "")
