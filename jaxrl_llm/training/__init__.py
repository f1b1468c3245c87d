"""Training loops: data, sampling, rewards, updates, checkpoints and reports of a run."""

from jaxrl_llm.extras import require

require("orbax", "rich")
