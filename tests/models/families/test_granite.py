"""Granite against transformers and llama.cpp."""

from pathlib import Path

import pytest
from family_support import SIZES, assert_computes_as_transformers, assert_plan_helps
from llama_cpp_support import assert_agrees_with_llama_cpp

transformers = pytest.importorskip("transformers")

_MULTIPLIERS = {
    "attention_multiplier": 0.1, "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0,
}  # fmt: skip


def _config():
    return transformers.GraniteConfig(**SIZES, **_MULTIPLIERS)


def test_logits(tmp_path: Path):
    """Catches a multiplier that is left out, inverted, or applied twice."""
    assert_computes_as_transformers(tmp_path, _config())
    for calibrate in (False, True):
        assert assert_plan_helps(tmp_path, calibrate) == ["shift", "scale", "rotate", "feedback"]


@pytest.mark.peers
def test_llama_cpp_agrees(tmp_path: Path):
    """Catches a converted file that other programs read otherwise."""
    assert_agrees_with_llama_cpp(assert_computes_as_transformers(tmp_path, _config()))
