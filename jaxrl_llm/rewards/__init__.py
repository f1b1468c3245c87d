"""Reward functions: plain Python on strings, with the signature `f(prompts, completions, **columns)`.

Each returns one float a sample, or None where it does not apply. `prompts` and `completions` are lists with
one entry a sample (texts, or lists of messages where the prompt is one), every column of the data set arrives
as such a list under its own name, and `completion_ids` holds the sampled token ids. A reward of your own is any
function like that; its `__name__` names its metric:

    def short(prompts, completions, **columns):
        return [float(len(completion_text(completion)) < 100) for completion in completions]

As in TRL it is also given, where it names them or has `**columns`, `trainer_state` (`global_step`, `max_steps`,
`epoch`, …), `log_metric(name, value)` for a metric of its own, and `log_extra(column, values)` for what is
written beside each completion. `async def` functions are awaited together, while the others are called one after
another; `with_time_limit` bounds a slow one.
"""

from jaxrl_llm.rewards.format import make_regex_reward, make_think_answer_reward
from jaxrl_llm.rewards.gsm8k import gsm8k_reward, make_gsm8k_reward
from jaxrl_llm.rewards.length import make_length_reward
from jaxrl_llm.rewards.math import make_math_reward, math_reward
from jaxrl_llm.rewards.per_sample import RewardFunction, completion_text, make_per_sample_reward, reward_name
from jaxrl_llm.rewards.python_syntax import make_python_syntax_reward, python_syntax_reward
from jaxrl_llm.rewards.time_limit import with_time_limit

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
    "reward_name",
    "with_time_limit",
]
