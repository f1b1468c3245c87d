"""Files of models: Hugging Face folders, GGUF, PEFT adapters, tokenizers."""
