"""SmolLM3: like Llama, with every fourth layer without RoPE."""

from functools import partial

import gguf
import numpy as np

from ksort_gguf.checkpoint.config import HfConfig
from ksort_gguf.errors import UnsupportedModelError
from ksort_gguf.models.decoder import Differences, decoder
from ksort_gguf.models.family import Family
from ksort_gguf.models.hf_values import add_hyperparameters, add_rotated_sizes, rope_factors

_NO_ROPE_INTERVAL = 4  # GGUF has no key for it


def _has_rope(layer: int) -> bool:
    return (layer + 1) % _NO_ROPE_INTERVAL != 0


def _add_config(config: HfConfig, writer: gguf.GGUFWriter) -> dict[str, np.ndarray]:
    config.require("hidden_act", "silu")
    config.require("mlp_bias", False)
    config.ignore("attention_bias")  # tensors say it
    config.set_default("tie_word_embeddings", True)
    interval = config.count("no_rope_layer_interval", _NO_ROPE_INTERVAL)
    layers = range(config.n_layers)
    has_rope = config.value("no_rope_layers", [int((layer + 1) % interval != 0) for layer in layers])
    if has_rope != [int(_has_rope(layer)) for layer in layers]:
        raise UnsupportedModelError(
            f"{config.path}: no_rope_layers {has_rope!r} is not supported (every {_NO_ROPE_INTERVAL}th layer is)"
        )
    if config.window():
        raise UnsupportedModelError(f"{config.path}: sliding_window is not supported for {config.architecture}")
    config.set_rope_default("rope_theta", 2000000.0)
    add_hyperparameters(config, writer)
    add_rotated_sizes(config, writer)
    return rope_factors(config)


SMOLLM3 = Family(
    name="smollm3",
    hf_architectures=("SmolLM3ForCausalLM",),
    spec=partial(
        decoder,
        row_order="interleaved",
        differences=Differences(optional_biases=("q", "k", "v", "output"), has_rope=_has_rope),
    ),
    add_config=_add_config,
)
