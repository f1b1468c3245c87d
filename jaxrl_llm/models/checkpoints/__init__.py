"""Files of models: Hugging Face folders, GGUF, PEFT adapters, tokenizers."""

from jaxrl_llm.extras import require

require("gguf", "jinja2", "safetensors", "transformers")
