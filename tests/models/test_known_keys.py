"""What keys do that no spec reads: what real models hold is accepted, what would change their answer is not."""

import gguf
import numpy as np
import pytest

from ksort_gguf.models.known_keys import Effect, config_key_effect, gguf_key_effect

# Keys that families read, without the architecture's prefix.
GGUF_READ = {
    *("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count"),
    *("attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.sliding_window"),
    *("attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base", "rope.scaling.type"),
    *("rope.scaling.factor", "rope.scaling.attn_factor", "rope.scaling.original_context_length"),
}
GRANITE_READ = {"attention.scale", "residual_scale", "embedding_scale", "logit_scale"}

# What llama.cpp's converters write for a family, and what older converters and quantizers added.
CONVERTED_BASE: dict[str, object] = {
    "block_count": 28,
    "context_length": 40960,
    "embedding_length": 2048,
    "feed_forward_length": 6144,
    "attention.head_count": 16,
    "attention.head_count_kv": 8,
    "rope.freq_base": 1000000.0,
    "attention.layer_norm_rms_epsilon": 1e-6,
}
HEAD_DIM: dict[str, object] = {"attention.key_length": 128, "attention.value_length": 128}
LLAMA_ONLY: dict[str, object] = {"vocab_size": 128256, "rope.dimension_count": 128}
LINEAR: dict[str, object] = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
YARN = LINEAR | {"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 32768}
CONVERTED: dict[str, dict[str, object]] = {
    "llama": CONVERTED_BASE | HEAD_DIM | LLAMA_ONLY | LINEAR,
    "llama of Meta's files": CONVERTED_BASE | LLAMA_ONLY | {"tensor_data_layout": "Meta AI original pth"},
    "llama saved without experts": CONVERTED_BASE
    | LLAMA_ONLY
    | {"expert_count": 0, "expert_used_count": 0, "attention.causal": True, "rope.scaling.finetuned": True},
    "qwen2": CONVERTED_BASE | YARN,
    "qwen3": CONVERTED_BASE | HEAD_DIM | YARN,
    "phi3": CONVERTED_BASE
    | {"rope.scaling.original_context_length": 4096, "rope.scaling.attn_factor": 1.19, "rope.dimension_count": 96}
    | {"attention.sliding_window": 262144},
    "phi4": CONVERTED_BASE | {"rope.scaling.original_context_length": 16384, "attention.sliding_window": 0},
    "smollm3": CONVERTED_BASE | LLAMA_ONLY,
    "granite": CONVERTED_BASE
    | LLAMA_ONLY
    | {"attention.scale": 0.015625, "embedding_scale": 12.0, "residual_scale": 0.22, "logit_scale": 8.0},
}

# Names of llama.cpp's table that gguf 0.19 does not have, or that have no prefix, at values that matter.
LLAMA_CPP_ONLY = {
    "rope.scale_linear": 4.0,
    "attention.rope_pattern": [1, 1, 1, 0],
    "attention.value_scale": 0.5,
    "attention.recurrent_layers": [0, 1],
    "attention.compress_ratios": [4, 0],
    "activation.situ_beta": 1.0,
    "adapters.count": 2,
    "deepstack_mapping": [-1, 0],
    "dense_2_feat_in": 768,
    "hidden_activation": "gelu",
    "hrm.h_cycles": 2,
    "hyper_connection.count": 4,
    "kda.gate_lower_bound": -5.0,
    "norm_before_residual": True,
    "num_loops": 2,
    "ple.layers": [1],
    "selector_top_k": 8,
    "target_layers": [1, 2],
    "xielu.alpha_p": [0.8, 0.8],
}

GGUF_COMPUTES = {
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "attention.scale": 0.1,
    "attention.causal": False,
    "attention.clamp_kqv": 8.0,
    "attention.max_alibi_bias": 8.0,
    "attention.sliding_window": 4096,
    "attention.sliding_window_pattern": 6,
    "attention.layer_norm_epsilon": 1e-5,
    "logit_scale": 0.0625,
    "embedding_scale": 12.0,
    "residual_scale": 0.22,
    "rope.scaling.type": "yarn",
    "rope.scaling.attn_factor": 1.19,
    "rope.scaling.finetuned": False,
    "rope.scaling.yarn_log_multiplier": 0.1,
    "rope.scaling.yarn_ext_factor": 0.0,
    "rope.dimension_sections": [16, 24, 24, 0],
    "rope.freq_base_swa": 10000.0,
    "use_parallel_residual": True,
    "expert_weights_scale": 2.5,
    "nextn_predict_layers": 1,
    "wkv.head_size": 64,
    "shortconv.l_cache": 3,
    "swiglu_clamp_exp": [0.0, 7.0],
    "activation_sparsity_scale": [0.0],
    "pooling_type": 3,
    "classifier.output_labels": ["yes", "no"],
}

GGUF_INERT = {
    "attn_logit_softcapping": 0.0,
    "attention.scale": 0.0,
    "attention.sliding_window": [0, 0],
    "attention.rope_pattern": 1,
    "logit_scale": 1.0,
    "embedding_scale": 0.0,
    "rope.scaling.type": "none",
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.yarn_ext_factor": -1.0,
    "rope.dimension_sections": [0, 0, 0, 0],
    "swiglu_clamp_exp": [0.0, 0.0],
    "decoder_start_token_id": 2**32 - 1,
    "pooling_type": 0,
}

# config.json of models on the hub. What their families read is left out.
LLAMA_CONFIG: dict[str, object] = {
    "_name_or_path": "meta-llama/Llama-3.2-1B",
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008],
    "initializer_range": 0.02,
    "mlp_bias": False,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rope_scaling": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0",
    "use_cache": True,
    "vocab_size": 128256,
}
HUB_CONFIGS: dict[str, dict[str, object]] = {
    "Llama": LLAMA_CONFIG | {"max_sequence_length": 2048, "pad_token_id": -1},
    "transformers 5": LLAMA_CONFIG | {"dtype": "float16", "rope_parameters": {"rope_type": "default"}},
    "Mistral": LLAMA_CONFIG | {"sliding_window": None},
    "Qwen2.5": LLAMA_CONFIG | {"max_window_layers": 21, "use_mrope": False, "use_sliding_window": False},
    "Qwen3": LLAMA_CONFIG
    | {"max_window_layers": 28, "sliding_window": None, "use_sliding_window": False}
    | {"layer_types": ["full_attention", "full_attention"]},
    "Phi-4-mini": LLAMA_CONFIG
    | {"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    | {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False},
    "SmolLM2": LLAMA_CONFIG
    | {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}},
    "SmolLM3": LLAMA_CONFIG | {"max_window_layers": 28, "use_sliding_window": False, "pretraining_tp": 2},
    "tuned": LLAMA_CONFIG | {"unsloth_version": "2025.1", "_attn_implementation_autoset": True, "id2label": {"0": "x"}},
    "written whole by transformers 4": LLAMA_CONFIG
    | {"add_cross_attention": False, "bad_words_ids": None, "chunk_size_feed_forward": 0, "do_sample": False}
    | {"is_decoder": False, "is_encoder_decoder": False, "length_penalty": 1.0, "max_length": 20, "pruned_heads": {}}
    | {"output_attentions": False, "temperature": 1.0, "top_k": 50, "typical_p": 1.0, "tie_encoder_decoder": False},
}

CONFIG_COMPUTES = {
    "alibi": True,
    "apply_residual_connection_post_layernorm": True,
    "attention_bias": True,
    "attention_chunk_size": 8192,
    "attention_multiplier": 1.0,
    "attn_logit_softcapping": 50.0,
    "clip_qkv": 8.0,
    "embedding_multiplier": 12.0,
    "final_logit_softcapping": 30.0,
    "full_attn_mod": 2,
    "hidden_activation": "gelu_pytorch_tanh",
    "kv_lora_rank": 512,
    "layer_norm_eps": 1e-5,
    "layer_types": ["full_attention", "sliding_attention"],
    "lm_head_bias": True,
    "logit_scale": 0.0625,
    "logits_scaling": 0.0,
    "mamba_d_conv": 4,
    "mlp_bias": True,
    "mup_width_multiplier": 8.0,
    "no_rope_layers": [1, 1, 1, 0],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_kv_shared_layers": 10,
    "num_local_experts": 8,
    "partial_rotary_factor": 0.5,
    "pruned_heads": {"0": [1]},
    "qk_layernorm": True,
    "quantization_config": {"quant_method": "gptq"},
    "query_pre_attn_scalar": 256,
    "residual_multiplier": 0.22,
    "rope_interleaved": True,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "rope_scaling.mscale_all_dim": 1.0,
    "rope_parameters.full_attention.partial_rotary_factor": 0.25,
    "scale_depth": 1.4,
    "scale_emb": 12,
    "sliding_window": 4096,
    "use_bidirectional_attention": True,
    "use_parallel_residual": True,
    "use_qk_norm": True,
    "use_sliding_window": True,
}

CONFIG_INERT = {
    "attn_logit_softcapping": None,
    "layer_types": ["full_attention", "full_attention"],
    "logits_scaling": 1.0,
    "mlp_only_layers": [],
    "no_rope_layers": [1, 1],
    "num_local_experts": 0,
    "partial_rotary_factor": 1.0,
    "position_embedding_type": "rope",
    "quantization_config": None,
    "rope_scaling": {"type": "default", "factor": 1.0},
    "rope_scaling.beta_fast": 32,
    "scale_attn_weights": True,
}


def _keys_of_gguf(keys: type) -> list[str]:
    """Every "{arch}." string of the gguf package, with the dense modules of sentence-transformers filled in."""
    found = []
    for value in vars(keys).values():
        if isinstance(value, type):
            found += _keys_of_gguf(value)
        elif isinstance(value, str) and value.startswith("{arch}."):
            found.append(value.removeprefix("{arch}.").replace("{dense}", "dense_2"))
    return found


@pytest.mark.parametrize("suffix", _keys_of_gguf(gguf.Keys))
def test_every_key_of_the_gguf_package_computes_at_an_odd_value(suffix: str) -> None:
    is_description = suffix in ("vocab_size", "tensor_data_layout")
    assert gguf_key_effect(suffix, 7.25) is (Effect.INERT if is_description else Effect.COMPUTES)


@pytest.mark.parametrize("family", CONVERTED)
def test_what_converters_write_is_read_or_inert(family: str) -> None:
    read = GGUF_READ | (GRANITE_READ if family == "granite" else set())
    unread = {suffix: value for suffix, value in CONVERTED[family].items() if suffix not in read}
    assert {suffix: gguf_key_effect(suffix, value) for suffix, value in unread.items()} == dict.fromkeys(
        unread, Effect.INERT
    )


@pytest.mark.parametrize(("suffix", "value"), (LLAMA_CPP_ONLY | GGUF_COMPUTES).items())
def test_gguf_keys_that_matter_compute(suffix: str, value: object) -> None:
    assert gguf_key_effect(suffix, value) is Effect.COMPUTES


@pytest.mark.parametrize(("suffix", "value"), GGUF_INERT.items())
def test_gguf_keys_at_their_neutral_value_are_inert(suffix: str, value: object) -> None:
    assert gguf_key_effect(suffix, value) is Effect.INERT


def test_a_pattern_of_windows_means_something_else_as_a_list() -> None:
    """One number n makes every n-th layer dense, a list says for each layer whether it slides."""
    suffix = "attention.sliding_window_pattern"
    assert gguf_key_effect(suffix, 1) is gguf_key_effect(suffix, [0, 0]) is Effect.INERT
    assert gguf_key_effect(suffix, 0) is gguf_key_effect(suffix, [1, 0]) is Effect.COMPUTES


def test_arrays_of_numpy_are_read() -> None:
    assert gguf_key_effect("logit_scale", np.float32(1)) is Effect.INERT
    assert gguf_key_effect("swiglu_clamp_exp", np.array([0, 7], np.float32)) is Effect.COMPUTES


@pytest.mark.parametrize("name", ["frobnicate", "attention.frobnicate", "rope.scaling"])
def test_other_keys_are_unknown(name: str) -> None:
    assert gguf_key_effect(name, 1.0) is Effect.UNKNOWN


@pytest.mark.parametrize("model", HUB_CONFIGS)
def test_configs_of_the_hub_hold_nothing_that_computes(model: str) -> None:
    config = HUB_CONFIGS[model]
    assert {key: config_key_effect(key, value) for key, value in config.items()} == dict.fromkeys(config, Effect.INERT)


@pytest.mark.parametrize(("key", "value"), CONFIG_COMPUTES.items())
def test_config_keys_that_matter_compute(key: str, value: object) -> None:
    assert config_key_effect(key, value) is Effect.COMPUTES


@pytest.mark.parametrize(("key", "value"), CONFIG_INERT.items())
def test_config_keys_at_their_neutral_value_are_inert(key: str, value: object) -> None:
    assert config_key_effect(key, value) is Effect.INERT


@pytest.mark.parametrize("key", ["frobnicate", "rope_scaling.frobnicate"])
def test_other_config_keys_are_unknown(key: str) -> None:
    assert config_key_effect(key, 1.0) is Effect.UNKNOWN


def test_an_unknown_part_of_rope_scaling_makes_it_unknown() -> None:
    assert config_key_effect("rope_scaling", {"type": "default", "frobnicate": 1}) is Effect.UNKNOWN
