"""Granite 3: like Llama, with multipliers of embeddings, attention scores, residuals and logits."""

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
    config.require("head_dim", config.count("hidden_size") // config.n_heads)  # transformers' Granite knows no other
    add_hyperparameters(config, writer)
    add_rotated_sizes(config, writer)
    for key, add in (
        ("attention_multiplier", writer.add_attention_scale),
        ("embedding_multiplier", writer.add_embedding_scale),
        ("residual_multiplier", writer.add_residual_scale),
        ("logits_scaling", writer.add_logit_scale),
    ):
        add(config.number(key, config.value(key, 1.0)))
    return rope_factors(config)


GRANITE = Family(
    name="granite",
    hf_architectures=("GraniteForCausalLM",),
    spec=partial(
        decoder,
        row_order="interleaved",
        differences=Differences(optional_biases=("q", "k", "v", "output"), multipliers=True),
    ),
    add_config=_add_config,
)
