"""Reinforcement learning and preference training of language models in JAX.

The package is a set of rooms, each importing only those below it: pure functions of arrays
(`jaxrl_llm.losses`, `jaxrl_llm.advantages`), the sharded transformer (`jaxrl_llm.models`), the jitted sampler
(`jaxrl_llm.sampling`), update steps (`jaxrl_llm.algorithms`) and the trainer (`jaxrl_llm.training`).

This module imports nothing, so that `import jaxrl_llm.losses` costs other JAX code bases only JAX itself.
"""

__version__ = "0.1.0.dev0"
