"""What a spec does not name is refused by name, through every command; what does nothing changes nothing."""

import json
import random
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_support import TEXT, rewrite, write_tiny_gguf

from ksort_gguf.cli.main import main
from ksort_gguf.models.gguf_source import open_gguf

# Keys that change what a llama computes, without "llama.", at values that do.
GGUF_KEYS = {
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "attention.scale": 0.5,
    "attention.causal": False,
    "attention.clamp_kqv": 8.0,
    "attention.max_alibi_bias": 8.0,
    "attention.sliding_window_pattern": 6,
    "attention.layer_norm_epsilon": 1e-3,
    "attention.kv_lora_rank": 8,
    "logit_scale": 0.0625,
    "embedding_scale": 12.0,
    "residual_scale": 0.22,
    "rope.scale_linear": 4.0,
    "rope.scaling.attn_factor": 1.2,
    "rope.scaling.finetuned": False,
    "rope.scaling.yarn_log_multiplier": 0.1,
    "rope.dimension_sections": [8, 4, 4, 0],
    "rope.freq_base_swa": 10000.0,
    "use_parallel_residual": True,
    "expert_count": 8,
    "expert_used_count": 2,
    "expert_weights_scale": 2.5,
    "nextn_predict_layers": 1,
    "pooling_type": 3,
    "swiglu_clamp_exp": [7.0, 7.0],
    "hidden_activation": "gelu",
}
GGUF_TENSORS = (
    "blk.0.ffn_down.bias", "blk.1.ffn_up.bias", "blk.0.ffn_gate.bias", "blk.0.attn_q_norm.weight",
    "blk.1.attn_k_norm.weight", "blk.0.attn_sinks.weight", "blk.0.attn_norm.bias", "blk.0.attn_qkv.weight",
    "blk.2.attn_norm.weight", "blk.0.attn_q.scale", "blk.0.post_attention_norm.weight", "output.bias",
    "output_norm.bias", "rope_factors_long.weight", "ksort.blk.0.scale", "frobnicate",
)  # fmt: skip
NEUTRAL = {
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "attention.scale": 0.0,
    "attention.causal": True,
    "attention.sliding_window": 0,
    "logit_scale": 1.0,
    "embedding_scale": 0.0,
    "residual_scale": 1.0,
    "rope.scale_linear": 1.0,
    "rope.scaling.type": "none",
    "rope.scaling.attn_factor": 1.0,
    "rope.dimension_sections": [0, 0, 0, 0],
    "expert_count": 0,
    "pooling_type": 0,
}
CONFIG_KEYS = {
    "mlp_bias": True,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "attention_multiplier": 0.5,
    "logits_scaling": 8.0,
    "logit_scale": 0.0625,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "query_pre_attn_scalar": 256,
    "clip_qkv": 8.0,
    "num_local_experts": 8,
    "no_rope_layers": [1, 0],
    "use_qk_norm": True,
    "partial_rotary_factor": 0.5,
    "sliding_window_pattern": 6,
    "attention_chunk_size": 64,
    "kv_lora_rank": 8,
    "use_parallel_residual": True,
    "alibi": True,
    "rope_interleaved": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "quantization_config": {"quant_method": "gptq"},
}
CHECKPOINT_TENSORS = (
    "model.layers.0.mlp.down_proj.bias", "model.layers.1.self_attn.q_norm.weight", "lm_head.bias",
    "model.layers.0.self_attn.k_norm.weight", "model.layers.0.self_attn.sinks", "model.norm.bias",
    "model.layers.0.post_feedforward_layernorm.weight", "model.layers.0.input_layernorm.bias",
    "model.layers.2.input_layernorm.weight", "model.layers.0.block_sparse_moe.gate.weight",
    "model.layers.1.self_attn.q_proj.weight_scale", "model.embed_positions.weight",
)  # fmt: skip


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "text").write_text(TEXT * 12)
    return write_tiny_gguf(folder / "tiny.gguf")


def commands(model: Path, folder: Path) -> dict[str, list[str]]:
    """Arguments of every command that takes a GGUF, by name; what they write goes to `folder`."""
    m = ["-m", str(model)]
    return {
        "generate": [*m, "-p", "ka", "-n", "6", "--temp", "0"],
        "chat": [*m, "-p", "ka", "-n", "4", "--temp", "0", "-st"],
        "perplexity": [*m, "-f", str(model.parent / "text"), "-c", "32", "--chunks", "1"],
        "bench": [*m, "-p", "4", "-n", "0", "-r", "1"],
        "inspect": [str(model)],
        "convert": [str(model), "--outfile", str(folder / "converted"), "--plan", "none", "--force"],
        "plan": [str(model), "--outfile", str(folder / "plan"), "--plan", "rotate,scale", "--force"],
    }


def refused(capsys, command: str, arguments: list[str]) -> str:
    """The one line that the command must end in."""
    assert main([command, *arguments]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def drawn_tensors(stock: Path, n: int) -> list[str]:
    """Names that the gguf package knows and the model has not."""
    with open_gguf(stock) as source:
        has = set(source.tensors)
    names = {f"{template.format(bid=1, xid=0)}.weight" for template in gguf.TENSOR_NAMES.values()}
    # rope_freqs has a place in every llama, with another shape
    return random.Random(3).sample(sorted(names - has - {"rope_freqs.weight"}), n)


def test_gguf_keys_that_compute_are_refused_by_name(stock: Path, tmp_path: Path, capsys):
    """Catches a model that runs as if a key were not there, and answers wrongly without a word."""
    model = tmp_path / "m.gguf"
    names = list(commands(model, tmp_path))
    for i, (key, value) in enumerate(GGUF_KEYS.items()):
        rewrite(stock, model, {f"llama.{key}": value})
        command = names[i % len(names)]
        assert f"key llama.{key} " in refused(capsys, command, commands(model, tmp_path)[command])


def test_gguf_tensors_without_a_place_are_refused_by_name(stock: Path, tmp_path: Path, capsys):
    """Catches weights that are left out of the computation without a word."""
    model = tmp_path / "m.gguf"
    names = list(commands(model, tmp_path))
    for i, tensor in enumerate((*GGUF_TENSORS, *drawn_tensors(stock, 20))):
        rewrite(stock, model, tensors=(tensor,))
        command = names[i % len(names)]
        assert f"tensor {tensor} " in refused(capsys, command, commands(model, tmp_path)[command])


def test_neutral_values_change_nothing(stock: Path, tmp_path: Path, capsys):
    """Catches files of other converters that are refused, or warned about, for keys that say nothing."""
    model = rewrite(stock, tmp_path / "m.gguf", {f"llama.{key}": value for key, value in NEUTRAL.items()})
    answers = []
    for path in (stock, model):
        assert main(["generate", *commands(path, tmp_path)["generate"]]) == 0
        captured = capsys.readouterr()
        answers.append(captured.out)
        assert "WARNING" not in captured.err
    assert answers[0] == answers[1]


def test_unknown_keys_are_one_warning(stock: Path, tmp_path: Path, capsys):
    """Catches a command without the warning, one for each key, and a run that stops."""
    model = rewrite(stock, tmp_path / "m.gguf", {"llama.frobnicate": 1.5, "llama.attention.frobnicate": 2})
    (tmp_path / "text").write_text(TEXT * 12)
    for command, arguments in commands(model, tmp_path).items():
        assert main([command, *arguments]) == 0, command
        warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("WARNING: ")]
        assert len(warnings) == 1, command
        assert re.search(r"m\.gguf: .*llama\.frobnicate, llama\.attention\.frobnicate", warnings[0])


@pytest.fixture
def checkpoint(stock: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint."""
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    for file in (stock.parent / "checkpoint").iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def hf_commands(directory: Path) -> list[tuple[str, list[str]]]:
    out = str(directory.parent / "out")
    return [
        ("convert", [str(directory), "--outfile", out]),
        ("plan", [str(directory), "--outfile", out]),
        ("inspect", [str(directory)]),
    ]


def test_config_keys_that_compute_are_refused_by_name(checkpoint: Path, capsys):
    """Catches checkpoints that convert into another model."""
    config = json.loads((checkpoint / "config.json").read_text())
    for i, (key, value) in enumerate(CONFIG_KEYS.items()):
        (checkpoint / "config.json").write_text(json.dumps({**config, key: value}))
        command, arguments = hf_commands(checkpoint)[i % 3]
        line = refused(capsys, command, arguments)
        assert f"{checkpoint / 'config.json'}: {key} " in line or f"RoPE parameter {key} " in line
    assert not (checkpoint.parent / "out").exists()


def test_unknown_config_keys_are_one_warning(checkpoint: Path, capsys):
    """Catches a key of a newer transformers that goes unsaid, or that stops a conversion."""
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "frobnicate": 1, "widget": "x"}))
    assert main(["convert", str(checkpoint), "--outfile", str(checkpoint.parent / "out"), "--plan", "none"]) == 0
    (warning,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("WARNING: "))
    assert warning.endswith("config.json: unknown keys are ignored: frobnicate, widget")


def test_checkpoint_tensors_without_a_place_are_refused_by_name(checkpoint: Path, capsys):
    """Catches weights that no GGUF of this architecture holds, left behind without a word."""
    weights = load_file(checkpoint / "model.safetensors")
    for i, tensor in enumerate(CHECKPOINT_TENSORS):
        save_file({**weights, tensor: np.ones(32, np.float32)}, checkpoint / "model.safetensors")
        command, arguments = hf_commands(checkpoint)[i % 3]
        assert f"tensor {tensor} " in refused(capsys, command, arguments)
    assert not (checkpoint.parent / "out").exists()
