"""SmolLM3 against transformers and llama.cpp."""

from pathlib import Path

import pytest
from family_support import SIZES, assert_computes_as_transformers, assert_plan_helps
from llama_cpp_support import assert_agrees_with_llama_cpp

from ksort_gguf.api import convert
from ksort_gguf.errors import UnsupportedModelError

transformers = pytest.importorskip("transformers")


def _config(**changes):
    return transformers.SmolLM3Config(**{**SIZES, "num_hidden_layers": 8, **changes})  # two layers without RoPE


def test_logits(tmp_path: Path):
    """Catches RoPE on the layers that have none, or a plan made as if they had."""
    assert_computes_as_transformers(tmp_path, _config())
    for calibrate in (False, True):
        assert assert_plan_helps(tmp_path, calibrate) == ["shift", "scale", "rotate", "feedback"]


def test_order_of_layers_without_rope(tmp_path: Path):
    """Catches rows of q and k that are folded differently where RoPE does not pair them."""
    model = assert_computes_as_transformers(tmp_path, _config())
    convert(tmp_path / "checkpoint", tmp_path / "sorted.gguf", outtype="f32", plan="ksort")
    from family_support import IDS, native_logits

    from ksort_gguf.engine.load import load_model

    folded = load_model(tmp_path / "sorted.gguf", n_threads=2)
    assert native_logits(folded, IDS) == pytest.approx(native_logits(model, IDS), abs=1e-4)


def test_another_interval_is_refused(tmp_path: Path):
    """Catches layers without RoPE that GGUF has no words for."""
    from family_support import write_random_checkpoint

    write_random_checkpoint(tmp_path / "checkpoint", _config(no_rope_layers=[1, 0] * 4))
    with pytest.raises(UnsupportedModelError, match="no_rope_layers"):
        convert(tmp_path / "checkpoint", tmp_path / "out.gguf")


@pytest.mark.peers
def test_llama_cpp_agrees(tmp_path: Path):
    """Catches a converted file that other programs read otherwise."""
    assert_agrees_with_llama_cpp(assert_computes_as_transformers(tmp_path, _config()))
