"""Running an experiment: what an experiment file calls, whichever module of `launch/` it lives in."""

from jaxrl_llm.launch.errors import plain_errors, train
from jaxrl_llm.launch.evaluation import Evaluation, evaluate
from jaxrl_llm.launch.evaluation_command import run_evaluation
from jaxrl_llm.launch.folder import run_setup, start, write_config
from jaxrl_llm.launch.generation import Completion, generate
from jaxrl_llm.launch.loading import Policy, load_model, load_policy, load_prompts, load_rows
from jaxrl_llm.launch.offline import OFFLINE_PANELS, make_offline_trainer, parse_offline, run_offline
from jaxrl_llm.launch.on_policy import make_trainer, parse, run
from jaxrl_llm.launch.stages import with_reward_head, with_step_head
from jaxrl_llm.launch.star import make_star_trainer, run_star
from jaxrl_llm.launch.summary import finish

__all__ = [
    "OFFLINE_PANELS",
    "Completion",
    "Evaluation",
    "Policy",
    "evaluate",
    "finish",
    "generate",
    "load_model",
    "load_policy",
    "load_prompts",
    "load_rows",
    "make_offline_trainer",
    "make_star_trainer",
    "make_trainer",
    "parse",
    "parse_offline",
    "plain_errors",
    "run",
    "run_evaluation",
    "run_offline",
    "run_setup",
    "run_star",
    "start",
    "train",
    "with_reward_head",
    "with_step_head",
    "write_config",
]
