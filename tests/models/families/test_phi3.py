"""Phi-3 against transformers and llama.cpp."""

from pathlib import Path

import numpy as np
import pytest
from family_support import (
    IDS,
    SIZES,
    assert_computes_as_transformers,
    assert_plan_helps,
    native_logits,
    transformers_logits,
)
from llama_cpp_support import assert_agrees_with_llama_cpp

from ksort_gguf.api import convert
from ksort_gguf.engine.load import load_model

transformers = pytest.importorskip("transformers")

_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,  # 24 of 32 channels
    "short_factor": [1.0 + 0.1 * i for i in range(12)],
    "long_factor": [2.0 + 0.3 * i for i in range(12)],
}


def _config(original_context: int | None):
    if original_context is None:
        return transformers.Phi3Config(**SIZES)
    rope = {**_LONGROPE, "original_max_position_embeddings": original_context}
    return transformers.Phi3Config(**SIZES, original_max_position_embeddings=original_context, rope_parameters=rope)


@pytest.mark.parametrize("original_context", [None, 32])
def test_logits(tmp_path: Path, original_context: int | None):
    """Catches wrong parts of fused tensors, rotated channels beyond the part, and a context's wrong factors."""
    assert_computes_as_transformers(tmp_path, _config(original_context))
    for calibrate in (False, True):
        assert assert_plan_helps(tmp_path, calibrate) == ["shift", "scale", "rotate", "feedback"]


def test_short_contexts_have_short_factors(tmp_path: Path):
    """Catches the long factors where a context fits what the model was first trained for."""
    loaded = assert_computes_as_transformers(tmp_path, _config(32))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    ids = IDS[:30]
    np.testing.assert_allclose(native_logits(loaded, ids, n_ctx=32), transformers_logits(model, ids), rtol=0, atol=1e-3)


def test_order_is_folded_in_fused_rows(tmp_path: Path):
    """Catches an order that moves rows of v, or q rows by another head's order, in attn_qkv."""
    loaded = assert_computes_as_transformers(tmp_path, _config(None))
    convert(tmp_path / "checkpoint", tmp_path / "sorted.gguf", outtype="f32", plan="ksort")
    folded = load_model(tmp_path / "sorted.gguf", n_threads=2)
    assert folded.metadata["general.architecture"] == "ksort-phi3"
    np.testing.assert_allclose(native_logits(folded, IDS), native_logits(loaded, IDS), rtol=0, atol=1e-3)


@pytest.mark.peers
@pytest.mark.parametrize("original_context", [None, 32])
def test_llama_cpp_agrees(tmp_path: Path, original_context: int | None):
    """Catches a converted file that other programs read otherwise."""
    assert_agrees_with_llama_cpp(assert_computes_as_transformers(tmp_path, _config(original_context)))
