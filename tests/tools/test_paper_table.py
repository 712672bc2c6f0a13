"""The K-sort paper's table, on a small random model with a vocabulary."""

import json
import sys

import paper_table
import pytest
import torch
from checkpoint_support import LLAMA, N_LAYERS

from ksort_gguf.engine.load import load_model
from ksort_gguf.eval import perplexity as protocol
from ksort_gguf.plan.convert import convert

N_CTX = 64
# heads twice as long and half as many as LLAMA's: blocks of 32 hold other channels when they are sorted
CONFIG = {**LLAMA, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}


@pytest.fixture(scope="module")
def models(tmp_path_factory, write_model, folder):
    """A folder with a checkpoint (hf), its stock.gguf, folded.gguf, and text.txt."""
    models = tmp_path_factory.mktemp("paper")
    stock = write_model(models, CONFIG)
    convert(stock, models / "folded.gguf", plan="ksort")
    (models / "text.txt").write_text((folder / "text.txt").read_text())
    return models


def run(models, capsys, model="stock.gguf", *more):
    """The tool's table lines and JSON."""
    sizes = ["-c", str(N_CTX), "--chunks", "2", "-t", "1"]
    arguments = ["-m", str(models / model), "-f", str(models / "text.txt"), *sizes]
    assert paper_table.main([*arguments, *more]) == 0
    *table, line = capsys.readouterr().out.splitlines()
    return table, json.loads(line)


def chunk_forward(loaded, **options):
    """The scored logits of a chunk, float64 log-probabilities [rows, n_vocab]."""
    forward = protocol.forward_of(
        loaded.backend.start(loaded.cache_options(**options, exact_tail=0, exact_sinks=0), N_CTX)
    )
    bos_id = loaded.tokenizer.bos_id
    return lambda ids: forward([bos_id, *ids[1:]], N_CTX // 2)[:-1].double().log_softmax(-1)


def test_numbers_are_those_of_the_packed_cache(models, capsys):
    """Would catch an unsorted row measured on the sorted model (or the reverse), a wrong base or block size."""
    table, results = run(models, capsys)
    stock, folded = (load_model(models / name, n_threads=1) for name in ("stock.gguf", "folded.gguf"))
    tokens = protocol.tokenize_file(models / "text.txt", stock.tokenizer)
    chunks = [tokens[:N_CTX], tokens[N_CTX : 2 * N_CTX]]
    exact = chunk_forward(stock, k_type="f16")
    for name, loaded in (("unsorted", stock), ("k_sorted", folded)):
        coarse = chunk_forward(loaded, k_type="bfp12", block_size=32, query_type="bfp16")
        klds, nlls = [], []
        for ids in chunks:
            p, q = exact(ids), coarse(ids)
            klds.append((p.exp() * (p - q)).sum(-1))
            nlls.append(-q.gather(1, torch.tensor(ids[N_CTX // 2 + 1 :])[:, None]))
        found = results[name]["by_block_size"]["32"]
        assert found["ppl"] == pytest.approx(float(torch.cat(nlls).mean().exp()), rel=1e-5)
        assert found["mean_kld"] == pytest.approx(float(torch.cat(klds).mean()), rel=1e-2)
        assert f"{found['ppl']:.4f}" in table[4]
    sorted_kld, unsorted_kld = (results[name]["by_block_size"]["32"]["mean_kld"] for name in ("k_sorted", "unsorted"))
    assert sorted_kld != pytest.approx(unsorted_kld, rel=1e-2)
    assert "Blocks of 128 do not fit this model's heads of 64 channels." in table
    whole_heads = [results[name]["by_block_size"]["64"]["mean_kld"] for name in ("unsorted", "k_sorted")]
    assert whole_heads[0] == pytest.approx(whole_heads[1], rel=1e-4)


def test_checkpoint_and_gguf_give_the_same_table(models, capsys):
    """Would catch a Hugging Face directory measured as something else than the stock file made from it."""
    assert run(models, capsys, "hf")[0] == run(models, capsys)[0]


def test_one_layer_at_a_time(models):
    """Would catch a layer taken for its neighbour, BFP12 left on in other layers, and ubatches in the wrong slots."""
    loaded = load_model(models / "stock.gguf", n_threads=1)
    tokens, model = protocol.tokenize_file(models / "text.txt", loaded.tokenizer)[:600], loaded.backend
    for layer, context in enumerate(paper_table.one_layer_contexts(model, 32, 600)):
        expected, coarse = model.start(paper_table.F16, 600), model.start(paper_table.bfp12(32), 600)
        expected.attention.steps[layer] = coarse.attention.steps[layer]
        found = protocol.forward_of(context)(tokens, 550)
        assert torch.equal(found, expected.forward(tokens, n_logits=50))


def test_plots_are_drawn(models, capsys, tmp_path):
    """Would catch plots that are missing or empty, and layers left out of the divergence by layer."""
    pytest.importorskip("matplotlib")
    results = run(models, capsys, "stock.gguf", "--plot", str(tmp_path / "a" / "b"))[1]
    for name in ("channel_norms.png", "kld_by_layer.png"):
        assert (tmp_path / "a" / "b" / name).read_bytes().startswith(b"\x89PNG")
    for name in ("unsorted", "k_sorted"):
        assert len(results[name]["kld_by_layer"]) == N_LAYERS
        assert all(kld > 0 for kld in results[name]["kld_by_layer"])


def test_errors_are_one_line(models, capsys, monkeypatch, tmp_path):
    """Would catch sorting what is sorted already, and minutes of measuring before a missing matplotlib is noticed."""
    arguments = ["-f", str(models / "text.txt"), "-c", str(N_CTX), "-t", "1"]
    assert paper_table.main(["-m", str(models / "folded.gguf"), *arguments]) == 1
    assert "is folded already" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert paper_table.main(["-m", str(models / "stock.gguf"), *arguments, "--plot", str(tmp_path)]) == 1
    assert capsys.readouterr().err.splitlines() == ["error: --plot needs matplotlib: pip install '.[tools]'"]
