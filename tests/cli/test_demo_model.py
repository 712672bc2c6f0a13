"""The whole path on a real model, SmolLM2-135M, over Python's own documentation."""

import math

import numpy as np
import pytest
import torch

from ksort_gguf.cli.demo_model import demo_model
from ksort_gguf.engine.calibration import default_text
from ksort_gguf.engine.load import load_model
from ksort_gguf.eval import perplexity as protocol
from ksort_gguf.eval.kld import Base, BaseWriter
from ksort_gguf.plan.convert import convert

N_CTX, N_CHUNKS = 256, 2


def forward_of(loaded, k_type):
    return protocol.forward_of(loaded.backend.start(loaded.cache_options(k_type, exact_tail=0, exact_sinks=0), N_CTX))


@pytest.fixture(scope="module")
def stock():
    return load_model(demo_model())


@pytest.fixture(scope="module")
def folded(tmp_path_factory):
    path = tmp_path_factory.mktemp("folded") / "folded.gguf"
    convert(demo_model(), path, plan="ksort")
    return load_model(path)


@pytest.fixture(scope="module")
def tokens(stock):
    return stock.tokenizer.encode(default_text(), parse_special=False)[: N_CHUNKS * N_CTX]


@pytest.fixture(scope="module")
def base(stock, tokens, tmp_path_factory):
    """(perplexity, base file) of the stock model with f16 keys."""
    path = tmp_path_factory.mktemp("base") / "base.kld"
    with BaseWriter(path, N_CTX, stock.backend.n_vocab, tokens) as writer:
        result = protocol.perplexity(forward_of(stock, "f16"), tokens, N_CTX, base_writer=writer)
    return result, path


@pytest.fixture(scope="module")
def divergence(base):
    """A function of a model and a K-cache type: the statistics against the base, measured once."""

    measured = {}

    def measure(loaded, k_type):
        if (loaded.path, k_type) not in measured:
            with Base(base[1], loaded.backend.n_vocab) as opened:
                measured[loaded.path, k_type] = protocol.kl_divergence(forward_of(loaded, k_type), opened)
        return measured[loaded.path, k_type]

    return measure


def test_folding_does_not_change_the_model(base, divergence, folded):
    """Would catch a fold that is exact on toy models only (quantized rows, 9 query heads on 3)."""
    statistics = divergence(folded, "f16")
    assert statistics.mean_kld().value < 1e-5
    assert statistics.ppl().value == pytest.approx(base[0].ppl, rel=1e-3)


def test_k_sort_lowers_the_divergence_of_bfp12(divergence, stock, folded):
    """Would catch an order that is not the one keys are packed in: sorting then helps nothing."""
    unsorted, by_norm = divergence(stock, "bfp12"), divergence(folded, "bfp12")
    assert by_norm.mean_kld().value < 0.85 * unsorted.mean_kld().value


def test_more_mantissa_bits_come_closer(divergence, folded):
    """Would catch a BFP14 or BFP16 path that loses bits; each two bits take about a factor of 16 in theory."""
    kld = {k_type: divergence(folded, k_type).mean_kld().value for k_type in ("bfp12", "bfp14", "bfp16")}
    assert kld["bfp16"] < kld["bfp14"] / 4 < kld["bfp12"] / 16


@pytest.mark.peers
def test_perplexity_and_tokens_equal_llama_cpp(base, tokens):
    """Would catch a tokenizer, RoPE, norm or protocol that differs from llama.cpp's; it also rounds activations."""
    llama_cpp = pytest.importorskip("llama_cpp")
    theirs = llama_cpp.Llama(str(demo_model()), n_ctx=N_CTX, n_batch=N_CTX, logits_all=True, verbose=False)
    text = default_text().encode()
    assert theirs.tokenize(text, add_bos=False, special=False)[: len(tokens)] == tokens
    nll = 0.0
    for chunk in range(N_CHUNKS):
        ids = tokens[chunk * N_CTX : (chunk + 1) * N_CTX]
        theirs.reset()
        theirs.eval(ids)
        logits = torch.from_numpy(np.array(theirs.scores[N_CTX // 2 : N_CTX - 1])).double()
        nll += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[N_CTX // 2 + 1 :]), reduction="sum"))
    assert base[0].ppl == pytest.approx(math.exp(nll / base[0].n_scored), rel=0.007)
