"""Algorithms: objectives as frozen records, and the update steps that they compile into."""

from jaxrl_llm.extras import require

require("chex", "flax", "optax")
