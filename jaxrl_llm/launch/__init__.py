"""What every run begins and ends with: loading, its folder, its errors, its summary."""

from jaxrl_llm.extras import require

require("chex", "flax", "grain", "optax", "orbax", "rich", "safetensors", "transformers", "yaml")
