"""Llama 1/2/3, Mistral and SmolLM."""

from functools import partial

import gguf
import numpy as np

from ksort_gguf.checkpoint.config import HfConfig
from ksort_gguf.models.decoder import Differences, decoder
from ksort_gguf.models.family import Family
from ksort_gguf.models.hf_values import add_hyperparameters, add_rotated_sizes, rope_factors


def _add_config(config: HfConfig, writer: gguf.GGUFWriter) -> dict[str, np.ndarray]:
    config.require("hidden_act", "silu")
    config.require("mlp_bias", False)
    config.ignore("attention_bias")  # tensors say it
    window = config.window(all_layers=config.architecture == "MistralForCausalLM")
    add_hyperparameters(config, writer)
    add_rotated_sizes(config, writer)
    if window:
        writer.add_sliding_window(window)
    return rope_factors(config)


LLAMA = Family(
    name="llama",
    hf_architectures=("LlamaForCausalLM", "LLaMAForCausalLM", "MistralForCausalLM"),
    spec=partial(decoder, row_order="interleaved", differences=Differences(optional_biases=("q", "k", "v", "output"))),
    add_config=_add_config,
)
