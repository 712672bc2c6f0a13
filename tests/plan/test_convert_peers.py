"""Converted files in other programs: stock ones compute the same there, folded ones are refused."""

from pathlib import Path

import numpy as np
import pytest
from checkpoint_support import LLAMA, QWEN2, random_weights, write_checkpoint, write_sentencepiece

from ksort_gguf.plan.convert import convert

_N_VOCAB = 320


@pytest.fixture(params=["llama", "qwen2"])
def checkpoint(request, tmp_path: Path, rng) -> Path:
    """A tiny model with a tokenizer, its weights scaled so that activations stay moderate."""
    biases = request.param == "qwen2"
    config = {**(QWEN2 if biases else LLAMA), "vocab_size": _N_VOCAB, "model_type": request.param}
    weights = {name: values * 0.2 for name, values in random_weights(rng, biases, _N_VOCAB).items()}
    directory = write_checkpoint(tmp_path / "model", config, weights)
    write_sentencepiece(directory / "tokenizer.model", n_vocab=310)
    return directory


def test_transformers_refuses_folded_files(checkpoint: Path, tmp_path: Path):
    """Catches a folded file that another program takes for a stock one and answers from with garbage."""
    transformers = pytest.importorskip("transformers")
    convert(checkpoint, tmp_path / "folded.gguf")
    with pytest.raises(ValueError, match="ksort-"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="folded.gguf")


@pytest.mark.peers
def test_llama_cpp_refuses_folded_files(checkpoint: Path, tmp_path: Path, capfd):
    """As above, for llama.cpp, and for the right reason."""
    llama_cpp = pytest.importorskip("llama_cpp")
    convert(checkpoint, tmp_path / "folded.gguf")
    with pytest.raises(ValueError, match="Failed to load model"):
        llama_cpp.Llama(str(tmp_path / "folded.gguf"))
    assert "unknown model architecture: 'ksort-" in capfd.readouterr().err


@pytest.mark.peers
def test_llama_cpp_computes_what_transformers_does(checkpoint: Path, tmp_path: Path):
    """Catches any wrong name, row order, hyperparameter or bias: two programs that share no code of ours must agree."""
    llama_cpp, torch = pytest.importorskip("llama_cpp"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    convert(checkpoint, tmp_path / "stock.gguf", plan="none", outtype="f32")
    ids = list(range(20, 80))
    engine = llama_cpp.Llama(str(tmp_path / "stock.gguf"), verbose=False, n_ctx=128, logits_all=True)
    engine.eval(ids)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    assert np.array(engine.scores[: len(ids)]) == pytest.approx(expected, abs=2e-3 * float(expected.std()))
