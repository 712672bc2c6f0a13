"""What a model's keys do when no spec reads them: GGUF keys of an architecture and keys of config.json.

Each row of a table below is one rule and the names that it holds for. The rule says at which values a key does
nothing; a value that does something in one architecture counts as computing in all. A list does nothing if none of its
entries does anything; null in config.json means "not set", so it never does.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from fnmatch import fnmatchcase

import gguf

Rule = Callable[[object], bool]  # whether a key at this value does nothing
Rows = tuple[tuple[Rule, str], ...]


class Effect(Enum):
    """What a key at its value does to a model that does not read it."""

    INERT = "inert"  # nothing: a description, or at its neutral value
    COMPUTES = "computes"  # some architecture reads it, and it changes what a model computes
    UNKNOWN = "unknown"  # no architecture that we know of reads it


def _only(*values: object, entries: tuple[object, ...] | None = None) -> Rule:
    """Inert at `values`. `entries`: the inert values inside a list, where they differ from those of a lone value."""

    def is_inert(value: object) -> bool:
        if isinstance(value, (list, tuple)):
            return all(is_inert(entry) if entries is None else entry in entries for entry in value)
        return value in values

    return is_inert


def _always(value: object) -> bool:
    return True


def _never(value: object) -> bool:
    return False


_OFF = _only(0, "", {})  # False too
_ON = _only(1)  # True, or a factor of 1
_OFF_OR_ONE = _only(0, 1)  # a factor of 0 in GGUF is not set

_GGUF: Rows = (
    (_always, "vocab_size tensor_data_layout"),
    # sizes and bases
    (_never, "context_length embedding_length block_count feed_forward_length attention.head_count"),
    (_never, "attention.head_count_kv attention.key_length attention.value_length attention.layer_norm_rms_epsilon"),
    (_never, "attention.key_length_swa attention.value_length_swa rope.dimension_count rope.dimension_count_swa"),
    (_never, "rope.freq_base rope.freq_base_swa"),
    (_OFF, "embedding_length_out embedding_length_per_layer_input features_length attention.layer_norm_epsilon"),
    (_OFF, "attention.group_norm_epsilon attention.group_norm_groups"),
    # RoPE; finetuned=False means no RoPE at all in granite
    (_only("none", "linear", ""), "rope.scaling.type"),  # linear is the default of llama.cpp, its factor counts
    (_OFF_OR_ONE, "rope.scaling.factor rope.scale_linear rope.scale"),
    (_ON, "rope.scaling.attn_factor rope.scaling.yarn_attn_factor rope.scaling.yarn_beta_slow rope.scaling.finetuned"),
    (_only(-1), "rope.scaling.yarn_ext_factor"),  # "not set": 1 with yarn, else 0
    (_only(32), "rope.scaling.yarn_beta_fast"),
    (_OFF, "rope.scaling.original_context_length rope.scaling.alpha rope.scaling.yarn_log_multiplier"),
    (_OFF, "rope.dimension_sections"),
    # attention
    (_ON, "attention.causal attention.rope_pattern"),
    (_OFF, "attention.scale attention.output_scale attention.temperature_length attention.temperature_scale"),
    (_OFF_OR_ONE, "attention.value_scale"),
    (_OFF, "attn_logit_softcapping attention.clamp_kqv attention.clip_kqv attention.max_alibi_bias"),
    (_OFF, "attention.alibi_bias_max attention.relative_buckets_count attention.sliding_window"),
    (_OFF, "attention.shared_kv_layers attention.layer_indices"),
    (_only(1, entries=(0,)), "attention.sliding_window_pattern"),  # every n-th layer is dense; a list: does it slide
    (_OFF, "attention.q_lora_rank attention.kv_lora_rank attention.kv_lora_rank_swa attention.output_lora_rank"),
    (_OFF, "attention.decay_lora_rank attention.iclr_lora_rank attention.value_residual_mix_lora_rank"),
    (_OFF, "attention.gate_lora_rank attention.key_length_mla attention.value_length_mla attention.key_length_mla_swa"),
    (_OFF, "attention.value_length_mla_swa attention.output_group_count attention.indexer.head_count"),
    (_OFF, "attention.indexer.key_length attention.indexer.top_k attention.indexer.block_size"),
    (_OFF, "attention.indexer.local_blocks attention.indexer.types attention.indexer.kpool"),
    (_OFF, "attention.compress_rope_freq_base attention.compress_ratios"),
    (_ON, "attention.indexer.kpool_select_tail"),
    (_OFF, "attention.recurrent_layers attention.block_skip_connection attn_res.block_size"),
    (_OFF_OR_ONE, "full_attention_interval"),
    # scales and caps of the residual stream, norms, activation
    (_OFF_OR_ONE, "logit_scale residual_scale embedding_scale"),
    (_OFF, "final_logit_softcapping router_logit_softcapping use_parallel_residual swin_norm norm_before_residual"),
    (_OFF, "norm_before_fc rescale_every_n_layers swiglu_clamp_exp swiglu_clamp_shexp"),
    (_never, "hidden_activation activation.situ_beta xielu.alpha_n xielu.alpha_p xielu.beta xielu.eps"),
    (_OFF, "activation.situ_linear_beta"),
    (_only(-math.inf), "activation_sparsity_scale kda.gate_lower_bound"),
    # experts
    (_OFF, "expert_count expert_used_count expert_shared_count expert_group_count expert_group_used_count"),
    (_OFF, "expert_feed_forward_length expert_shared_feed_forward_length expert_chunk_feed_forward_length"),
    (_OFF, "expert_latent_length expert_weights_norm expert_gating_func expert_group_scale experts_per_group"),
    (_OFF_OR_ONE, "expert_weights_scale"),
    (_OFF, "moe_every_n_layers moe_latent_size interleave_moe_layer_step leading_dense_block_count hash_layer_count"),
    # other kinds of blocks and models
    (_OFF, "nextn_predict_layers n_deepstack_layers skip_loop_final_norm"),
    (_only(-1), "deepstack_mapping"),
    (_OFF_OR_ONE, "num_loops"),
    (_OFF, "hrm.layers_per_stack hrm.h_cycles hrm.l_cycles hrm.prefix_lm altup.active_idx altup.num_inputs"),
    (_OFF, "hyper_connection.count hyper_connection.sinkhorn_iterations hyper_connection.epsilon"),
    (_OFF, "hyper_connection.magnitude hyper_connection.low_rank ple.layers ple.ngram_size ple.heads_per_ngram"),
    (_OFF, "ple.conv_kernel ple.layer_multipliers ple.head_offsets ple.head_vocab_sizes ple.eos_token_id"),
    (_OFF, "ple.image_token_id ssm.conv_kernel ssm.inner_size ssm.state_size ssm.time_step_rank ssm.group_count"),
    (_OFF, "ssm.dt_b_c_rms kda.head_dim kda.safe_gate wkv.head_size token_shift_count time_mix_extra_dim"),
    (_OFF, "time_decay_extra_dim shortconv.l_cache posnet.embedding_length posnet.block_count"),
    (_OFF, "convnext.embedding_length convnext.block_count decoder_block_count"),
    (_only(-1, 2**32 - 1), "decoder_start_token_id"),  # no token, read as signed or unsigned
    (_OFF, "adapters.count adapters.token_ids_activate adapters.token_ids_substitute adapters.lora_rank"),
    (_OFF, "adapters.router_gain target_layers target_hidden_size block_size conv_kernel_size conv_group_size"),
    (_OFF, "selector_rank selector_top_k sample_from_anchor has_confidence_head"),
    (_only(0, -1, 2**32 - 1), "pooling_type classifier.pooling_type"),  # none, unspecified
    (_OFF, "classifier.output_labels dense_2_feat_in dense_2_feat_out dense_3_feat_in dense_3_feat_out"),
)

_CONFIG: Rows = (
    # descriptions and files
    (_always, "architectures model_type auto_map transformers_version transformers.js_config is_llama_config"),
    (_always, "_name_or_path name_or_path _commit_hash torch_dtype dtype use_bfloat16 torchscript tokenizer_class"),
    (_always, "vocab_size max_sequence_length model_max_length max_seq_len seq_length max_context_length n_ctx"),
    (_always, "id2label label2id num_labels problem_type task_specific_params finetuning_task prefix is_decoder"),
    (_always, "bos_token eos_token pad_token unk_token chat_template keys_to_ignore_at_inference unsloth_* languages"),
    (_always, "default_language ignore_keys_at_rope_validation context_length"),
    # how it is run or loaded, not what it computes; layers slide by other keys than max_window_layers
    (_always, "_attn_implementation* attn_implementation _experts_implementation* use_flash_att*"),
    (_always, "_flash_attn_2_enabled use_cache cache_implementation pretraining_tp chunk_size_feed_forward"),
    (_always, "num_logits_to_keep tie_encoder_decoder cross_attention_hidden_size max_window_layers use_mem_eff_path"),
    (_always, "attention_softmax_in_fp32 scale_attention_softmax_in_fp32 softmax_in_fp32 residual_in_fp32"),
    (_always, "reorder_and_upcast_attn slow_but_exact use_mambapy use_mamba_kernels use_associative_scan"),
    (_always, "tf_legacy_loss enable_lm_head_fp32 norm_reduction_force_float32"),
    # training
    (_always, "initializer_* *_initializer_range init_std init_device *_init_std rescale_prenorm_residual seed"),
    (_always, "dropout dropout_p *_dropout *_pdrop *_dropout_prob *_dropout_p layerdrop *_layerdrop layer_dropout"),
    (_always, "*aux_loss* seq_aux *z_loss* *_loss_scaling_factor *jitter_noise disable_ngram_loss lambda_std_dev"),
    (_always, "gradient_checkpointing* learnable_sink_init *init_variance_scale mask_feature_* mask_time_*"),
    (_always, "apply_spec_augment"),
    # generation, and heads for other tasks
    (_always, "output_attentions _output_attentions output_hidden_states output_router_logits output_scores"),
    (_always, "output_past return_dict* use_return_dict *_token_id *_token_ids *_token_index max_length min_length"),
    (_always, "do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p"),
    (_always, "repetition_penalty length_penalty exponential_decay_length_penalty no_repeat_ngram_size"),
    (_always, "encoder_no_repeat_ngram_size bad_words_ids num_return_sequences suppress_tokens begin_suppress_tokens"),
    (_always, "remove_invalid_values summary_* classifier_* start_n_top end_n_top"),
    # sizes and choices of which every value counts
    (_never, "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"),
    (_never, "max_position_embeddings original_max_position_embeddings rms_norm_eps layer_norm_eps norm_eps eps"),
    (_never, "layer_norm_epsilon layernorm_epsilon norm_epsilon mixer_rms_eps norm_type normalization* final_norm"),
    (_never, "tie_word_embeddings hidden_act hidden_activation activation activation_function *_act *_activation afn"),
    (_never, "n_embd n_embed n_head n_heads n_layer n_layers n_inner n_ff n_rot n_positions d_model d_head d_inner"),
    (_never, "d_ff d_kv dff dim dim_* model_dim hidden_dim ffn_dim* head_size num_layers num_heads num_kv_heads"),
    (_never, "n_kv_heads kv_n_heads n_head_kv multi_query_group_num num_query_groups num_query_heads kv_channels"),
    (_never, "*embedding_size embedding_dim emb_dim word_embed_proj_dim *ffn_hidden_size feed_forward_size"),
    (_never, "expansion_ratio d_rel num_*_heads_per_layer num_attention_groups num_transformer_layers"),
    (_never, "attention_head_size n_embd_* attention_heads attention_hidden_size projection_head_dim multi_query*"),
    (_never, "*_vocab_size attention_head_dim"),
    # RoPE
    (_never, "rope_theta rope_local_base_freq *_rope_theta rope_*theta* *rope_base* rope_type rope_freq_* rotary_dim"),
    (_ON, "partial_rotary_factor* rotary_pct rope_pct rope_percent rotary_percentage rotary_emb_fraction rope_ratio"),
    (_ON, "use_rope use_rotary use_rotary_embedding rope_scaling_factor interpolate_factor"),
    (_only(1), "no_rope_layers"),  # an entry per layer, 1 where there is RoPE
    (_OFF, "no_rope_layer_interval nope_* rope_interleave* rope_traditional use_mrope mrope* use_dynamic_ntk"),
    (_OFF, "rotary_value rotary_emb_* alibi use_alibi learned_pos_emb use_learned_position_embeddings"),
    (_OFF, "sinusoidal_embeddings *position_bias* use_long_context use_mem_rope rope_2d* relative_* rel_*"),
    (_OFF, "attn_rotary_emb yarn"),
    (_only("rope", "rotary"), "position_embedding_type"),
    # attention: which tokens
    (_OFF, "sliding_window use_sliding_window use_swa sliding_window_size sliding_windows sliding_window_layout"),
    (_OFF, "attention_chunk_size window_size window_* attention_window_size keep_window_size local_* *_local_*"),
    (_OFF, "global_* attention_layers attention_types *attention_type* attn_type use_bidirectional_attention"),
    (_OFF, "bidirectional prefix_lm bi_data *full_attn_idxs *full_attn_layers *attn_layer_ind* attn_layer* swa_*"),
    (_OFF, "use_logn_attn *blocksparse* *sparse_attention* cross_attention_layers"),
    (_OFF_OR_ONE, "sliding_window_pattern _sliding_window_pattern full_attention_interval full_attn_mod"),
    (_only("full_attention", "attention"), "layer_types layers_block_type block_types"),
    (_ON, "is_causal causal"),
    # attention: scores and values
    (_OFF, "*softcap* *soft_cap* clip_qkv clamp_kqv *qk_norm* *qk_layernorm *_only_layernorm *qk_l2_* qk_clip* *sink*"),
    (_never, "query_pre_attn_scalar attention_multiplier attention_scale attn_multiplier softmax_scale scale_depth"),
    (_ON, "scale_attn_weights scale_attn attention_value_scale attn_value_scale qk_scale_factor"),
    (_OFF, "scale_attn_by_inverse_layer_idx attn_scale attn_temperature* floor_scale log_scal* llama_4_scaling*"),
    (_OFF, "*_gate gate_* *gating* *gated_* output_gate_type use_attention_gate lambda_* attention_k_eq_v"),
    (_OFF, "num_kv_shared_layers use_cla cla_* *kv_shar* *lora_rank* n_lora_* *low_rank_dim apply_mla* mla_* use_dsa"),
    (_OFF, "qk_*_dim qk_head_dim v_head_dim index_* indexer_* o_groups compress_* num_global_key_value_heads"),
    # scales
    (_ON, "*_multiplier *_multipliers logit_scale logits_scale logits_scaling embedding_scale scale_emb embed_scale"),
    (_ON, "*multiplier_scale attention_output_scale residual_scale route_scale *routed_scaling_factor"),
    (_ON, "embedding_fraction mup_width_scale *_alpha_factor *_beta_factor layernorm_*_alpha layernorm_*_beta"),
    (_ON, "router_scaling_factor input_embedding_scale"),
    (_OFF, "scale_embedding* normalize_embedding* rescale_* use_mup mup_enabled mup_use_scaling mup_denominator"),
    (_never, "mup_* *_dim_factor"),
    # biases
    (_OFF, "bias use_bias enable_bias *_bias add_bias_linear bias_*"),
    (_ON, "no_bias"),
    # norms and the shape of a block
    (_OFF, "use_parallel_residual parallel_residual *parallel_attn* new_decoder_architecture parallel_block"),
    (_OFF, "apply_residual_connection_post_layernorm use_post_norm use_sandwich_norm post_norm *_post_norm swin_norm"),
    (_OFF, "*peri_norm* layernorm_embedding *bskcn* add_cross_attention is_encoder_decoder add_out_norm norm_head"),
    (_OFF, "_remove_final_layer_norm post_layer_norm norm_after* norm_before* pruned_heads block_configs block_size"),
    (_OFF, "swiglu_* *situ_* activation_sparsity_pattern gelu_activation mlp_only_layers group_norm_*"),
    (_OFF, "use_double_wide_mlp"),
    (_ON, "do_layer_norm_before pre_norm prenorm layer_norm_elementwise_affine"),
    (_only("dense"), "mlp_layer_types"),
    # experts
    (_OFF, "*expert* moe_* *_moe *_moe_* moe *router* is_moe first_*k_dense_replace num_dense_layers route_norm"),
    (_OFF, "decoder_sparse_step n_group topk_group topk_method scor*_func* norm_topk* num_hash_layers"),
    (_OFF, "dense_intermediate_size shared_intermediate_size prefix_dense_* intermediate_size_mlp use_dynamic_rsf"),
    # other kinds of layers, models in models, weights that need unpacking
    (_OFF, "*mamba* ssm_* *_ssm_* linear_* kda_* conv_* *_conv *conv_kernel* *conv1d* *short_conv* *_conv_states"),
    (_OFF, "*state_size d_state state_dim dt_rank time_* expand chunk_size n_groups hybrid_* lru_* wkv_* *delta*"),
    (_OFF, "*lightning* *recurrent* num_loops loop_* *_loop_* *_loops num_mem_blocks layer_group_size n_input_layers"),
    (_OFF, "n_output_layers num_nextn_predict_layers *mtp_* *medusa* *eagle* target_layer* target_hidden_size"),
    (_OFF, "*hyper_connection* cca_* hc_* altup_* laurel_rank *_per_layer_input *ngram* ple_* *attn_res* H_* L_*"),
    (_OFF, "*adapter* deepstack_* vision_* audio_* speech_* text_config llm_config lm_config language_config"),
    (_OFF, "*coder_config *ker_config *_processor embd_layer type_vocab_size *_layer_config *coder_layers attn_config"),
    (_OFF, "ffn_config per_layer_config _heterogeneity_spec quantization* compression_config quant_* quantized_*"),
)

_ROPE_DICTS = ("rope_scaling", "rope_parameters")  # transformers 4 and 5
_ROPE: Rows = (
    (_always, "finetuned"),
    (_only("default", ""), "rope_type type"),
    (_ON, "factor partial_rotary_factor beta_slow truncate"),
    (_only(32), "beta_fast"),
    (_OFF, "mscale mscale_all_dim mrope_section *mrope_* *_section alpha llama_4_scaling_beta"),
    (_never, "rope_theta attention_factor attn_factor original_max_position_embeddings extrapolation_factor"),
    (_never, "low_freq_factor high_freq_factor short_factor long_factor short_mscale long_mscale"),
)


def _table(rows: Rows, more_names: Iterable[str] = ()) -> dict[str, Rule]:
    """The rule of each name or pattern. Those of `more_names` that have no row are never inert."""
    table = {name: rule for rule, names in rows for name in names.split()}
    return {**table, **{name: _never for name in more_names if name not in table}}


def _gguf_names(keys: type) -> Iterator[str]:
    """The architecture's keys that the gguf package knows, without their prefix and with * for a part that varies."""
    for value in vars(keys).values():
        if isinstance(value, type):
            yield from _gguf_names(value)
        elif isinstance(value, str) and value.startswith("{arch}."):
            yield re.sub(r"\{\w+\}", "*", value.removeprefix("{arch}."))


_GGUF_TABLE = _table(_GGUF, _gguf_names(gguf.Keys))
_CONFIG_TABLE = _table(_CONFIG)
_ROPE_TABLE = _table(_ROPE)


def _effect(table: Mapping[str, Rule], name: str, value: object) -> Effect:
    """By the rule of the whole name, else of the first pattern that fits."""
    patterns = ((pattern, rule) for pattern, rule in table.items() if "*" in pattern)
    rule = table.get(name) or next((rule for pattern, rule in patterns if fnmatchcase(name, pattern)), None)
    if rule is None:
        return Effect.UNKNOWN
    return Effect.INERT if rule(value) else Effect.COMPUTES


def gguf_key_effect(suffix: str, value: object) -> Effect:
    """What a key of a GGUF file does that no spec reads.

    `suffix` is its name without the architecture's prefix ("rope.freq_base"), or the whole name where llama.cpp has no
    prefix ("xielu.beta"). `value` is a plain value, a list or an array of numpy, which may have an entry per layer.
    """
    tolist = getattr(value, "tolist", None)
    return _effect(_GGUF_TABLE, suffix, tolist() if callable(tolist) else value)


def config_key_effect(key: str, value: object) -> Effect:
    """What a key of a Hugging Face config.json does that no spec reads. `value` is as `json` parses it.

    A key inside of rope_scaling or rope_parameters is asked for with dots: "rope_scaling.factor",
    "rope_parameters.sliding_attention.rope_theta". The whole of either is inert if all that it holds is.
    """
    if value is None:
        return Effect.INERT
    if key.partition(".")[0] not in _ROPE_DICTS:
        return _effect(_CONFIG_TABLE, key, value)
    if isinstance(value, dict):
        effects = {config_key_effect(f"{key}.{name}", entry) for name, entry in value.items()}
        return next((effect for effect in (Effect.COMPUTES, Effect.UNKNOWN) if effect in effects), Effect.INERT)
    if key in _ROPE_DICTS:
        return Effect.COMPUTES
    return _effect(_ROPE_TABLE, key.rpartition(".")[2], value)
