"""What llama-perplexity reports under --kl-divergence, computed as it computes it.

Q is the model being measured, base the one whose log-probabilities come from the base file. KLD is of base from Q:
sum p_base * (log p_base - log p_Q) over the tokens with log p_base > -16. delta p is p_Q - p_base of the text's token.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from ksort_gguf.eval.kld import log_sum_exp

_FEWEST = 100  # positions, below which no statistics are made
_LEAST_LOG_P = -16.0
HEADER = (
    "chunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence              Δp RMS"
    "            Same top p"
)


@dataclass
class Estimate:
    """A mean and its standard error."""

    value: float
    error: float

    def scaled(self, factor: float) -> "Estimate":
        return Estimate(self.value * factor, self.error * abs(factor))

    def exp(self) -> "Estimate":
        value = math.exp(self.value)
        return Estimate(value, value * self.error)


@dataclass
class KldStatistics:
    """Values at each scored position so far; every statistic is computed from them when asked for."""

    nll: list[np.ndarray] = field(default_factory=list)  # float32, of Q
    nll_base: list[np.ndarray] = field(default_factory=list)
    kld: list[np.ndarray] = field(default_factory=list)
    same_top: list[np.ndarray] = field(default_factory=list)  # bool

    def add(self, logits: torch.Tensor, base: torch.Tensor, targets: torch.Tensor) -> None:
        """Take in `logits` of Q and log-probabilities `base`, float32 [rows, n_vocab]; `targets` int64 [rows]."""
        log_sum = log_sum_exp(logits).float()[:, None]
        # p_base stays 0 where the base is too unlikely to count
        p_base = torch.where(base > _LEAST_LOG_P, base.exp(), 0.0)
        gap = base - logits + log_sum
        self.kld.append((p_base * gap).sum(dim=-1, dtype=torch.float64).numpy())
        rows = torch.arange(len(targets))
        self.nll.append((log_sum[:, 0] - logits[rows, targets]).numpy())
        self.nll_base.append(-base[rows, targets].numpy())
        # NumPy's argmax: the first of equal values, which torch's does not promise
        self.same_top.append(logits.numpy().argmax(axis=-1) == base.numpy().argmax(axis=-1))

    @property
    def n_scored(self) -> int:
        return sum(map(len, self.kld))

    def mean_kld(self) -> Estimate:
        return _mean(np.concatenate(self.kld))

    def ppl(self) -> Estimate:
        return _mean(_doubles(self.nll)).exp()

    def ppl_base(self) -> Estimate:
        return _mean(_doubles(self.nll_base)).exp()

    def log_ppl_ratio(self) -> Estimate:
        """ln(PPL(Q) / PPL(base)); the error counts that both were measured on the same text."""
        q, base = _mean(_doubles(self.nll)), _mean(_doubles(self.nll_base))
        variance = q.error**2 + base.error**2 - 2 * self._covariance()
        return Estimate(q.value - base.value, math.sqrt(max(variance, 0.0)))

    def delta_p(self) -> np.ndarray:
        """p_Q - p_base of each scored token, float32."""
        return np.exp(-np.concatenate(self.nll)) - np.exp(-np.concatenate(self.nll_base))

    def rms_delta_p(self) -> Estimate:
        mean_square = _mean(self.delta_p().astype(np.float64) ** 2)
        rms = math.sqrt(mean_square.value)
        return Estimate(rms, 0.5 / rms * mean_square.error if rms else 0.0)

    def same_top_p(self) -> Estimate:
        """Share of positions where both find the same token likeliest."""
        share = float(np.concatenate(self.same_top).mean())
        return Estimate(share, math.sqrt(share * (1 - share) / max(self.n_scored - 1, 1)))

    def _covariance(self) -> float:
        """Covariance of the two mean NLLs; 0 with too few values to tell."""
        q, base = _doubles(self.nll), _doubles(self.nll_base)
        if len(q) < 10:
            return 0.0
        return float((q * base).mean() - q.mean() * base.mean()) / (len(q) - 1)

    def chunk_line(self, n_chunks: int) -> str:
        """The state after `n_chunks` chunks, under HEADER."""
        ppl, ratio, kld = self.ppl(), self.log_ppl_ratio(), self.mean_kld()
        rms, same = self.rms_delta_p().scaled(100), self.same_top_p().scaled(100)
        return (
            f"{n_chunks:4d}    {ppl.value:9.4f} ± {ppl.error:9.4f}    {ratio.value:10.5f} ± {ratio.error:10.5f}"
            f"    {kld.value:10.5f} ± {kld.error:10.5f}    {rms.value:6.3f} ± {rms.error:6.3f} %"
            f"    {same.value:6.3f} ± {same.error:6.3f} %"
        )

    def report(self) -> str:
        """llama-perplexity's closing tables, or one line if there are too few positions for statistics."""
        if self.n_scored < _FEWEST:
            return f"{self.n_scored} scored positions are too few for statistics: score at least {_FEWEST}"
        return "\n\n".join((self._ppl_table(), self._kld_table(), self._delta_p_table()))

    def _ppl_table(self) -> str:
        q, base, ratio = self.ppl(), self.ppl_base(), self.log_ppl_ratio()
        log_errors = _mean(_doubles(self.nll)).error * _mean(_doubles(self.nll_base)).error
        correlation = self._covariance() / log_errors if log_errors else math.nan
        variance = q.error**2 + base.error**2 - 2 * q.value * base.value * self._covariance()
        rows = (
            ("Mean PPL(Q)                   ", q),
            ("Mean PPL(base)                ", base),
            ("Mean ln(PPL(Q)/PPL(base))     ", ratio),
            ("Mean PPL(Q)/PPL(base)         ", ratio.exp()),
            ("Mean PPL(Q)-PPL(base)         ", Estimate(q.value - base.value, math.sqrt(max(variance, 0.0)))),
        )
        lines = [f"{label}: {each.value:10.6f} ± {each.error:10.6f}" for label, each in rows]
        lines.insert(2, f"Cor(ln(PPL(Q)), ln(PPL(base))): {100 * correlation:6.2f}%")
        return "\n".join(("====== Perplexity statistics ======", *lines))

    def _kld_table(self) -> str:
        mean = self.mean_kld()
        values = np.sort(np.concatenate(self.kld).astype(np.float32))
        lines = [f"Mean    KLD: {mean.value:10.6f} ± {mean.error:10.6f}"]
        lines += [
            f"{_label(share)} KLD: {_quantile(values, share):10.6f}"
            for share in (1, 0.999, 0.99, 0.95, 0.9, 0.5, 0.1, 0.05, 0.01, 0.001, 0)
        ]
        return "\n".join(("====== KL divergence statistics ======", *lines))

    def _delta_p_table(self) -> str:
        mean = _mean(self.delta_p().astype(np.float64)).scaled(100)
        rms, same = self.rms_delta_p().scaled(100), self.same_top_p().scaled(100)
        values = np.sort(self.delta_p())
        lines = [f"Mean    Δp: {mean.value:6.3f} ± {mean.error:5.3f} %"]
        lines += [
            f"{_label(share)} Δp: {100 * _quantile(values, share):6.3f}%"
            for share in (1, 0.999, 0.99, 0.95, 0.9, 0.75, 0.5, 0.25, 0.1, 0.05, 0.01, 0.001, 0)
        ]
        lines.append(f"RMS Δp    : {rms.value:6.3f} ± {rms.error:5.3f} %")
        lines.append(f"Same top p: {same.value:6.3f} ± {same.error:5.3f} %")
        return "\n".join(("====== Token probability statistics ======", *lines))


def _doubles(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.float64)


def _mean(values: np.ndarray) -> Estimate:
    """Mean and its standard error, 0 with ten values or fewer, by llama.cpp's sums."""
    mean = float(values.mean())
    variance = float((values * values).mean()) - mean * mean
    return Estimate(mean, math.sqrt(variance / (len(values) - 1)) if variance > 0 and len(values) > 10 else 0.0)


def _quantile(ordered: np.ndarray, share: float) -> float:
    """The value with `share` of the ascending values `ordered` below it, interpolated."""
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return float(ordered[below] + (place - below) * (ordered[above] - ordered[below]))


def _label(share: float) -> str:
    named = {1: "Maximum", 0.5: "Median ", 0: "Minimum"}
    return named.get(share) or f"{100 * share:4.1f}%  "
