"""Phi-3, Phi-3.5 and Phi-4: fused q, k, v and gate, up; RoPE of a part of each head; longrope."""

import math
from functools import partial

import gguf
import numpy as np

from ksort_gguf.checkpoint.config import HfConfig
from ksort_gguf.errors import KsortError
from ksort_gguf.models.decoder import Differences, decoder
from ksort_gguf.models.family import Family
from ksort_gguf.models.hf_values import check_rope


def _add_config(config: HfConfig, writer: gguf.GGUFWriter) -> dict[str, np.ndarray]:
    config.require("hidden_act", "silu")
    config.require("head_dim", config.count("hidden_size") // config.n_heads)  # GGUF has no key for another
    rope_type, rope = config.rope_type("longrope"), config.rope
    check_rope(config, rope_type, "partial_rotary_factor", "original_max_position_embeddings")
    context = config.count("max_position_embeddings")
    original = config.count("original_max_position_embeddings", 4096 if rope_type == "longrope" else context)
    original = int(config.rope_number("original_max_position_embeddings", original))
    share = config.number(
        "partial_rotary_factor", rope.get("partial_rotary_factor", config.value("partial_rotary_factor", 1))
    )
    n_rot = int(config.head_dim * share)
    writer.add_context_length(context)
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_embedding_length(config.count("hidden_size"))
    writer.add_feed_forward_length(config.count("intermediate_size"))
    writer.add_block_count(config.n_layers)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.number("rms_norm_eps", config.value("rms_norm_eps", 1e-5)))
    writer.add_rope_dimension_count(n_rot)
    writer.add_rope_freq_base(config.rope_number("rope_theta", 10000.0))
    writer.add_sliding_window(config.window(all_layers=True))
    if rope_type == "default":
        return {}
    scale = config.rope_number("factor", context / original)
    magnitude = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    writer.add_rope_scaling_attn_factors(config.rope_number("attention_factor", magnitude))
    factors = {}
    for length in ("long", "short"):
        values = rope.get(f"{length}_factor")
        if not isinstance(values, list) or len(values) != n_rot // 2:
            raise KsortError(f"{config.path}: longrope: {length}_factor is no list of {n_rot // 2} numbers")
        factors[f"rope_factors_{length}.weight"] = np.array(values, np.float32)
    return factors


PHI3 = Family(
    name="phi3",
    hf_architectures=("Phi3ForCausalLM",),
    spec=partial(decoder, row_order="half", differences=Differences(fused=True, longrope=True)),
    add_config=_add_config,
)
