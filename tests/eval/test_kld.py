"""KL divergence base files, byte by byte, and the statistics made from them."""

import math
import resource
import struct

import numpy as np
import pytest
import torch

from ksort_gguf.errors import KsortError
from ksort_gguf.eval.kld import Base, BaseWriter, encode_rows
from ksort_gguf.eval.kld_statistics import KldStatistics

TOKENS = [0, 1, 2, 3, 4, 0, 1, 2]  # two chunks of 4, each with one scored position


def random_logits(rows: int, n_vocab: int, spread: float = 3.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(5).normal(0, spread, (rows, n_vocab)).astype(np.float32))


def write(path, logits: torch.Tensor, tokens=TOKENS, n_ctx: int = 4) -> None:
    with BaseWriter(path, n_ctx, logits.shape[1], tokens) as writer:
        writer.write(logits[:1])
        writer.write(logits[1:])


def test_layout(tmp_path):
    """A file that llama.cpp reads as noise: field order, widths, padding of an odd vocabulary, scale and minimum."""
    path = tmp_path / "base.kld"
    logits = torch.tensor([[0.0, 1.0, 3.0, 2.0, -20.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    write(path, logits)
    data = path.read_bytes()
    assert data[:20] == b"_logits_" + struct.pack("<3i", 4, 5, 2)
    assert data[20:52] == struct.pack("<8i", *TOKENS)
    scale, minimum, *q, pad = struct.unpack("<ff6H", data[52:72])
    log_sum = math.log(sum(math.exp(x) for x in (0, 1, 3, 2)))
    assert scale == pytest.approx(16 / 65535, rel=1e-6)
    assert minimum == pytest.approx(3 - 16 - log_sum, rel=1e-6)
    assert q == [53247, 57343, 65535, 61439, 0]  # (x - 3 + 16) / scale, -20 is under the minimum
    assert pad == 0
    assert struct.unpack("<ff6H", data[72:]) == (0.0, pytest.approx(-math.log(5)), 0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("n_vocab", [6, 7, 300])
def test_round_trip(n_vocab, tmp_path):
    """Rows read at the wrong offset; log-probabilities off by more than half a step."""
    logits = random_logits(2, n_vocab)
    path = tmp_path / "base.kld"
    write(path, logits, [token % n_vocab for token in TOKENS])
    exact = torch.log_softmax(logits.double(), dim=-1)
    with Base(path, n_vocab) as base:
        assert (base.n_ctx, base.n_vocab, base.n_chunks) == (4, n_vocab, 2)
        assert base.tokens.ravel().tolist() == [token % n_vocab for token in TOKENS]
        read = torch.cat([base.read(1), base.read(1)])
    span = (exact.amax(dim=-1) - exact.amin(dim=-1)).clamp(max=16)
    kept = exact > exact.amax(dim=-1, keepdim=True) - 16
    assert (read - exact)[kept].abs().max() <= 0.51 * span.max() / 65535 + 4e-6


def test_file_appears_only_when_complete(tmp_path):
    """A half-written base file under its name after Ctrl-C, an error, or too few rows; leftovers beside it."""
    path = tmp_path / "base.kld"
    logits = random_logits(2, 6)
    with BaseWriter(path, 4, 6, TOKENS) as writer:
        writer.write(logits[:1])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), BaseWriter(path, 4, 6, TOKENS) as writer:
        writer.write(logits)
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    write(path, logits)
    assert list(tmp_path.iterdir()) == [path]


def test_disk_full(tmp_path):
    """A traceback, or half a file, when the disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    tokens = [0] * 4000
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, hard))  # a larger file is an OSError, as a full disk is
    try:
        writing = BaseWriter(tmp_path / "base.kld", 4, 500, tokens)
        with pytest.raises(KsortError, match=r"base\.kld: cannot be written: "), writing as writer:
            writer.write(random_logits(1000, 500))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_unwritable_names_are_refused_before_the_run(tmp_path):
    """Hours of logits lost because the name was a folder or in none."""
    for path in (tmp_path, tmp_path / "nothing" / "base.kld"):
        with pytest.raises(KsortError, match="cannot be written: "), BaseWriter(path, 4, 6, TOKENS):
            pytest.fail("entered")


def test_writer_counts_rows(tmp_path):
    """A writer fed more rows than the header promises, or of another vocabulary."""
    for bad in (random_logits(3, 6), random_logits(1, 7)):
        with pytest.raises(ValueError, match="rows of 6"), BaseWriter(tmp_path / "base.kld", 4, 6, TOKENS) as writer:
            writer.write(bad)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:-1], "bytes where 92 are due"),
        (lambda data: data + b"\0", "bytes where 92 are due"),
        (lambda data: data[:10], "is not a KL divergence base file"),
        (lambda data: b"GGUF" + data[4:], "is not a KL divergence base file"),
        (lambda data: data[:16] + struct.pack("<i", -1) + data[20:], "-1 chunks"),
        (lambda data: data[:20] + struct.pack("<i", 6) + data[24:], "outside of the vocabulary"),
    ],
)
def test_damaged_files(damage, said, tmp_path):
    """Rows read past the end, or garbage statistics from a damaged file."""
    path = tmp_path / "base.kld"
    write(path, random_logits(2, 6))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(KsortError, match=said) as caught:
        Base(path, 6)
    assert str(caught.value).startswith(str(path))


def test_other_models_and_missing_files(tmp_path):
    """Statistics against the base of another model."""
    path = tmp_path / "base.kld"
    write(path, random_logits(2, 6))
    with pytest.raises(KsortError, match="vocabulary of 6, the model has 7"):
        Base(path, 7)
    with pytest.raises(KsortError, match="cannot be read"):
        Base(tmp_path / "nothing", 6)


def some_statistics(n: int = 240) -> tuple[KldStatistics, dict[str, np.ndarray]]:
    """Statistics of random models taken in by parts, and the values at each position in float64."""
    base_logits = random_logits(n, 40)
    logits = base_logits + torch.from_numpy(np.random.default_rng(6).normal(0, 0.5, (n, 40)).astype(np.float32))
    base = torch.log_softmax(base_logits, dim=-1)
    targets = torch.from_numpy(np.random.default_rng(7).integers(0, 40, n))
    statistics = KldStatistics()
    for start in range(0, n, 50):
        part = slice(start, start + 50)
        statistics.add(logits[part], base[part], targets[part])
    q, b = torch.log_softmax(logits.double(), -1).numpy(), base.double().numpy()
    at = np.arange(n), targets.numpy()
    values = {
        "kld": (np.exp(b) * (b - q)).sum(-1),
        "nll": -q[at],
        "nll_base": -b[at],
        "delta_p": np.exp(q[at]) - np.exp(b[at]),
        "same": q.argmax(-1) == b.argmax(-1),
    }
    return statistics, values


def test_statistics():
    """The divergence of Q from base instead of base from Q, a deviation for an error, shares of the wrong tokens."""
    statistics, values = some_statistics()
    n = len(values["kld"])
    root = math.sqrt(n - 1)
    kld, ratio = statistics.mean_kld(), statistics.log_ppl_ratio()
    assert kld.value == pytest.approx(values["kld"].mean(), rel=1e-5)
    assert kld.error == pytest.approx(values["kld"].std() / root, rel=1e-4)
    assert statistics.ppl().value == pytest.approx(math.exp(values["nll"].mean()), rel=1e-5)
    assert statistics.ppl().error == pytest.approx(
        math.exp(values["nll"].mean()) * values["nll"].std() / root, rel=1e-4
    )
    assert statistics.ppl_base().value == pytest.approx(math.exp(values["nll_base"].mean()), rel=1e-5)
    difference = values["nll"] - values["nll_base"]
    assert ratio.value == pytest.approx(difference.mean(), rel=1e-4)
    assert ratio.error == pytest.approx(difference.std() / root, rel=1e-3)
    square = values["delta_p"] ** 2
    rms = math.sqrt(square.mean())
    assert statistics.rms_delta_p().value == pytest.approx(rms, rel=1e-4)
    assert statistics.rms_delta_p().error == pytest.approx(square.std() / root / (2 * rms), rel=1e-3)
    assert statistics.same_top_p().value == values["same"].mean()
    assert 0.5 < statistics.same_top_p().value < 1


def test_unlikely_tokens_do_not_count():
    """Stored log-probabilities end 16 below the largest: what is clipped there must not add to the divergence."""
    logits = torch.full((1, 3), -30.0)
    logits[0, 0] = 0.0
    base = torch.tensor([[0.0, -16.0, -16.0]])
    statistics = KldStatistics()
    statistics.add(logits, base, torch.tensor([0]))
    assert statistics.mean_kld().value == pytest.approx(0, abs=1e-7)


def test_report():
    """Tables that differ from llama-perplexity's in labels or order, or percentiles that are swapped."""
    statistics, values = some_statistics()
    report = statistics.report().splitlines()
    numbers = {line.split(":")[0].rstrip(): line.split(":")[1] for line in report if ":" in line}
    assert [line.split(":")[0].rstrip() for line in report] == [
        "====== Perplexity statistics ======", "Mean PPL(Q)", "Mean PPL(base)", "Cor(ln(PPL(Q)), ln(PPL(base)))",
        "Mean ln(PPL(Q)/PPL(base))", "Mean PPL(Q)/PPL(base)", "Mean PPL(Q)-PPL(base)", "",
        "====== KL divergence statistics ======", "Mean    KLD", "Maximum KLD", "99.9%   KLD", "99.0%   KLD",
        "95.0%   KLD", "90.0%   KLD", "Median  KLD", "10.0%   KLD", " 5.0%   KLD", " 1.0%   KLD", " 0.1%   KLD",
        "Minimum KLD", "", "====== Token probability statistics ======", "Mean    Δp", "Maximum Δp", "99.9%   Δp",
        "99.0%   Δp", "95.0%   Δp", "90.0%   Δp", "75.0%   Δp", "Median  Δp", "25.0%   Δp", "10.0%   Δp", " 5.0%   Δp",
        " 1.0%   Δp", " 0.1%   Δp", "Minimum Δp", "RMS Δp", "Same top p",
    ]  # fmt: skip
    for share, label in ((1, "Maximum"), (0.999, "99.9%  "), (0.5, "Median "), (0.05, " 5.0%  "), (0, "Minimum")):
        assert float(numbers[f"{label} KLD"]) == pytest.approx(np.quantile(values["kld"], share), abs=2e-6)
        delta = float(numbers[f"{label} Δp"].rstrip("%"))
        assert delta == pytest.approx(100 * np.quantile(values["delta_p"], share), abs=1e-3)
    correlation = np.corrcoef(values["nll"], values["nll_base"])[0, 1]
    assert float(numbers["Cor(ln(PPL(Q)), ln(PPL(base)))"].rstrip("%")) == pytest.approx(100 * correlation, abs=0.006)


def test_too_few_positions():
    """Percentiles of a handful of values taken for statistics."""
    statistics, _ = some_statistics(99)
    assert statistics.report() == "99 scored positions are too few for statistics: score at least 100"


def test_equal_models():
    """Division by zero, or the root of a negative number, where nothing differs."""
    logits = random_logits(120, 10)
    statistics = KldStatistics()
    statistics.add(logits, torch.log_softmax(logits, dim=-1), torch.zeros(120, dtype=torch.int64))
    assert statistics.same_top_p().value == 1
    assert "nan" not in statistics.report()
    assert statistics.chunk_line(1).startswith("   1 ")


def test_ties_take_the_first_token():
    """Quantized log-probabilities tie: argmax must take the first as llama.cpp does, on both sides."""
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
    statistics = KldStatistics()
    statistics.add(logits, torch.log_softmax(torch.tensor([[0.0, 2.0, 1.9, 1.0]]), dim=-1), torch.tensor([0]))
    assert statistics.same_top_p().value == 1


def test_rows_are_encoded_alike_in_any_slice():
    """Rows that depend on what they are encoded together with."""
    logits = random_logits(5, 33, spread=9.0)
    together = encode_rows(logits)
    for row in range(5):
        np.testing.assert_array_equal(encode_rows(logits[row : row + 1])[0], together[row])
