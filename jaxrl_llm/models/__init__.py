"""The decoder-only transformer, its configuration, and loading and saving of checkpoints."""

from jaxrl_llm.extras import require

require("flax")
