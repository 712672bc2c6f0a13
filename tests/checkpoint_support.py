"""Tiny random Hugging Face checkpoints, made without torch."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

N_VOCAB, N_EMBD, N_FF, N_LAYERS, N_HEADS, N_KV_HEADS, HEAD_DIM = 40, 128, 48, 2, 4, 2, 32

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": N_EMBD,
    "intermediate_size": N_FF,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "num_key_value_heads": N_KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "vocab_size": N_VOCAB,
    "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"]}


def random_weights(
    rng: np.random.Generator, biases: bool = False, n_vocab: int = N_VOCAB, head_dim: int = HEAD_DIM
) -> dict[str, np.ndarray]:
    """All tensors of the configurations above, float32, under Hugging Face names."""
    q_rows, kv_rows = N_HEADS * head_dim, N_KV_HEADS * head_dim
    weights = {"model.embed_tokens.weight": (n_vocab, N_EMBD), "model.norm.weight": (N_EMBD,)}
    weights["lm_head.weight"] = (n_vocab, N_EMBD)
    for layer in range(N_LAYERS):
        prefix = f"model.layers.{layer}."
        for part, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
            weights[f"{prefix}self_attn.{part}_proj.weight"] = (rows, N_EMBD)
            if biases:
                weights[f"{prefix}self_attn.{part}_proj.bias"] = (rows,)
        weights[prefix + "self_attn.o_proj.weight"] = (N_EMBD, q_rows)
        weights[prefix + "mlp.gate_proj.weight"] = (N_FF, N_EMBD)
        weights[prefix + "mlp.up_proj.weight"] = (N_FF, N_EMBD)
        weights[prefix + "mlp.down_proj.weight"] = (N_EMBD, N_FF)
        weights[prefix + "input_layernorm.weight"] = (N_EMBD,)
        weights[prefix + "post_attention_layernorm.weight"] = (N_EMBD,)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in weights.items()}


def write_sentencepiece(path: Path, n_vocab: int):
    """Train a small SentencePiece BPE model with byte fallback, write it to `path`, and return its processor."""
    import sentencepiece

    path.parent.mkdir(parents=True, exist_ok=True)
    words = [f"{a}{b}{a}" for a in ("ka", "lo", "mi", "nu", "se") for b in ("ra", "ti", "wo", "pe")]
    sentences = [" ".join(words[i:] + words[:i]) for i in range(len(words))]
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=file, vocab_size=n_vocab, model_type="bpe",
            byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity", minloglevel=2,
        )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def write_checkpoint(directory: Path, config: dict, weights: dict[str, np.ndarray], n_shards: int = 1) -> Path:
    """Write config.json and one or many shards; returns `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if n_shards == 1:
        save_file(weights, directory / "model.safetensors")
        return directory
    names = list(weights)
    weight_map = {}
    for shard in range(n_shards):
        file = f"model-{shard + 1:05d}-of-{n_shards:05d}.safetensors"
        part = names[shard::n_shards]
        save_file({name: weights[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory
