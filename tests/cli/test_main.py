"""The command line as a user meets it: one line for every mistake, never a traceback."""

import json

import pytest
import torch
import transformers

from ksort_gguf.cli.main import main
from ksort_gguf.container.gguf_writer import GgufOutput
from ksort_gguf.container.values import string, uint32
from ksort_gguf.models.gguf_source import open_gguf
from ksort_gguf.plan.convert import convert

TINY = dict(hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folded GGUF of a random model without a vocabulary, and its stock twin."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    config = transformers.LlamaConfig(vocab_size=64, max_position_embeddings=64, **TINY)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "hf")
    convert(folder / "hf", folder / "folded.gguf")
    convert(folder / "hf", folder / "stock.gguf", plan="none")
    return folder


def fails(capsys, *arguments) -> str:
    """Run a command line that must fail; its one line."""
    try:
        status = main([str(a) for a in arguments])
    except SystemExit as exit:  # argparse
        status = exit.code
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("WARNING")]
    assert status, "exit status 0"
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["convert", "{dir}/hf", "--outfile", "{out}", "--block-size", "7"], "block size 7"),
        (["convert", "{dir}/hf", "--outfile", "{out}", "--block-size", "128"], "head dimension 16"),
        (["convert", "{dir}/none", "--outfile", "{out}"], "none"),
        (["convert", "{dir}/folded.gguf", "--outfile", "{out}"], "folded already"),
        (["convert", "{dir}/stock.gguf", "--outfile", "{dir}/stock.gguf", "--force"], "stock.gguf"),
        (["plan", "{dir}/hf/config.json", "--outfile", "{out}"], "config.json"),
        (["inspect", "{dir}/none"], "none"),
        (["generate", "-m", "{dir}/none", "-p", "x"], "none"),
        (["generate", "-m", "{dir}/stock.gguf", "-p", "x"], "vocabulary"),
        (["generate", "-m", "{dir}/stock.gguf", "-p", "x", "--top-p", "2"], "--top-p"),
        (["generate", "-m", "{dir}/stock.gguf", "-p", "x", "-n", "-7"], "--predict"),
        (["generate", "-m", "{dir}/stock.gguf", "-p", "x", "-t", "-1"], "--threads"),
        (["generate", "-m", "{dir}/stock.gguf", "-p", "x", "-c", "-1"], "--ctx-size"),
        (["generate", "-m", "{dir}/stock.gguf", "-p", "x", "-ctk", "q4_0"], "q4_0"),
        (["generate", "-m", "{dir}/folded.gguf", "-p", "x", "--cache-exact-tail", "-1"], "--cache-exact-tail -1"),
        (["bench", "-m", "{dir}/folded.gguf", "--cache-exact-sinks", "1025"], "--cache-exact-sinks 1025"),
        (["bench", "-m", "{dir}/stock.gguf", "-ctk", "f16", "--cache-exact-tail", "9"], "neither --cache-type-k f16"),
        (["generate", "-m", "{dir}/stock.gguf"], "--prompt"),
        (["generate", "-m", "{dir}/folded.gguf", "-p", "x", "--plan-file", "{dir}/none"], "none"),
        (["generate", "-m", "{dir}/folded.gguf", "-p", "x", "--plan-file", "{dir}/stock.gguf"], "plan"),
        (["generate", "-m", "{dir}/hf", "-p", "x"], "is a directory"),
        (["chat", "-m", "{dir}/stock.gguf"], "chat-template"),
        (["perplexity", "-m", "{dir}/stock.gguf", "-f", "x", "--kl-divergence-base", "{dir}/stock.gguf"], "-m names"),
        (["perplexity", "-m", "{dir}/stock.gguf"], "-f"),
        (["perplexity", "-m", "{dir}/stock.gguf", "--kl-divergence"], "--kl-divergence-base"),
        (["perplexity", "-m", "{dir}/stock.gguf", "-f", "{dir}/none"], "none"),
        (["bench", "-m", "{dir}/stock.gguf", "-ctk", "q4_0"], "--cache-type-k"),
        (["bench", "-m", "{dir}/stock.gguf", "-d", "x"], "--n-depth"),
        (["frobnicate"], "frobnicate"),
        ([], "COMMAND"),
    ],
)
def test_mistakes_end_in_one_line(model, capsys, tmp_path, arguments, words):
    """Would catch tracebacks, silent failures and half-written files."""
    out = tmp_path / "out.gguf"
    assert words in fails(capsys, *(a.format(dir=model, out=out) for a in arguments))
    assert not list(tmp_path.iterdir())


def test_plan_for_another_model_names_both_hashes(model, capsys, tmp_path):
    """Would catch a plan folded into weights that it was not made for."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(vocab_size=64, max_position_embeddings=64, **TINY)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    assert main(["plan", str(tmp_path / "hf"), "--outfile", str(tmp_path / "plan.gguf")]) == 0
    capsys.readouterr()
    line = fails(capsys, "generate", "-m", model / "stock.gguf", "-p", "x", "--plan-file", tmp_path / "plan.gguf")
    assert line.count("sha256:") == 2


def test_small_heads_need_no_flags(capsys, tmp_path):
    """Would catch defaults that refuse a model whose heads are smaller than the default block."""
    config = transformers.LlamaConfig(vocab_size=64, **{**TINY, "hidden_size": 32})  # heads of 8 channels
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    assert main(["convert", str(tmp_path / "hf"), "--outfile", str(tmp_path / "out.gguf")]) == 0
    assert "keys f16" in capsys.readouterr().out


def test_bench_names_every_test_as_llama_bench(model, capsys):
    """Would catch tests that are skipped, run at another depth, or counted with the wrong number of tokens."""
    arguments = ["-p", "8", "-n", "0,4", "-d", "0,16", "-ctk", "f16,bfp12", "-r", "2", "-o", "json"]
    assert main(["bench", "-m", str(model / "folded.gguf"), *arguments]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["type_k"], row["test"]) for row in rows] == [
        (k_type, test + depth) for k_type in ("f16", "bfp12") for depth in ("", " @ d16") for test in ("pp8", "tg4")
    ]
    for row in rows:
        n_tokens = row["n_prompt"] + row["n_gen"]
        assert row["samples_ts"] == pytest.approx([n_tokens * 1e9 / ns for ns in row["samples_ns"]])


def rewritten(source, target, values=None, damage=None):
    """`source` copied to `target` with metadata `values` replaced; the bytes of tensor `damage` begin with NaN."""
    with open_gguf(source) as model:
        infos = [(t.name, t.shape, t.type) for t in model.tensors.values()]
        with GgufOutput(target, {**model.values, **(values or {})}, infos) as output:
            for name, tensor in model.tensors.items():
                raw = tensor.read()
                if name == damage:
                    raw[:4] = 0xFF  # NaN in f16, bf16 and f32
                output.write_tensor(name, [raw])
    return target


@pytest.mark.parametrize(
    "key, value",
    [
        ("ksort.block_size", string("32")),
        ("ksort.block_size", uint32(7)),
        ("ksort.cache_type_k", string("q4_0")),
        ("ksort.query_type", uint32(1)),
    ],
)
def test_declared_cache_of_another_kind_names_the_key(model, capsys, tmp_path, key, value):
    """Would catch tracebacks, and made-up numbers, from cache keys that another program wrote."""
    file = rewritten(model / "stock.gguf", tmp_path / "m.gguf", {key: value})
    for command in (["inspect", file], ["generate", "-m", file, "-p", "x"]):
        assert f"{file}: key {key}" in fails(capsys, *command)


@pytest.mark.parametrize("tensor", ["token_embd.weight", "blk.1.ffn_gate.weight", "output_norm.weight"])
def test_nan_weights_are_named_on_load(model, capsys, tmp_path, tensor):
    """Would catch damaged weights that run for a while, or for good where their row is not used."""
    file = rewritten(model / "stock.gguf", tmp_path / "m.gguf", damage=tensor)
    assert f"{file}: tensor {tensor} holds NaN" in fails(capsys, "generate", "-m", file, "-p", "x")
