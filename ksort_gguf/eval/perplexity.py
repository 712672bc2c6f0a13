"""llama-perplexity's protocol, over any model that gives logits.

The text is tokenized whole and cut into chunks of n_ctx tokens that do not see each other. BOS takes the place of each
chunk's first token where the tokenizer adds BOS. Predictions at positions n_ctx / 2 .. n_ctx - 2 are scored.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ksort_gguf.cache.protocol import Context
from ksort_gguf.engine.tokenizer.tokenizer import Tokenizer, read_text
from ksort_gguf.errors import KsortError
from ksort_gguf.eval.kld import Base, BaseWriter, first_scored, log_sum_exp, n_scored
from ksort_gguf.eval.kld_statistics import KldStatistics

# forward(tokens, first_logit): logits at positions first_logit .. len(tokens) - 1 of a text that begins with
# `tokens`, nothing remembered from earlier calls; float32 [len(tokens) - first_logit, n_vocab]
Forward = Callable[[list[int], int], torch.Tensor]

_ROWS = 16  # positions scored at once: few enough to stay near the CPU, 10 MB an array for 150k tokens


@dataclass
class Perplexity:
    """Sums over the scored positions so far."""

    n_chunks: int = 0
    n_scored: int = 0
    nll: float = 0.0  # sum of -log p(token)
    nll_squares: float = 0.0

    @property
    def ppl(self) -> float:
        return math.exp(self.nll / self.n_scored)

    @property
    def error(self) -> float:
        """Standard error of `ppl`."""
        mean = self.nll / self.n_scored
        variance = self.nll_squares / self.n_scored - mean * mean
        return math.sqrt(variance / (self.n_scored - 1)) * self.ppl if variance > 0 and self.n_scored > 1 else 0.0

    def running(self) -> str:
        """What is printed after a chunk, without a line end."""
        return f"[{self.n_chunks}]{self.ppl:.4f},"

    def final(self) -> str:
        """The closing line."""
        return f"Final estimate: PPL = {self.ppl:.4f} +/- {self.error:.5f}"


def forward_of(context: Context) -> Forward:
    """A model's context as this protocol wants it: each call starts anew, in the same cache."""

    def forward(tokens: list[int], first_logit: int) -> torch.Tensor:
        context.cache.truncate(0)
        return context.forward(tokens, n_logits=len(tokens) - first_logit)

    return forward


def tokenize_file(path: str | Path, tokenizer: Tokenizer) -> list[int]:
    """Token ids of the text in `path`, as llama-perplexity -f reads it: one newline at the end is dropped.

    Raises KsortError naming the file if it is not UTF-8, or if the model's tokenizer appends EOS.
    """
    if tokenizer.add_eos:
        raise KsortError(f"{path}: cannot be scored: the model's tokenizer appends EOS (tokenizer.ggml.add_eos_token)")
    return tokenizer.encode(read_text(path).removesuffix("\n"), parse_special=False)


def count_chunks(n_tokens: int, n_ctx: int, chunks: int = -1) -> int:
    """How many chunks to score: all of a text's, or the first `chunks`.

    Raises KsortError for a text shorter than two chunks, a context too small to score in, or 0 chunks.
    """
    if n_ctx < 3:
        raise KsortError(f"`n_ctx` {n_ctx} leaves no position to score: use at least 3", field="n_ctx")
    if n_tokens < 2 * n_ctx:
        raise KsortError(
            f"the text has {n_tokens} tokens, a context of {n_ctx} needs {2 * n_ctx}: use a longer text or a smaller "
            "`n_ctx`"
        )
    if chunks == 0:
        raise KsortError("`chunks` 0 scores nothing: pass a count, or -1 for all", field="chunks")
    return n_tokens // n_ctx if chunks < 0 else min(chunks, n_tokens // n_ctx)


def perplexity(
    forward: Forward,
    tokens: Sequence[int],
    n_ctx: int,
    chunks: int = -1,
    bos_id: int | None = None,
    on_chunk: Callable[[Perplexity], None] = lambda result: None,
    base_writer: BaseWriter | None = None,
) -> Perplexity:
    """Score `tokens`; `bos_id` is None where the tokenizer adds no BOS. `base_writer` gets every scored row.

    Raises KsortError as `count_chunks` does.
    """
    result = Perplexity()
    for chunk in range(count_chunks(len(tokens), n_ctx, chunks)):
        ids = list(tokens[chunk * n_ctx : (chunk + 1) * n_ctx])
        for logits, targets in _scored(forward, ids, bos_id):
            nll = log_sum_exp(logits) - logits.gather(1, targets[:, None])[:, 0].double()
            result.nll += float(nll.sum())
            result.nll_squares += float((nll * nll).sum())
            if base_writer is not None:
                base_writer.write(logits)
        result.n_chunks += 1
        result.n_scored += n_scored(n_ctx)
        on_chunk(result)
    return result


def kl_divergence(
    forward: Forward,
    base: Base,
    bos_id: int | None = None,
    on_chunk: Callable[[int, KldStatistics], None] = lambda n_chunks, statistics: None,
) -> KldStatistics:
    """Compare the model with `base` on the base's own tokens; `on_chunk` gets the chunks done and the state so far."""
    statistics = KldStatistics()
    for chunk, ids in enumerate(base.tokens.tolist()):
        for logits, targets in _scored(forward, ids, bos_id):
            statistics.add(logits, base.read(len(targets)), targets)
        on_chunk(chunk + 1, statistics)
    return statistics


def _scored(forward: Forward, ids: list[int], bos_id: int | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A chunk's scored positions in slices: logits float32 [rows, n_vocab], the tokens that follow int64 [rows]."""
    first = first_scored(len(ids))
    fed = ids if bos_id is None else [bos_id, *ids[1:]]
    logits = forward(fed, first)[:-1]  # nothing is known to follow the last position
    targets = torch.tensor(ids[first + 1 :], dtype=torch.int64)
    for start in range(0, len(targets), _ROWS):
        yield logits[start : start + _ROWS], targets[start : start + _ROWS]
