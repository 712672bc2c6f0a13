"""The comparison of caches, on a small random model with a vocabulary."""

import json

import compare_caches
import pytest
import torch
from cache_rows import Runner, parse_row
from checkpoint_support import LLAMA, QWEN2
from model_variants import ModelVariants
from simulated_caches import FLOATS
from simulated_caches.attention import SimulatedAttention

from ksort_gguf.engine.load import load_model

MODELS = {
    "llama": (LLAMA, False),
    "llama-window": ({**LLAMA, "architectures": ["MistralForCausalLM"], "sliding_window": 24}, False),
    "qwen2": (QWEN2, True),
}


def run(capsys, monkeypatch, *arguments) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["compare_caches.py", *map(str, arguments)])
    status = compare_caches.main()
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("name", MODELS)
def test_simulated_attention_equals_the_native_one(name, rng, tmp_path, write_model):
    """Would catch a RoPE table, head group, stride, window or scale that differs from the real path's, and a text cut
    in two because it is longer than what goes through the layers together."""
    variants = ModelVariants(write_model(tmp_path, *MODELS[name]), [], 1)
    tokens = rng.integers(0, variants.spec.n_vocab, 600).tolist()
    runner, exact = Runner(variants, 600), [FLOATS["f32"]] * variants.spec.n_layers
    expected, _ = runner.prepare(parse_row("f32/f32", {}))
    simulated = runner._forward(SimulatedAttention(variants.layers(600), exact, exact))
    torch.testing.assert_close(simulated(tokens, 0), expected(tokens, 0), atol=1e-3, rtol=1e-3)


def test_simulations_take_folded_files(folder, rng):
    """Would catch stock RoPE tables on folded weights."""
    tokens = rng.integers(0, 300, 64).tolist()
    logits = []
    for name in ("stock.gguf", "folded.gguf"):
        forward, _ = Runner(ModelVariants(folder / name, [], 1), 64).prepare(parse_row("q8_0", {}))
        logits.append(forward(tokens, 0))
    torch.testing.assert_close(logits[0], logits[1], atol=0.05 * float(logits[0].std()), rtol=0)


def test_a_plan_row_equals_the_runner_with_that_plan_file(folder, rng):
    """Would catch a variant that folds other rows than the runner does, or shares what it must not."""
    path, plan_file = folder / "stock.gguf", folder / "sorted.gguf"
    tokens = rng.integers(0, 300, 64).tolist()
    loaded = load_model(path, plan_file, n_threads=1)
    expected = loaded.backend.start(
        loaded.cache_options("bfp12", block_size=16, exact_tail=0, exact_sinks=0), 64
    ).forward(tokens, n_logits=64)
    variants = ModelVariants(path, [str(plan_file)], 1)
    runner = Runner(variants, 64)
    plain, _ = runner.prepare(parse_row("bfp12-16", variants.plans))
    before = plain(tokens, 0)
    planned, bits = runner.prepare(parse_row("bfp12-16@sorted", variants.plans))
    torch.testing.assert_close(planned(tokens, 0), expected)
    torch.testing.assert_close(plain(tokens, 0), before)
    assert not torch.allclose(before, expected) and bits() == (4.5, 16)


def test_tables_and_json(folder, capsys, monkeypatch):
    """Would catch columns that are mixed up, rows that go missing, and a last line that is no JSON."""
    types = "bfp16,bfp12-16,q8_0,q4_0/q8_0,kvquant-2,kvquant-4/f16,f32/f16,bfp12@sorted"
    status, out, err = run(
        capsys, monkeypatch, "-m", folder / "stock.gguf", "-f", folder / "text.txt", "-c", "64,128", "--chunks", 2,
        "--types", types, "--plan-file", folder / "sorted.gguf", "-t", 1,
    )  # fmt: skip
    assert status == 0, err
    summary = json.loads(out.splitlines()[-1])
    assert [c["n_ctx"] for c in summary["contexts"]] == [64, 128]
    for context in summary["contexts"]:
        rows = {row["type"]: row for row in context["rows"]}
        assert list(rows) == ["f16", *types.split(",")]
        assert rows["bfp12-16"]["bits"] == [4.5, 16] and rows["q4_0/q8_0"]["bits"] == [4.5, 8.5]
        assert rows["f32/f16"]["mean_kld"] < 1e-5 and rows["f32/f16"]["same_top"] > 0.9
        assert rows["bfp16"]["mean_kld"] < rows["bfp12-16"]["mean_kld"]
        assert rows["q8_0"]["mean_kld"] < rows["q4_0/q8_0"]["mean_kld"]
        assert rows["kvquant-4/f16"]["mean_kld"] < rows["kvquant-2"]["mean_kld"]
        for row in list(rows.values())[1:]:
            assert row["median_kld"] <= row["kld_99.9"] and abs(row["ppl"] / rows["f16"]["ppl"] - 1) < 1
    assert out.count("| q8_0 | 8.50 | 16.00 |") == 2


def test_exact_ends_of_rows_and_of_the_command_line(folder, capsys, monkeypatch):
    """Would catch a row's own ~tail that loses to --tail, a --tail without effect, and exact tokens not counted."""
    types = "q4_0~tail=0,q4_0,q4_0~tail=64~sink=4,q4_0/q4_0"
    status, out, err = run(
        capsys, monkeypatch, "-m", folder / "stock.gguf", "-f", folder / "text.txt", "-c", 64, "--chunks", 2,
        "--types", types, "--tail", 8, "-t", 1,
    )  # fmt: skip
    assert status == 0, err
    summary = json.loads(out.splitlines()[-1])
    assert summary["tail"] == 8 and "newest 8 and first 0 tokens in f16" in out
    none, eight, all_exact, both = (row for row in summary["contexts"][0]["rows"][1:])
    with_eight = pytest.approx(sum((4.5 * (t - 7) + 16 * 8) / (t + 1) for t in range(32, 64)) / 32)
    assert none["bits"] == [4.5, 16] and eight["bits"] == [with_eight, 16] and both["bits"] == [with_eight, with_eight]
    assert all_exact["bits"] == [16, 16] and all_exact["mean_kld"] < 1e-5 < eight["mean_kld"] < none["mean_kld"]


def test_default_rows_that_do_not_fit_are_left_out(folder, capsys, monkeypatch):
    """Would catch a default list that fails on heads of 32, which llama.cpp does not rotate."""
    monkeypatch.setattr(compare_caches, "OUR_DEFAULTS", ("bfp12",))
    monkeypatch.setattr(compare_caches, "PLAN_DEFAULTS", ("bfp12@shift+rotate", "bfp12/bfp16@balanced"))
    monkeypatch.setattr(compare_caches, "PEER_DEFAULTS", ("q4_0", "q4_0+hadamard"))
    status, out, err = run(
        capsys, monkeypatch, "-m", folder / "stock.gguf", "-f", folder / "text.txt", "-c", 64, "--chunks", 1, "-t", 1,
        "--plan-file", folder / "sorted.gguf",
    )  # fmt: skip
    assert status == 0
    rows = json.loads(out.splitlines()[-1])["contexts"][0]["rows"]
    assert [row["type"] for row in rows] == [
        "f16", "bfp12", "bfp12@shift+rotate", "bfp12/bfp16@balanced", "bfp12@sorted", "q4_0",
    ]  # fmt: skip
    assert "note: q4_0+hadamard is left out" in err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--types", "q4_0,q3_9"], "'q3_9' (known: f32"),
        (["--types", "q4_0/bfp99"], "'bfp99'"),
        (["--types", "bfp12-48"], "'bfp12-48'"),
        (["--types", "bfp12/q4_0"], "bfp12"),
        (["--types", "bfp12@none"], "--plan-file"),
        (["--types", "q4_0@sorted", "--plan-file", "{dir}/sorted.gguf"], "no plan"),
        (["--types", "q4_0+hadamard"], "64"),
        (["--types", "q4_0~tail=x"], "~tail=x"),
        (["--types", "q4_0~tail=4~tail=4"], "~tail=4"),
        (["--types", "q4_0~size=4"], "~size=4"),
        (["--types", "bf16~tail=4"], "bf16~tail=4"),
        (["--types", "bfp12", "--sink", "65"], "bfp12"),
        (["--types", "q4_0", "--tail", "-1"], "--tail -1"),
        (["--types", "q4_0", "-c", "x"], "-c x"),
        (["--types", "q4_0", "-c", "100000"], "100000"),
        (["--types", "q4_0", "--chunks", "0"], "--chunks 0"),
        (["--types", "q4_0", "-t", "-1"], "--threads -1"),
        (["--plan-file", "{dir}/sorted.gguf", "{dir}/other/sorted.gguf"], "rename"),
        (["--plan-file", "{dir}/none.gguf"], "none.gguf"),
        (["-m", "{dir}/none.gguf"], "none.gguf"),
    ],
)
def test_mistakes_end_in_one_line(folder, capsys, monkeypatch, arguments, words):
    """Would catch tracebacks, and mistakes that show only after minutes of measuring."""
    base = ["-m", folder / "stock.gguf", "-f", folder / "text.txt", "-c", "64", "--chunks", 1]
    status, out, err = run(capsys, monkeypatch, *base, *(a.format(dir=folder) for a in arguments))
    assert status == 1 and out == ""
    assert len(err.splitlines()) == 1 and err.startswith("error: ") and words in err
