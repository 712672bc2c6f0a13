"""Moments of queries, keys and values from the weights alone: no text, no forward pass.

What a projection gives depends on its input, an RMS-normalized hidden state. Its channels are taken as uncorrelated, of
mean 0, and their variances follow from the weights, layer by layer: the hidden state begins as an embedding, and every
attention and FFN block adds the variance that its output matrix gives to it (a diagonal version of moment propagation).
The assumption of equal variances (RMSNorm's gain alone) costs SmolLM2 a quarter more KL divergence.
"""

from collections.abc import Callable, Iterator

import numpy as np

from ksort_gguf.errors import KsortError
from ksort_gguf.families.rope import RopeTables, cos_sin, frequencies, stock_tables
from ksort_gguf.plan.moments import N_SAMPLES, LayerMoments, OnLayer
from ksort_gguf.sources.base import Source, Tensor

MAX_POSITIONS = 4096  # plans are made for contexts up to this, or the model's own
ATTENTION_SHARE = 0.3  # of the values' variance that is left after attention's averaging over tokens
_N_POSITIONS = 256  # where RoPE is averaged
_CHUNK_VALUES = 4 << 20  # of a tensor expanded at a time


def moments_of_weights(source: Source, on_layer: OnLayer, progress: Callable[[], None]) -> None:
    """Call on_layer(layer, moments) for each layer of a stock model in turn, and `progress` after each.

    Reads every matrix once, some rows at a time. Raises KsortError for missing or non-finite tensors.
    """
    hidden = _HiddenVariance(source)
    rotation = _Rotation(source)
    random = np.random.default_rng(0)  # for samples
    for layer in range(source.geometry.n_layers):
        on_layer(layer, _layer_moments(source, layer, hidden.attention_input(layer), rotation, random))
        hidden.add_layer(layer)
        progress()


class _Rotation:
    """RoPE at sampled_positions."""

    def __init__(self, source: Source):
        g = source.geometry
        self.tables: RopeTables = stock_tables(g.head_dim, g.n_rot, source.family.row_order)
        factors = source.tensors.get("rope_freqs.weight")
        theta = frequencies(g, None if factors is None else factors.read_finite_f32())
        length = min(g.context_length, MAX_POSITIONS)
        cos, sin = (table[sampled_positions(length)].astype(np.float64) for table in cos_sin(theta, length))
        rotated = self.tables.sign != 0
        # y[c] = own[:, c] x[c] + other[:, c] x[partner[c]], float64 [_N_POSITIONS, d]
        self.own = np.where(rotated, cos[:, self.tables.frequency], 1.0)
        self.other = np.where(rotated, sin[:, self.tables.frequency] * self.tables.sign, 0.0)
        self._products = [[a.T @ b / _N_POSITIONS for b in (self.own, self.other)] for a in (self.own, self.other)]

    def mean(self, x: np.ndarray) -> np.ndarray:
        """The mean of rotated x [heads, d] over positions."""
        return x * self.own.mean(axis=0) + x[:, self.tables.partner] * self.other.mean(axis=0)

    def second(self, m: np.ndarray) -> np.ndarray:
        """E[y y^T] over positions of rotated heads with E[x x^T] = m [heads, d, d]."""
        partner = self.tables.partner
        (own_own, own_other), (other_own, other_other) = self._products
        swapped = m[:, partner]
        result = own_own * m + own_other * m[:, :, partner]
        return result + other_own * swapped + other_other * swapped[:, :, partner]

    def turn(self, x: np.ndarray) -> np.ndarray:
        """x [n, heads, d], each of the n at another of the positions."""
        at = np.arange(len(x)) % _N_POSITIONS
        return x * self.own[at, None] + x[..., self.tables.partner] * self.other[at, None]


def sampled_positions(length: int) -> np.ndarray:
    """int [_N_POSITIONS] from 0 to below `length`, with the density position^-3/4.

    That is denser at the beginning than position_weights: plans from weights alone serve short contexts better so.
    """
    quantiles = (np.arange(_N_POSITIONS) + 0.5) / _N_POSITIONS
    return (quantiles**4 * length).astype(np.intp)  # the fourth power has that density


def _layer_moments(
    source: Source, layer: int, variance: np.ndarray, rotation: _Rotation, random: np.random.Generator
) -> LayerMoments:
    """variance: [n_embd], of the projections' input."""
    g = source.geometry

    def projected(part: str, n_heads: int) -> tuple[np.ndarray, np.ndarray]:
        """Mean [n_heads, d] and covariance [n_heads, d, d] of a projection's outputs."""
        bias = source.tensors.get(f"blk.{layer}.{part}.bias")
        mean = np.zeros((n_heads, g.head_dim)) if bias is None else bias.read_finite_f32().astype(np.float64)
        tensor, covariances = source.tensor(f"blk.{layer}.{part}.weight"), []
        for head in range(n_heads):
            raw = tensor.read_rows(head * g.head_dim, (head + 1) * g.head_dim)
            weighted = tensor.read_finite_f32(raw) * np.sqrt(variance)
            covariances.append(weighted @ weighted.T)
        return mean.reshape(n_heads, g.head_dim), np.stack(covariances)

    k_mean, k_covariance = projected("attn_k", g.n_kv_heads)
    q_mean, q_covariance = projected("attn_q", g.n_heads)
    v_mean, v_covariance = projected("attn_v", g.n_kv_heads)
    q_second = rotation.second(q_covariance + _outer(q_mean))
    return LayerMoments(
        k_mean=rotation.mean(k_mean),
        k_second=rotation.second(k_covariance + _outer(k_mean)),
        q_second=q_second.reshape(g.n_kv_heads, -1, g.head_dim, g.head_dim).sum(axis=1),
        v_mean=v_mean,
        v_second=v_covariance + _outer(v_mean),
        keys=rotation.turn(_normal_samples(k_mean, k_covariance, random)).astype(np.float32),
        values=_normal_samples(v_mean, v_covariance, random).astype(np.float32),
    )


def _normal_samples(mean: np.ndarray, covariance: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """[N_SAMPLES, heads, d] of the normal distributions with means [heads, d] and covariances [heads, d, d]."""
    jitter = np.trace(covariance, axis1=1, axis2=2)[:, None, None] * 1e-9 + np.finfo(np.float32).tiny
    root = np.linalg.cholesky(covariance + jitter * np.eye(mean.shape[1]))
    return np.einsum("hcd,nhd->nhc", root, random.standard_normal((N_SAMPLES, *mean.shape))) + mean


def _outer(mean: np.ndarray) -> np.ndarray:
    return mean[:, :, None] * mean[:, None, :]


class _HiddenVariance:
    """The variance of every channel of the hidden state, float64 [n_embd], grown a layer at a time."""

    def __init__(self, source: Source):
        self._source = source
        embedding = source.tensor("token_embd.weight")
        total = sum((rows.astype(np.float64) ** 2).sum(axis=0) for rows in _row_chunks(embedding))
        self._variance = total / embedding.shape[0]  # every token of the vocabulary alike

    def attention_input(self, layer: int) -> np.ndarray:
        """Variances [n_embd] of what the layer's q, k and v projections get."""
        return self._normalized(f"blk.{layer}.attn_norm.weight")

    def add_layer(self, layer: int) -> None:
        """Let the layer's attention and FFN blocks add theirs."""
        g, name = self._source.geometry, f"blk.{layer}." + "{}.weight"
        values = self._through(name.format("attn_v"), self.attention_input(layer))
        bias = self._source.tensors.get(f"blk.{layer}.attn_v.bias")
        if bias is not None:
            values += bias.read_finite_f32().astype(np.float64) ** 2
        per_query_head = values.reshape(g.n_kv_heads, -1).repeat(g.n_heads // g.n_kv_heads, axis=0).reshape(-1)
        self._variance += ATTENTION_SHARE * self._through(name.format("attn_output"), per_query_head)
        entering = self._normalized(name.format("ffn_norm"))
        gate, up = (self._through(name.format(part), entering) for part in ("ffn_gate", "ffn_up"))
        self._variance += self._through(name.format("ffn_down"), _silu_second(gate) * up)

    def _normalized(self, gain: str) -> np.ndarray:
        """After RMSNorm: the mean square becomes 1, then each channel is multiplied by its gain.

        Raises KsortError where variances overflowed.
        """
        gains = self._source.tensor(gain).read_finite_f32().astype(np.float64)
        mean = self._variance.mean()
        if not np.isfinite(mean):
            raise KsortError(
                f"{self._source.path}: the hidden state before {gain} overflows float32: the weights are damaged, "
                "get the model again"
            )
        return gains**2 * (self._variance / mean if mean > 0 else 1.0)

    def _through(self, name: str, variance: np.ndarray) -> np.ndarray:
        """Variances of a matrix's outputs for uncorrelated inputs of `variance`, infinite where float32 overflows."""
        rows = _row_chunks(self._source.tensor(name))
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


def _row_chunks(tensor: Tensor) -> Iterator[np.ndarray]:
    """The matrix as float32, some rows at a time. Raises KsortError for NaN and infinity."""
    rows = max(1, _CHUNK_VALUES // tensor.shape[1])
    for start in range(0, tensor.shape[0], rows):
        yield tensor.read_finite_f32(tensor.read_rows(start, min(start + rows, tensor.shape[0])))
