"""Reinforcement learning and preference training of language models in JAX.

The package is a set of rooms, each importing only those below it: pure functions of arrays
(`jaxrl_llm.losses`, `jaxrl_llm.advantages`), the sharded transformer (`jaxrl_llm.models`), the jitted sampler
(`jaxrl_llm.sampling`), update steps (`jaxrl_llm.algorithms`) and the trainer (`jaxrl_llm.training`).

This module imports nothing before it is asked, so that `import jaxrl_llm.losses` costs other JAX code bases only JAX
itself; `from jaxrl_llm import load, train, generate` loads `jaxrl_llm.api`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxrl_llm.api import Completion, Evaluation, Policy, Trained, evaluate, generate, load, save, train

__version__ = "0.1.0.dev0"

__all__ = ["Completion", "Evaluation", "Policy", "Trained", "evaluate", "generate", "load", "save", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from jaxrl_llm import api

    return getattr(api, name)
