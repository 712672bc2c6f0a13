"""Small valid models, and damaged copies of them."""

import json
import random
import shutil
import struct
from pathlib import Path

import gguf
import numpy as np
from mutations import mutate_bytes, mutate_json
from safetensors.numpy import save_file

LAYER_TENSORS = {
    "attn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32),
    "ffn_norm": (32,), "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64),
}  # fmt: skip
HF_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "vocab_size": 11, "hidden_act": "silu", "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
INDEX = "model.safetensors.index.json"


def write_gguf(path: Path) -> None:
    """A llama of one layer, written by the gguf package: float and quantized tensors, strings, arrays."""
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *"abcdefgh"])
    writer.add_token_scores([0.0] * 11)
    writer.add_token_types([2, 3, 3] + [1] * 8)
    shapes = {"token_embd": (11, 32), "output_norm": (32,)}
    shapes |= {f"blk.0.{name}": shape for name, shape in LAYER_TENSORS.items()}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32)
        if name == "blk.0.ffn_gate":
            q8_0 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, q8_0), raw_dtype=q8_0)
        else:
            writer.add_tensor(f"{name}.weight", values.astype(np.float16) if name == "blk.0.ffn_up" else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_checkpoint(folder: Path, n_shards: int) -> None:
    """The same model as safetensors; with two shards there is an index."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    rng = np.random.default_rng(2)
    weights = {"model.embed_tokens": (11, 32), "model.norm": (32,), "lm_head": (11, 32)}
    weights |= {f"model.layers.0.{HF_NAMES[name]}": shape for name, shape in LAYER_TENSORS.items()}
    arrays = {f"{name}.weight": rng.standard_normal(shape).astype(np.float32) for name, shape in weights.items()}
    if n_shards == 1:
        save_file(arrays, folder / "model.safetensors")
        return
    weight_map = {}
    for shard in range(n_shards):
        file = f"model-{shard + 1:05d}-of-{n_shards:05d}.safetensors"
        part = list(arrays)[shard::n_shards]
        save_file({name: arrays[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


class Inputs:
    """Valid files in `folder`, and damaged copies of them by number."""

    def __init__(self, folder: Path, seed: int):
        self.seed = seed
        self.work = folder / "input"
        self._gguf = folder / "valid.gguf"
        write_gguf(self._gguf)
        self._checkpoint, self._sharded = folder / "one", folder / "two"
        write_checkpoint(self._checkpoint, n_shards=1)
        write_checkpoint(self._sharded, n_shards=2)

    def valid(self) -> list[Path]:
        """The files and folders that damaged inputs start from."""
        return [self._gguf, self._checkpoint, self._sharded]

    def make(self, number: int) -> Path:
        """Write input `number`; its file, or its folder."""
        rng = random.Random(f"{self.seed}:{number}")
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        kind = rng.choice(("gguf", "gguf", "header", "header", "bytes", "config", "index"))
        if kind == "gguf":
            path = self.work / "model.gguf"
            path.write_bytes(mutate_bytes(self._gguf.read_bytes(), 2200, rng))
            return path
        source = self._sharded if kind == "index" else self._checkpoint
        for file in source.iterdir():
            (self.work / file.name).symlink_to(file)
        damage = {
            "header": ("model.safetensors", _damage_header),
            "bytes": ("model.safetensors", lambda data, rng: mutate_bytes(data, 2500, rng)),
            "config": ("config.json", _damage_json),
            "index": (INDEX, _damage_json),
        }
        name, change = damage[kind]
        (self.work / name).unlink()
        (self.work / name).write_bytes(change((source / name).read_bytes(), rng))
        return self.work


def _damage_header(data: bytes, rng: random.Random) -> bytes:
    (length,) = struct.unpack_from("<Q", data)
    header = json.dumps(mutate_json(json.loads(data[8 : 8 + length]), rng)).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def _damage_json(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return mutate_bytes(data, len(data), rng)
    return json.dumps(mutate_json(json.loads(data), rng)).encode()
