"""Qwen3 against transformers and llama.cpp."""

from pathlib import Path

import pytest
from family_support import SIZES, assert_computes_as_transformers, assert_plan_helps, load_converted
from llama_cpp_support import assert_agrees_with_llama_cpp

from ksort_gguf.api import make_plan

transformers = pytest.importorskip("transformers")


def _config():
    return transformers.Qwen3Config(**SIZES, head_dim=48)  # heads that do not fill the hidden size


def test_logits(tmp_path: Path):
    """Catches norms of heads that are left out, misplaced behind RoPE, or taken over all heads together."""
    assert_computes_as_transformers(tmp_path, _config())
    steps = assert_plan_helps(tmp_path, calibrate=False)
    assert steps == assert_plan_helps(tmp_path, calibrate=True) == ["shift", "scale", "rotate", "feedback"]


def test_order_is_left_out_and_said(tmp_path: Path, capsys):
    """Catches an order folded past a gain that all heads share: other answers, without a word."""
    from ksort_gguf.cli.main import main

    assert_computes_as_transformers(tmp_path, _config())
    assert "order" not in make_plan(tmp_path / "stock.gguf", plan="order,balanced").steps
    assert (
        main(["convert", str(tmp_path / "stock.gguf"), "--outfile", str(tmp_path / "k.gguf"), "--plan", "ksort"]) == 0
    )
    assert "without order: it cannot be folded past the gain blk.0.attn_q_norm.weight" in capsys.readouterr().err
    assert (
        load_converted(tmp_path / "checkpoint", tmp_path / "k2.gguf", plan="ksort").metadata["general.architecture"]
        == "qwen3"
    )


@pytest.mark.peers
def test_llama_cpp_agrees(tmp_path: Path):
    """Catches a converted file that other programs read otherwise."""
    assert_agrees_with_llama_cpp(assert_computes_as_transformers(tmp_path, _config()))
