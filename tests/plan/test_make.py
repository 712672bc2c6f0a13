"""Making plans: what --plan says, what is refused, and what is left out because it would not help."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoint_support import (
    HEAD_DIM,
    LLAMA,
    N_EMBD,
    N_HEADS,
    N_KV_HEADS,
    N_LAYERS,
    QWEN2,
    random_weights,
    write_checkpoint,
    write_sentencepiece,
)

from ksort_gguf.cli.main import main
from ksort_gguf.container.retype import ArrayTensor
from ksort_gguf.engine.calibration import calibration
from ksort_gguf.errors import KsortError
from ksort_gguf.kvplan import PLANS, parse_plan
from ksort_gguf.models.gguf_source import open_gguf
from ksort_gguf.models.hf_source import open_hf
from ksort_gguf.models.spec import Norm
from ksort_gguf.plan.convert import convert
from ksort_gguf.plan.file import folded_plan
from ksort_gguf.plan.make import make_plan
from ksort_gguf.plan.rank import layer_order
from ksort_gguf.plan.weight_moments import moments_of_weights

N_VOCAB = 300
TEXT = "karaka lotilo miwomi nupenu serase katika lowolo mipemi " * 40


@pytest.fixture
def stock(tmp_path: Path, rng) -> Path:
    """A stock GGUF with a vocabulary."""
    weights = {name: w / 4 for name, w in random_weights(rng, n_vocab=N_VOCAB).items()}
    directory = write_checkpoint(tmp_path / "hf", {**LLAMA, "vocab_size": N_VOCAB}, weights)
    write_sentencepiece(directory / "tokenizer.model", N_VOCAB)
    convert(directory, tmp_path / "stock.gguf", plan="none")
    return tmp_path / "stock.gguf"


@pytest.mark.parametrize(
    "text, name, steps",
    [
        ("none", "none", ()),
        ("ksort", "ksort", ("order",)),
        ("order", "ksort", ("order",)),
        ("balanced", "balanced", ("shift", "scale", "rotate", "feedback")),
        ("feedback,rotate,scale,shift", "balanced", ("shift", "scale", "rotate", "feedback")),
        ("balanced,ksort", "order,shift,scale,rotate,feedback", ("order", "shift", "scale", "rotate", "feedback")),
        ("shift,ksort", "order,shift", ("order", "shift")),
        ("none,rotate", "rotate", ("rotate",)),
        ("scale,scale", "scale", ("scale",)),
    ],
)
def test_plans_are_names_and_steps(text: str, name: str, steps):
    """Catches steps in the order typed, plans that are not found by their steps, and steps counted twice."""
    assert parse_plan(text) == (name, steps)


@pytest.mark.parametrize("text", ["", "ksrot", "order,", "order shift", "Balanced"])
def test_unknown_plans_are_refused(text: str):
    """Catches a typing error that makes a plan of fewer steps."""
    with pytest.raises(KsortError, match=r"^`plan` .*is not one of none, ksort, balanced, order, shift"):
        parse_plan(text)


def test_a_norm_behind_the_projection_keeps_order_out(stock: Path):
    """Catches rows sorted in front of a gain that all heads share and that stays as it was."""
    with open_gguf(stock) as source:
        gain = ArrayTensor("f", "blk.1.attn_k_norm.weight", np.ones(HEAD_DIM, np.float32))
        source.tensors[gain.name] = gain
        first, second = source.spec.blocks
        attention = replace(second.attention, k_norm=Norm(gain.name, HEAD_DIM, 1e-5))
        source.spec = replace(source.spec, blocks=(first, replace(second, attention=attention)))
        for asked, steps in (("ksort", ()), ("ksort,shift", ("shift",))):
            plan, notes = make_plan(source, asked)
            assert plan.steps == steps and plan.order is None
            assert "left without order" in notes[0] and gain.name in notes[0]


def test_folded_models_are_refused(stock: Path, tmp_path: Path):
    """Catches a plan of folded rows, which would belong to no file."""
    convert(stock, tmp_path / "folded.gguf")
    with open_gguf(tmp_path / "folded.gguf") as source, pytest.raises(KsortError, match="is folded already"):
        make_plan(source)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--calibrate-tokens", "256"], "--calibrate-tokens needs --calibrate"),
        (["--calibrate", "--calibrate-tokens", "0"], "--calibrate-tokens 0"),
        (["--calibrate", "--calibrate-tokens", "-5"], "--calibrate-tokens -5"),
        (["--calibrate", "{dir}/none.txt"], "none.txt"),
        (["--calibrate", "{dir}/short.txt"], "less than one window of 128"),
        (["--calibrate", "{dir}/empty.txt"], "less than one window of 128"),
        (["--calibrate", "{dir}/latin.txt"], "latin.txt"),
        (["--plan", "none", "--calibrate"], "--plan"),
        (["--plan", "ksort,fedback"], "'fedback'"),
        (["--rank", "key-rms"], "--rank key-rms"),
        (["--plan", "none", "--rank", "key-rms"], "--plan"),
        (["--block-size", "0"], "block size 0"),
        (["--block-size", "64"], "block size 64"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "convert"])
def test_mistakes_end_in_one_line(stock: Path, tmp_path: Path, capsys, command: str, arguments, words: str):
    """Catches tracebacks, flags that are taken and ignored, and plans made of nothing."""
    (tmp_path / "short.txt").write_text("karaka")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    out = tmp_path / "out.gguf"
    arguments = [argument.format(dir=tmp_path) for argument in arguments]
    assert main([command, str(stock), "--outfile", str(out), *arguments]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0]
    assert not out.exists()


def test_calibration_is_recorded_and_changes_the_plan(stock: Path, tmp_path: Path):
    """Catches --calibrate that does not arrive, and more tokens than were asked for."""
    (tmp_path / "text.txt").write_text(TEXT)
    found = {}
    for name, flags in (
        ("weights", []),
        ("text", ["--calibrate", str(tmp_path / "text.txt"), "--calibrate-tokens", "300"]),
        ("default", ["--calibrate", "--calibrate-tokens", "64"]),
    ):
        out = tmp_path / f"{name}.gguf"
        assert main(["convert", str(stock), "--outfile", str(out), *flags]) == 0
        with open_gguf(out) as source:
            found[name] = folded_plan(source)
    assert found["weights"].statistics == "weights"
    assert found["text"].statistics == "text of 256 tokens in windows of 128"
    assert found["default"].statistics == "text of 64 tokens in windows of 64"
    shifts = [plan.keys.tables["shift"][0] for plan in found.values()]
    assert not any(np.allclose(shifts[i], shifts[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.fixture
def biased(tmp_path: Path, rng):
    """A Llama with giant key biases in half of each head's channels, larger queries in the other half, where the first
    row of each pair of Wk is the larger one."""
    weights = random_weights(rng, biases=True)
    for layer in range(N_LAYERS):
        prefix = f"model.layers.{layer}.self_attn."
        weights[prefix + "o_proj.bias"] = np.zeros(N_EMBD, np.float32)
        rows = weights[prefix + "k_proj.weight"].reshape(N_KV_HEADS, HEAD_DIM, N_EMBD)
        rows *= 0.1 / np.linalg.norm(rows, axis=2, keepdims=True)
        rows[:, : HEAD_DIM // 2] *= 2
        bias = weights[prefix + "k_proj.bias"].reshape(N_KV_HEADS, HEAD_DIM)
        bias *= 0
        is_biased = np.arange(HEAD_DIM) % (HEAD_DIM // 2) < HEAD_DIM // 4  # both channels of a pair
        bias[:, is_biased] = 50
        weights[prefix + "q_proj.weight"].reshape(N_HEADS, HEAD_DIM, N_EMBD)[:, ~is_biased] *= 1000
    return write_checkpoint(tmp_path / "biased", {**LLAMA, "attention_bias": True}, weights)


def test_an_order_that_hurts_is_left_out_with_a_note(biased: Path, tmp_path: Path, capsys):
    """Catches K-sort by row norms on a model whose biases the norm does not see, made unnoticed."""
    with open_hf(biased, "f32") as source:
        plan, notes = make_plan(source, "ksort", block_size=16)
        stock_order = np.tile(np.arange(HEAD_DIM), (N_KV_HEADS, 1))
        assert all(np.array_equal(order, stock_order) for order in plan.order)
        assert notes[0].startswith("the plan hardly helps, its expected error is 100.0% of that without one: add `cal")
        listed = " ".join(f"{layer}.{head}" for layer in range(N_LAYERS) for head in range(N_KV_HEADS))
        n_heads = N_LAYERS * N_KV_HEADS
        assert len(notes) == 2
        assert notes[1].startswith(f"{n_heads} of {n_heads} key heads are left unsorted")
        assert notes[1].endswith(f"(layer.head: {listed})")
        plan, notes = make_plan(source, "ksort", rank="key-rms", block_size=16)
        assert not any("unsorted" in note for note in notes)
    assert (
        main(["convert", str(biased), "--outfile", str(tmp_path / "o"), "--plan", "ksort", "--block-size", "16"]) == 0
    )
    assert (
        "key heads are left unsorted: the expected error is smaller so (layer.head: 0.0 0.1" in capsys.readouterr().err
    )


def test_key_rms_sorts_by_the_size_of_keys(biased: Path):
    """Catches a rank that does not see biases, or that sorts upwards."""
    found = {}
    with open_hf(biased, "f32") as source:
        moments_of_weights(source, found.__setitem__, lambda: None)
        for layer, moments in found.items():
            order = layer_order(source, layer, "key-rms", moments)
            sizes = np.take_along_axis(np.einsum("hcc->hc", moments.k_second), order, axis=1)
            assert (np.diff(sizes) <= 0).all() and sizes[0, 0] > 100 * sizes[0, -1]


@pytest.fixture
def two_channels(tmp_path: Path, rng) -> Path:
    """A model whose keys are next to nothing but two exact channels, one in each block of 16, that hardly turn."""
    weights = random_weights(rng, biases=True)
    for layer in range(N_LAYERS):
        prefix = f"model.layers.{layer}.self_attn."
        weights[prefix + "o_proj.bias"] = np.zeros(N_EMBD, np.float32)
        weights[prefix + "k_proj.weight"] *= 1e-7
        bias = weights[prefix + "k_proj.bias"].reshape(N_KV_HEADS, HEAD_DIM)
        bias *= 0
        bias[:, 15], bias[:, 31] = 7 * 64, 7  # side by side in the checkpoint's row order: the last pair
    config = {**LLAMA, "attention_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e30}}
    return write_checkpoint(tmp_path / "two", config, weights)


def test_a_plan_that_cannot_help_is_left_out_as_a_whole(two_channels: Path, tmp_path: Path, capsys):
    """Catches rotate kept where it spreads what was exact, a folded file of no steps, and a fall-back unsaid."""
    out = tmp_path / "o.gguf"
    arguments = ["--plan", "rotate", "--block-size", "16", "--outtype", "f32"]
    assert main(["convert", str(two_channels), "--outfile", str(out), *arguments]) == 0
    captured = capsys.readouterr()
    assert "note: the plan is left without rotate" in captured.err and "plan none" in captured.out
    with open_gguf(out) as source:
        assert folded_plan(source) is None and source.metadata["general.architecture"] == "llama"
    plan_file = tmp_path / "p.gguf"
    assert main(["plan", str(out), "--outfile", str(plan_file), "--plan", "rotate", "--block-size", "16"]) == 1
    assert "--plan rotate" in capsys.readouterr().err.splitlines()[-1] and not plan_file.exists()


def test_what_helps_is_kept_beside_what_does_not(two_channels: Path):
    """Catches a fall-back that throws away every step."""
    with open_hf(two_channels, "f32") as source:
        plan, notes = make_plan(source, "balanced", block_size=16)
    assert plan.steps == PLANS["balanced"] and len(plan.keys.tables["shift"]) == N_LAYERS and notes == []


def test_a_plan_that_hardly_helps_says_so(stock: Path, tmp_path: Path):
    """Catches the paper's sorting of channels that are all alike, sold as an improvement."""
    text = tmp_path / "text"
    text.write_text(TEXT)
    with open_gguf(stock) as source:
        notes = [make_plan(source, "ksort", calibration=made)[1] for made in (None, calibration(text, 128))]
    assert notes[0][0].endswith("add `calibrate`, which says it better, or compare both by `ksort-gguf perplexity`")
    assert notes[1][0].endswith("% of that without one: compare both by `ksort-gguf perplexity`")


def test_values_that_a_plan_would_harm_keep_none(tmp_path: Path, rng):
    """Catches a check of the keys alone."""
    weights = random_weights(rng, biases=True)
    for layer in range(N_LAYERS):
        prefix = f"model.layers.{layer}.self_attn."
        weights[prefix + "o_proj.bias"] = np.zeros(N_EMBD, np.float32)
        weights[prefix + "v_proj.weight"] *= 1e-7
        weights[prefix + "v_proj.bias"].reshape(N_KV_HEADS, HEAD_DIM)[:] = np.where(np.arange(HEAD_DIM) % 16, 0, 7)
    with open_hf(write_checkpoint(tmp_path / "m", {**LLAMA, "attention_bias": True}, weights), "f32") as source:
        plan, notes = make_plan(source, "balanced", block_size=16)
    assert plan.keys and not plan.values
    assert notes[0] == "values are left without a plan: it would raise the expected error"


def test_plans_are_the_same_in_every_run(tmp_path: Path, rng):
    """Catches plan files that differ though model and flags are the same."""
    directory = write_checkpoint(tmp_path / "m", QWEN2, random_weights(rng, biases=True))
    for name in ("a", "b"):
        assert main(["plan", str(directory), "--outfile", str(tmp_path / name), "--plan", "ksort,balanced"]) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
