"""KTO on human preferences (HH-RLHF, Bai et al. 2022), as single replies that are good or bad.

    python experiments/kto_hh.py --model.path=<folder of SmolLM2-135M-Instruct> \\
        --data.train=hh_train.jsonl --data.eval=hh_eval.jsonl

Data, pod and flags as experiments/dpo_hh.py; each pair becomes two samples, of which a step may hold any. Data of your
own have the columns prompt, completion and label: add --data.format.from-pairs=False; for unequal numbers of labels set
--objective.lambda-d and --objective.lambda-u (`kto_balance`). `eval/rewards/chosen` is to rise above
`eval/rewards/rejected`. Any setting is a flag: --objective.beta=0.2 --objective.baseline=other_side; see --help.
"""

from __future__ import annotations

from jaxrl_llm.algorithms.optimizer import OptimizerConfig
from jaxrl_llm.algorithms.preference_presets import kto
from jaxrl_llm.config import ModelSource, OfflineDataConfig, OfflineExperiment
from jaxrl_llm.data.formats import PromptFormat
from jaxrl_llm.data.preferences import PreferenceFormat
from jaxrl_llm.data.unpaired import UnpairedFormat
from jaxrl_llm.models.config import LoraConfig
from jaxrl_llm.offline_cli import run_offline
from jaxrl_llm.training.offline import OfflineEvaluationConfig, OfflineTrainingConfig

PAIRS = PreferenceFormat(prompt=PromptFormat(conversational=True), whole_dialogues=True)

CONFIG = OfflineExperiment(
    name="kto_hh",
    objective=kto(),
    model=ModelSource(remat="none", lora=LoraConfig(rank=16, alpha=32.0)),
    data=OfflineDataConfig(
        max_prompt_length=128,
        max_completion_length=64,
        overlong="drop",
        format=UnpairedFormat(from_pairs=True, pairs=PAIRS),
    ),
    training=OfflineTrainingConfig(steps=60, rows_per_step=16, checkpoint_every=20),
    optimizer=OptimizerConfig(learning_rate=2e-4, schedule="linear", warmup_steps=6),
    evaluation=OfflineEvaluationConfig(every=20, max_rows=256),
)

if __name__ == "__main__":
    run_offline(CONFIG, description=__doc__ or "")
