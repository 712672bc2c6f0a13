"""config.json as GGUF hyperparameters: what llama.cpp's converter writes for every family, in its order."""

import gguf
import numpy as np

from ksort_gguf.checkpoint.config import HfConfig
from ksort_gguf.errors import KsortError, UnsupportedModelError

_ROPE_FREQS = "rope_freqs.weight"
_ROPE_KEYS = {  # parameters by RoPE type, beside those that all have
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("factor", "short_factor", "long_factor", "attention_factor", "original_max_position_embeddings"),
}
_EVERY_ROPE = ("rope_type", "type", "rope_theta", "finetuned")


def add_hyperparameters(
    config: HfConfig, writer: gguf.GGUFWriter, rope_types: tuple[str, ...] = ("linear", "llama3")
) -> None:
    """Sizes, head counts, RoPE and norms. Raises KsortError naming the key, UnsupportedModelError for other RoPE."""
    check_rope(config, config.rope_type(*rope_types))
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.count("max_position_embeddings"))
    writer.add_embedding_length(config.count("hidden_size"))
    writer.add_feed_forward_length(config.count("intermediate_size"))
    writer.add_head_count(config.n_heads)
    if config.value("num_key_value_heads") is not None:
        writer.add_head_count_kv(config.n_kv_heads)
    if "rope_theta" in config.rope:
        writer.add_rope_freq_base(config.rope_number("rope_theta"))
    writer.add_layer_norm_rms_eps(config.number("rms_norm_eps", config.value("rms_norm_eps")))
    if config.value("head_dim") is not None:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if config.rope_type(*rope_types) == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_number("factor"))


def add_rotated_sizes(config: HfConfig, writer: gguf.GGUFWriter) -> None:
    """What the converter adds for Llama and its heirs: the vocabulary's size, and that all channels are rotated."""
    writer.add_vocab_size(config.count("vocab_size"))
    writer.add_rope_dimension_count(config.head_dim)


def check_rope(config: HfConfig, rope_type: str, *more: str) -> None:
    """Raise UnsupportedModelError for a RoPE parameter that this type, or `more`, does not have."""
    known = {*_EVERY_ROPE, *_ROPE_KEYS[rope_type], *more}
    for key, value in config.rope.items():
        is_neutral = value is None or (key in ("partial_rotary_factor", "factor") and value == 1)
        if key not in known and not is_neutral:
            raise UnsupportedModelError(
                f"{config.path}: RoPE parameter {key} {value!r} is not supported for RoPE type {rope_type!r}"
            )


def rope_factors(config: HfConfig) -> dict[str, np.ndarray]:
    """The tensor rope_freqs.weight, float32 [head_dim / 2], that Llama 3's scaling makes; nothing for other types.

    Frequencies whose wavelength is below original_context / high_freq_factor stay, those above
    original_context / low_freq_factor are slowed by `factor`, and between them the slowing runs smoothly
    (transformers' rope type "llama3").
    """
    if config.rope_type("linear", "llama3") != "llama3":
        return {}
    base, factor = config.rope_number("rope_theta", 10000.0), config.rope_number("factor")
    low, high = config.rope_number("low_freq_factor"), config.rope_number("high_freq_factor")
    original_context = config.rope_number("original_max_position_embeddings", 8192)
    if low >= high:
        raise KsortError(f"{config.path}: llama3 RoPE: low_freq_factor {low} is not below high_freq_factor {high}")
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    wavelengths = 2 * np.pi * np.float32(base) ** exponents
    smooth = np.clip((original_context / wavelengths - low) / (high - low), 0.0, 1.0)
    return {_ROPE_FREQS: (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)}
