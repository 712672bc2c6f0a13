"""llama.cpp's own answers, from the prebuilt wheel xllamacpp; for tests that are marked `peers`."""

from pathlib import Path

import numpy as np
import pytest
from family_support import EXACT, IDS, N_VOCAB

from ksort_gguf.engine.load import LoadedModel


class LlamaCpp:
    """A GGUF file in llama.cpp's server, keys and values in f32; flash attention would round queries to f16."""

    def __init__(self, path: Path, n_vocab: int, n_ctx: int = 128):
        xllamacpp = pytest.importorskip("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_batch, params.n_parallel = str(path), n_ctx, n_ctx, 1
        params.cpuparams.n_threads, params.warmup = 2, False
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self._server, self._n_vocab = xllamacpp.Server(params), n_vocab

    def greedy(self, ids: list[int], n: int) -> list[int]:
        """The likeliest continuation."""
        return [entry["id"] for entry in self._complete(ids, n, n_probs=1)]

    def log_probabilities(self, ids: list[int]) -> np.ndarray:
        """float [len(ids) - 1]: of each token after the first, given those before."""
        found = []
        for i in range(1, len(ids)):
            entry = self._complete(ids[:i], 1, n_probs=self._n_vocab)[0]
            found.append({top["id"]: top["logprob"] for top in entry["top_logprobs"]}[ids[i]])
        return np.array(found)

    def _complete(self, ids: list[int], n: int, n_probs: int) -> list[dict]:
        request = {"prompt": ids, "max_tokens": n, "temperature": 0, "logprobs": n_probs, "ignore_eos": True}
        return self._server.handle_completions(request)["choices"][0]["logprobs"]["content"]


def assert_agrees_with_llama_cpp(loaded: LoadedModel, n_ctx: int = 128, n_tokens: int = 60) -> None:
    """The tokens that both draw greedily, and the perplexity of a random text, of a loaded model's file."""
    theirs = LlamaCpp(loaded.path, N_VOCAB, n_ctx)
    ids, context, drawn = IDS[:20], loaded.backend.start(EXACT, n_ctx), []
    logits = context.forward(ids)
    for _ in range(24):
        last = logits[0].numpy().copy()
        last[list(loaded.tokenizer.eog_ids)] = -np.inf  # as ignore_eos does
        drawn.append(int(last.argmax()))
        logits = context.forward(drawn[-1:])
    assert theirs.greedy(ids, len(drawn)) == drawn
    text = IDS[:n_tokens]
    context = loaded.backend.start(EXACT, n_ctx)
    ours = context.forward(text, len(text)).log_softmax(dim=1).numpy()[np.arange(len(text) - 1), text[1:]]
    expected = theirs.log_probabilities(text)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-3)
    assert np.exp(-ours.mean()) == pytest.approx(np.exp(-expected.mean()), rel=1e-4)
