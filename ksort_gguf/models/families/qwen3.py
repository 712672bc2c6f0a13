"""Qwen3: RMSNorm of every query and key head before RoPE, with one gain for all heads of a layer.

A plan's step `order` cannot be folded past such a gain; plans are made without it (plan/make.py says so).
"""

from functools import partial

import gguf
import numpy as np

from ksort_gguf.checkpoint.config import HfConfig
from ksort_gguf.models.decoder import Differences, decoder
from ksort_gguf.models.family import Family
from ksort_gguf.models.hf_values import add_hyperparameters, rope_factors


def _add_config(config: HfConfig, writer: gguf.GGUFWriter) -> dict[str, np.ndarray]:
    config.require("hidden_act", "silu")
    config.require("attention_bias", False)
    config.set_default("head_dim", 128)
    window = config.window()
    add_hyperparameters(config, writer)
    if window:
        writer.add_sliding_window(window)
    return rope_factors(config)


QWEN3 = Family(
    name="qwen3",
    hf_architectures=("Qwen3ForCausalLM",),
    spec=partial(decoder, row_order="half", differences=Differences(qk_norm=True)),
    add_config=_add_config,
)
