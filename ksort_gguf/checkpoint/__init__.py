"""Hugging Face checkpoints as they are: config, vocabulary, safetensors. Knows no families."""
