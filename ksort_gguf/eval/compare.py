"""Caches compared on one text: perplexity of the first, KL divergence of the others from it."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from ksort_gguf.eval.kld import Base, BaseWriter
from ksort_gguf.eval.kld_statistics import KldStatistics
from ksort_gguf.eval.perplexity import Forward, Perplexity, count_chunks, kl_divergence, perplexity


class Comparison:
    """The first `chunks` chunks of `n_ctx` of `tokens` (-1: all). Use as a context: its base file is temporary.

    `n_chunks`: how many these are. n_vocab: the models' logits; bos_id: None where the tokenizer adds no BOS. Raises
    KsortError as count_chunks does.
    """

    def __init__(self, tokens: Sequence[int], n_ctx: int, n_vocab: int, bos_id: int | None, chunks: int = -1):
        self.n_chunks = count_chunks(len(tokens), n_ctx, chunks)
        self._tokens, self._n_ctx = tokens, n_ctx
        self._n_vocab, self._bos_id = n_vocab, bos_id

    def __enter__(self) -> "Comparison":
        self._folder = tempfile.TemporaryDirectory()
        self._base = Path(self._folder.name) / "base"
        return self

    def __exit__(self, *exception: object) -> None:
        self._folder.cleanup()

    def base(self, forward: Forward) -> Perplexity:
        """What the others are compared with."""
        scored = self._tokens[: self.n_chunks * self._n_ctx]
        with BaseWriter(self._base, self._n_ctx, self._n_vocab, scored) as writer:
            return perplexity(forward, self._tokens, self._n_ctx, self.n_chunks, self._bos_id, base_writer=writer)

    def against_base(self, forward: Forward) -> KldStatistics:
        """Another cache on the same text."""
        with Base(self._base, self._n_vocab) as base:
            return kl_divergence(forward, base, self._bos_id)
