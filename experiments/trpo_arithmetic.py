"""TRPO from nothing: the task of grpo_arithmetic.py, with a natural-gradient step in place of the optimizer's.

    python experiments/trpo_arithmetic.py

Each batch makes one step, which goes as far as the trust region allows: the mean KL divergence of a token from the
policy before it is at most --trust-region.max-kl, whatever the reward's scale (trpo/kl in metrics.jsonl). There is no
learning rate: --optimizer.* has no effect.

Hardware: two CPU cores. Time: two and a half minutes, half a minute of it compilation (3 s a step).
Expected: accuracy on held-out problems from 0.442 to 0.578 after 20 of the 40 steps (seed 0), every step taken, the
divergence between 0.006 and 0.01 nats a token.
A smaller set of parameters: --trust-region.trainable=last_layers --trust-region.last-layers=1; see --help.
"""

from __future__ import annotations

from jaxrl_llm.algorithms.policy_gradient.estimators import GroupAdvantage
from jaxrl_llm.algorithms.policy_gradient.objective import PolicyGradient
from jaxrl_llm.algorithms.policy_gradient.surrogates import Clipped
from jaxrl_llm.algorithms.trust_region.step import TrustRegionConfig
from jaxrl_llm.config import DataConfig
from jaxrl_llm.launch.demo import ArithmeticExperiment, exact_answer, run_demo
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.training.episodes.evaluate import EvaluationConfig
from jaxrl_llm.training.on_policy import TrainingConfig

CONFIG = ArithmeticExperiment(
    name="trpo_arithmetic",
    rewards=(exact_answer,),
    algorithm=PolicyGradient(
        advantage=GroupAdvantage(scale="batch"),
        surrogate=Clipped(clip_low=None, clip_high=None),
        aggregation="token-mean",
    ),
    data=DataConfig(max_prompt_length=6),
    sampling=SamplingConfig(max_tokens=4),
    training=TrainingConfig(steps=40, prompts_per_step=96, samples_per_prompt=8, checkpoint_every=20, samples_every=20),
    evaluation=EvaluationConfig(every=20, max_prompts=500),
    trust_region=TrustRegionConfig(max_kl=0.01, damping=0.01, cg_iterations=10),
)


if __name__ == "__main__":
    run_demo(config=CONFIG, description=__doc__ or "")
