"""config.json of transformers 4 and 5 as GGUF hyperparameters, the ones that llama.cpp's converter writes."""

import json
import math
from pathlib import Path

import gguf
import numpy as np

from ksort_gguf.errors import KsortError
from ksort_gguf.families import Family, family_of_hf
from ksort_gguf.families.base import MAX_LAYERS

_PLAIN_ROPE = ("default", "none")
_MAX_COUNT = 2**31 - 1  # of what GGUF stores as uint32 and other programs read as int32


class HfConfig:
    """A parsed config.json. Properties raise KsortError naming the file and the key."""

    def __init__(self, path: Path):
        self.path = path
        self._config = read_json(path)
        architectures = self._config.get("architectures")
        if not isinstance(architectures, list) or not architectures:
            raise KsortError(f"{path}: key architectures is missing: name the model class, such as LlamaForCausalLM")
        self.architecture = str(architectures[0])
        self.family: Family = family_of_hf(self.architecture, str(path))
        self._refuse_unsupported()

    def _refuse_unsupported(self) -> None:
        if self._config.get("quantization_config"):
            raise KsortError(f"{self.path}: the checkpoint is quantized: use the original weights")
        activation = self._config.get("hidden_act", "silu")
        if activation != "silu":
            raise KsortError(f"{self.path}: hidden_act {activation!r} is not supported (silu is)")
        if self.rope_type not in (*_PLAIN_ROPE, "linear", "llama3"):
            raise KsortError(f"{self.path}: RoPE type {self.rope_type!r} is not supported (default, linear, llama3)")

    def count(self, key: str) -> int:
        """A positive integer that must be there."""
        value = self._config.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _MAX_COUNT:
            raise KsortError(f"{self.path}: key {key} is {value!r}, expected a positive integer")
        return value

    def number(self, key: str, value: object) -> float:
        """`value`, found under `key`, as a positive float."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise KsortError(f"{self.path}: key {key} is {value!r}, expected a positive number")
        return float(value)

    @property
    def n_layers(self) -> int:
        """Layers of the model."""
        n_layers = self.count("num_hidden_layers")
        if n_layers > MAX_LAYERS:
            raise KsortError(f"{self.path}: key num_hidden_layers is {n_layers}, expected at most {MAX_LAYERS}")
        return n_layers

    @property
    def rope(self) -> dict:
        """RoPE parameters: rope_parameters (transformers 5), or rope_scaling and rope_theta (transformers 4)."""
        rope = self._config.get("rope_parameters") or self._config.get("rope_scaling") or {}
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            raise KsortError(
                f"{self.path}: RoPE parameters {rope!r} are not supported: expected one set for all layers"
            )
        if "rope_theta" in self._config:
            rope = {"rope_theta": self._config["rope_theta"], **rope}
        return rope

    @property
    def rope_type(self) -> str:
        """The kind of RoPE scaling: "default", "linear", "llama3", ..."""
        return str(self.rope.get("rope_type", self.rope.get("type", "default")))

    @property
    def head_dim(self) -> int:
        """Channels a head."""
        if self._config.get("head_dim") is not None:
            return self.count("head_dim")
        return self.count("hidden_size") // self.count("num_attention_heads")

    @property
    def n_heads(self) -> int:
        """Query heads."""
        return self.count("num_attention_heads")

    @property
    def n_kv_heads(self) -> int:
        """Key and value heads."""
        return self.n_heads if self._config.get("num_key_value_heads") is None else self.count("num_key_value_heads")

    @property
    def n_rot(self) -> int:
        """Rotated channels a head: all of them. transformers' Llama and Qwen2 ignore partial_rotary_factor."""
        if self.head_dim % 2:
            raise KsortError(f"{self.path}: head dimension {self.head_dim} is odd, so RoPE cannot pair its channels")
        return self.head_dim

    @property
    def is_tied(self) -> bool:
        """Whether the embedding also serves as the output projection."""
        return bool(self._config.get("tie_word_embeddings", False))

    @property
    def window(self) -> int:
        """Sliding attention window in tokens, 0 for none. Raises KsortError if it counts and not all layers have it."""
        window = self.count("sliding_window") if self._config.get("sliding_window") else 0
        layer_types = self._config.get("layer_types")
        if self.architecture == "MistralForCausalLM" and layer_types is None:
            return window
        if layer_types is None:
            slides = self._config.get("use_sliding_window", False)
            first = self._config.get("max_window_layers", self.n_layers) if slides else math.inf
            layer_types = [
                "sliding_attention" if layer >= first else "full_attention" for layer in range(self.n_layers)
            ]
        n_sliding = layer_types.count("sliding_attention") if window else 0
        if 0 < n_sliding < len(layer_types) and window < self.count("max_position_embeddings"):
            raise KsortError(
                f"{self.path}: {n_sliding} of {len(layer_types)} layers have a sliding window of {window}, which is "
                f"not supported: set max_position_embeddings to {window} at most, where the window changes nothing"
            )
        return window if n_sliding == len(layer_types) else 0

    def add_hyperparameters(self, writer: gguf.GGUFWriter) -> None:
        """Add the keys of the architecture, in the order of llama.cpp's converter."""
        writer.add_block_count(self.n_layers)
        writer.add_context_length(self.count("max_position_embeddings"))
        writer.add_embedding_length(self.count("hidden_size"))
        writer.add_feed_forward_length(self.count("intermediate_size"))
        writer.add_head_count(self.count("num_attention_heads"))
        if self._config.get("num_key_value_heads") is not None:
            writer.add_head_count_kv(self.count("num_key_value_heads"))
        if "rope_theta" in self.rope:
            writer.add_rope_freq_base(self.number("rope_theta", self.rope["rope_theta"]))
        writer.add_layer_norm_rms_eps(self.number("rms_norm_eps", self._config.get("rms_norm_eps")))
        if self._config.get("head_dim") is not None:
            writer.add_key_length(self.head_dim)
            writer.add_value_length(self.head_dim)
        if "vocab_size" in self.family.extra_keys:
            writer.add_vocab_size(self.count("vocab_size"))
        if "rope.dimension_count" in self.family.extra_keys:
            writer.add_rope_dimension_count(self.n_rot)
        if self.rope_type == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(self.number("factor", self.rope.get("factor")))
        if self.window:
            writer.add_sliding_window(self.window)

    def rope_factors(self) -> np.ndarray | None:
        """float32 [n_rot / 2] that divide RoPE's frequencies, for Llama 3's scaling; None for other types.

        Frequencies whose wavelength is below original_context / high_freq_factor stay, those above
        original_context / low_freq_factor are slowed by `factor`, and between them the slowing runs smoothly
        (transformers' rope type "llama3").
        """
        if self.rope_type != "llama3":
            return None
        rope = self.rope
        base = self.number("rope_theta", rope.get("rope_theta", 10000.0))
        factor = self.number("factor", rope.get("factor"))
        low = self.number("low_freq_factor", rope.get("low_freq_factor"))
        high = self.number("high_freq_factor", rope.get("high_freq_factor"))
        original_context = self.number(
            "original_max_position_embeddings", rope.get("original_max_position_embeddings", 8192)
        )
        if low >= high:
            raise KsortError(f"{self.path}: llama3 RoPE: low_freq_factor {low} is not below high_freq_factor {high}")
        exponents = np.arange(0, self.n_rot, 2, dtype=np.float32) / np.float32(self.n_rot)
        wavelengths = 2 * np.pi * np.float32(base) ** exponents
        smooth = np.clip((original_context / wavelengths - low) / (high - low), 0.0, 1.0)
        return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises KsortError naming it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise KsortError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise KsortError(f"{path}: is not JSON ({error}): get it again") from None
    if not isinstance(value, dict):
        raise KsortError(f"{path}: is not a JSON object: get it again")
    return value
