"""Qwen2 and Qwen2.5: like Llama with biases on the q, k and v projections."""

from functools import partial

import gguf
import numpy as np

from ksort_gguf.checkpoint.config import HfConfig
from ksort_gguf.models.decoder import Differences, decoder
from ksort_gguf.models.family import Family
from ksort_gguf.models.hf_values import add_hyperparameters, rope_factors


def _add_config(config: HfConfig, writer: gguf.GGUFWriter) -> dict[str, np.ndarray]:
    config.require("hidden_act", "silu")
    window = config.window()
    add_hyperparameters(config, writer)
    if window:
        writer.add_sliding_window(window)
    return rope_factors(config)


QWEN2 = Family(
    name="qwen2",
    hf_architectures=("Qwen2ForCausalLM",),
    spec=partial(decoder, row_order="half", differences=Differences(required_biases=("q", "k", "v"))),
    add_config=_add_config,
)
