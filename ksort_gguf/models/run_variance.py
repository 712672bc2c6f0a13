"""The interpreter of a spec that needs no text: means and covariances of queries, keys and values from weights alone.

What a projection gives depends on its input, an RMS-normalized hidden state. Its channels are taken as uncorrelated, of
mean 0, and their variances follow from the weights, layer by layer: the hidden state begins as an embedding, and every
attention and MLP adds the variance that its output matrix gives to it (a diagonal version of moment propagation). The
assumption of equal variances (RMSNorm's gain alone) costs SmolLM2 a quarter more KL divergence.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ksort_gguf.container.tensors import Tensor
from ksort_gguf.errors import KsortError
from ksort_gguf.models.source import Source
from ksort_gguf.models.spec import Block, Norm, Projection

ATTENTION_SHARE = 0.3  # of the values' variance that is left after attention's averaging over tokens
_CHUNK_VALUES = 4 << 20  # of a tensor expanded at a time


@dataclass(frozen=True, eq=False)
class Heads:
    """Heads of one projection, before RoPE."""

    mean: np.ndarray  # float64 [heads, d]
    covariance: np.ndarray  # float64 [heads, d, d]


@dataclass(frozen=True, eq=False)
class ProjectedHeads:
    """A layer's queries, keys and values."""

    q: Heads
    k: Heads
    v: Heads


def projected_heads(source: Source) -> Iterator[ProjectedHeads]:
    """Of each layer of a stock model in turn. Reads every matrix once, some rows at a time.

    Raises KsortError for missing or non-finite tensors and for variances that overflow.
    """
    hidden = _Hidden(source)
    for block in source.spec.blocks:
        entering, a = hidden.normalized(block.attention_norm), block.attention
        q = _normed(source, _heads(source, a.q, a.head_dim, entering), a.q_norm)
        k = _normed(source, _heads(source, a.k, a.head_dim, entering), a.k_norm)
        yield ProjectedHeads(q, k, _heads(source, a.v, a.head_dim, entering))
        hidden.add(block, entering)


def _heads(source: Source, projection: Projection, head_dim: int, variance: np.ndarray) -> Heads:
    """Heads of a projection of uncorrelated inputs of `variance` [n_in]."""
    tensor, covariances = source.tensor(projection.weight), []
    for row in range(projection.start, projection.start + projection.n_out, head_dim):
        weighted = tensor.read_finite_f32(tensor.read_rows(row, row + head_dim)) * np.sqrt(variance)
        covariances.append(weighted @ weighted.T)
    mean = np.zeros(projection.n_out) if projection.bias is None else _bias(source, projection)
    return Heads(mean.reshape(-1, head_dim), np.stack(covariances))


def _bias(source: Source, projection: Projection) -> np.ndarray:
    """float64 [n_out] of a projection that has one."""
    values = source.tensor(str(projection.bias)).read_finite_f32().astype(np.float64)
    return values[projection.start : projection.start + projection.n_out]


def _normed(source: Source, heads: Heads, norm: Norm | None) -> Heads:
    """Heads after RMSNorm: each divided by the root of its mean square, then channels multiplied by their gains."""
    if norm is None:
        return heads
    gain = source.tensor(norm.gain).read_finite_f32().astype(np.float64)
    square = np.einsum("hcc->h", heads.covariance) + (heads.mean**2).sum(axis=1)
    size = np.sqrt(square / norm.n + norm.epsilon)[:, None]
    return Heads(heads.mean * gain / size, heads.covariance * np.outer(gain, gain) / size[:, :, None] ** 2)


class _Hidden:
    """The variance of every channel of the hidden state, float64 [n_embd], grown a layer at a time."""

    def __init__(self, source: Source):
        self._source = source
        embedding = source.tensor(source.spec.embedding)
        total = np.zeros(embedding.shape[1])
        for rows in _row_chunks(embedding, 0, embedding.shape[0]):
            total = total + (rows.astype(np.float64) ** 2).sum(axis=0)
        self._variance = total / embedding.shape[0]  # every token of the vocabulary alike
        self._variance *= source.spec.embedding_scale**2

    def add(self, block: Block, entering: np.ndarray) -> None:
        """Let the block's attention and MLP add theirs. entering: variances of what its projections get."""
        a, mlp, scale = block.attention, block.mlp, block.residual_scale**2
        values = self._through(a.v, entering)
        if a.v.bias is not None:
            values += _bias(self._source, a.v) ** 2
        per_query_head = values.reshape(a.n_kv_heads, -1).repeat(a.n_heads // a.n_kv_heads, axis=0).reshape(-1)
        self._variance += scale * ATTENTION_SHARE * self._through(a.output, per_query_head)
        normed = self.normalized(block.mlp_norm)
        gate, up = (self._through(part, normed) for part in (mlp.gate, mlp.up))
        self._variance += scale * self._through(mlp.down, _silu_second(gate) * up)

    def normalized(self, norm: Norm) -> np.ndarray:
        """After RMSNorm: the mean square becomes 1, then each channel is multiplied by its gain.

        Raises KsortError where variances overflowed.
        """
        gains = self._source.tensor(norm.gain).read_finite_f32().astype(np.float64)
        mean = self._variance.mean()
        if not np.isfinite(mean):
            raise KsortError(
                f"{self._source.path}: the hidden state before {norm.gain} overflows float32: the weights are damaged, "
                "get the model again"
            )
        return gains**2 * (self._variance / mean if mean > 0 else 1.0)

    def _through(self, projection: Projection, variance: np.ndarray) -> np.ndarray:
        """Variances of a matrix's outputs for uncorrelated inputs of `variance`, infinite where float32 overflows."""
        tensor, start = self._source.tensor(projection.weight), projection.start
        rows = _row_chunks(tensor, start, start + projection.n_out)
        with np.errstate(over="ignore", invalid="ignore"):
            return np.concatenate([(part * part) @ variance.astype(np.float32) for part in rows]).astype(np.float64)


def _silu_second(variance: np.ndarray) -> np.ndarray:
    """E[silu(g)^2] for g ~ N(0, variance), by quadrature over 6 standard deviations."""
    z = np.linspace(-6, 6, 49)
    density = np.exp(-z * z / 2)
    g = np.sqrt(variance)[:, None] * z
    with np.errstate(over="ignore"):  # exp(-g) of a large negative g: silu is 0
        silu = g / (1 + np.exp(-g))
    return silu**2 @ (density / density.sum())


def _row_chunks(tensor: Tensor, start: int, stop: int) -> Iterator[np.ndarray]:
    """Rows start .. stop-1 of a matrix as float32, some at a time. Raises KsortError for NaN and infinity."""
    rows = max(1, _CHUNK_VALUES // tensor.shape[1])
    for first in range(start, stop, rows):
        yield tensor.read_finite_f32(tensor.read_rows(first, min(first + rows, stop)))
