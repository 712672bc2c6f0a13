"""GGUF files: values, reader, writer, and tensors that are read late. Knows no models and no plans."""
