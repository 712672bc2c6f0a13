"""llama-perplexity's protocol over mock models whose probabilities are known."""

import math

import pytest
import torch
from text_support import byte_tokenizer

from ksort_gguf.errors import KsortError
from ksort_gguf.eval.kld import Base, BaseWriter
from ksort_gguf.eval.perplexity import count_chunks, kl_divergence, perplexity, tokenize_file

N_VOCAB = 11


def next_token_model(share: float):
    """A model that gives token t + 1 the probability `share` after token t, the others equal parts of the rest."""

    def forward(tokens: list[int], first_logit: int) -> torch.Tensor:
        logits = torch.full((len(tokens) - first_logit, N_VOCAB), math.log((1 - share) / (N_VOCAB - 1)))
        for row, token in enumerate(tokens[first_logit:]):
            logits[row, (token + 1) % N_VOCAB] = math.log(share)
        return logits + 3.0  # logits need not be log-probabilities

    return forward


def test_uniform_model():
    """Any error in the sums: a model without opinions has perplexity n_vocab, and no error."""
    result = perplexity(lambda tokens, first: torch.zeros(len(tokens) - first, N_VOCAB), list(range(10)) * 4, 8)
    assert result.ppl == pytest.approx(N_VOCAB, rel=1e-6)
    assert result.error == pytest.approx(0, abs=1e-3)
    assert (result.n_chunks, result.n_scored) == (5, 15)


def test_scores_the_next_token():
    """Logits scored against their own position's token, or against the one after the next."""
    counting = [i % N_VOCAB for i in range(64)]
    assert perplexity(next_token_model(0.5), counting, 16).ppl == pytest.approx(2.0, rel=1e-6)


@pytest.mark.parametrize(("n_ctx", "scored"), [(8, [5, 6, 7]), (7, [4, 5, 6]), (3, [2])])
def test_scored_positions(n_ctx, scored):
    """Off-by-one in the scored half: positions n_ctx / 2 .. n_ctx - 2 predict the tokens one further on."""
    for position in range(n_ctx):
        tokens = [i % N_VOCAB for i in range(n_ctx)] + [0] * n_ctx
        tokens[position] = (tokens[position] + 5) % N_VOCAB  # neither predicted nor followed as the model expects
        surprised = perplexity(next_token_model(0.9), tokens, n_ctx, chunks=1).ppl > 1.2
        followed = position + 1 in scored and position >= n_ctx // 2
        assert surprised == (position in scored or followed)


def test_error_of_the_mean():
    """The deviation in place of the error, or the error of the mean NLL in place of the perplexity's."""
    tokens = [0, 1, 2, 3, 4, 5, 6, 0] * 2  # of each chunk 5, 6 come as expected, 0 does not
    result = perplexity(next_token_model(0.5), tokens, 8)
    values = [-math.log(0.5), -math.log(0.5), -math.log(0.05)] * 2
    mean = sum(values) / 6
    variance = sum(value * value for value in values) / 6 - mean * mean
    assert result.ppl == pytest.approx(math.exp(mean), rel=1e-6)
    assert result.error == pytest.approx(math.sqrt(variance / 5) * math.exp(mean), rel=1e-5)


def test_bos_replaces_the_first_token_of_each_chunk():
    """BOS put in front (which shifts every position), only before the first chunk, or left out."""
    seen = []

    def forward(tokens, first_logit):
        seen.append((tokens, first_logit))
        return torch.zeros(len(tokens) - first_logit, N_VOCAB)

    perplexity(forward, list(range(10)), 4, bos_id=9)
    assert seen == [([9, 1, 2, 3], 2), ([9, 5, 6, 7], 2)]
    seen.clear()
    perplexity(forward, list(range(10)), 4, chunks=1)
    assert seen == [([0, 1, 2, 3], 2)]


def test_long_chunks_are_scored_in_slices():
    """Positions lost or scored twice where a chunk is cut into slices."""
    counting = [i % N_VOCAB for i in range(400)]
    result = perplexity(next_token_model(0.25), counting, 200)
    assert result.n_scored == 2 * 99
    assert result.ppl == pytest.approx(4.0, rel=1e-6)


def test_lines():
    """Output that scripts written for llama-perplexity cannot read."""
    lines = []
    result = perplexity(
        next_token_model(0.5), [0, 1, 2, 3, 4, 5, 6, 0] * 2, 8, on_chunk=lambda so_far: lines.append(so_far.running())
    )
    assert lines == ["[1]4.3089,", "[2]4.3089,"]
    assert result.final() == "Final estimate: PPL = 4.3089 +/- 2.09164"


def test_chunk_count():
    """A text that is too short scored as nan; more chunks promised than the text has."""
    assert count_chunks(1000, 100) == 10
    assert count_chunks(1099, 100, 3) == 3
    assert count_chunks(250, 100, 9) == 2
    with pytest.raises(KsortError, match=r"the text has 199 tokens, a context of 100 needs 200: "):
        count_chunks(199, 100)
    with pytest.raises(KsortError, match="`chunks` 0"):
        count_chunks(1000, 100, 0)
    with pytest.raises(KsortError, match="`n_ctx` 2"):
        count_chunks(1000, 2)


def test_text_is_read_as_llama_perplexity_reads_it(tmp_path):
    """One token more at the end, control tokens parsed out of the text, CRLF turned into LF."""
    path = tmp_path / "text"
    path.write_bytes(b"a\r\n<s>\n\n")
    tokenizer = byte_tokenizer(merges=(), special=[("<s>", 3)], bos_token_id=256, add_bos_token=True)
    assert tokenize_file(path, tokenizer) == [256, *b"a\r\n<s>\n"]


def test_a_tokenizer_that_adds_eos_is_refused(tmp_path):
    """llama.cpp stops here too: an EOS in the middle of the last chunk is scored as text."""
    tokenizer = byte_tokenizer(eos_token_id=5, add_eos_token=True)
    with pytest.raises(KsortError, match="add_eos_token"):
        tokenize_file(tmp_path / "text", tokenizer)


def test_kl_divergence_follows_the_base_file(tmp_path):
    """Rows of the base matched with other positions or chunks, or other tokens than the base's."""
    tokens = [(3 * i * i) % N_VOCAB for i in range(210)]
    path = tmp_path / "base.kld"
    with BaseWriter(path, 70, N_VOCAB, tokens) as writer:
        perplexity(next_token_model(0.5), tokens, 70, bos_id=2, base_writer=writer)
    with Base(path, N_VOCAB) as base:
        same = kl_divergence(next_token_model(0.5), base, bos_id=2)
    assert same.n_scored == 3 * 34
    assert abs(same.mean_kld().value) < 1e-4
    done = []
    with Base(path, N_VOCAB) as base:
        other = kl_divergence(next_token_model(0.8), base, bos_id=2, on_chunk=lambda n, so_far: done.append(n))
    expected = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)
    assert other.mean_kld().value == pytest.approx(expected, rel=1e-3)
    assert done == [1, 2, 3]
