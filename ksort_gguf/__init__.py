"""ksort-gguf: 4-bit block floating point key caches for GGUF models."""

__version__ = "0.1.0"
