"""Reward functions: plain Python on strings, with the signature `f(prompts, completions, **columns)`.

Each returns one float a sample, or None where it does not apply. `prompts` and `completions` are lists with
one entry a sample, every column of the data set arrives as such a list under its own name, and
`completion_ids` holds the sampled token ids. A reward of your own is any function like that; its `__name__`
names its metric:

    def short(prompts, completions, **columns):
        return [float(len(completion) < 100) for completion in completions]
"""

from jaxrl_llm.rewards.format import make_regex_reward, make_think_answer_reward
from jaxrl_llm.rewards.gsm8k import gsm8k_reward, make_gsm8k_reward
from jaxrl_llm.rewards.length import make_length_reward
from jaxrl_llm.rewards.math import make_math_reward, math_reward
from jaxrl_llm.rewards.per_sample import RewardFunction, completion_text, make_per_sample_reward
from jaxrl_llm.rewards.python_syntax import make_python_syntax_reward, python_syntax_reward

__all__ = [
    "RewardFunction",
    "completion_text",
    "gsm8k_reward",
    "make_gsm8k_reward",
    "make_length_reward",
    "make_math_reward",
    "make_per_sample_reward",
    "make_python_syntax_reward",
    "make_regex_reward",
    "make_think_answer_reward",
    "math_reward",
    "python_syntax_reward",
]
