"""Where models come from: GGUF files and Hugging Face checkpoints, as metadata and lazy tensors."""
