"""Moments of queries, keys and values from the weights alone: no text, no forward pass.

What models/run_variance.py says of a layer's heads, turned by RoPE and averaged over positions.
"""

from collections.abc import Callable

import numpy as np

from ksort_gguf.cache.rope_table import cos_sin
from ksort_gguf.models.rope import frequencies, stock_tables
from ksort_gguf.models.run_variance import Heads, ProjectedHeads, projected_heads
from ksort_gguf.models.source import Source
from ksort_gguf.models.spec import Attention
from ksort_gguf.plan.moments import MAX_POSITIONS, N_SAMPLES, LayerMoments, OnLayer

_N_POSITIONS = 256  # where RoPE is averaged


def moments_of_weights(source: Source, on_layer: OnLayer, progress: Callable[[], object]) -> None:
    """Call on_layer(layer, moments) for each layer of a stock model in turn, and `progress` after each.

    Raises KsortError as projected_heads does.
    """
    rotations: dict[object, _Rotation] = {}
    random = np.random.default_rng(0)  # for samples
    for layer, (a, heads) in enumerate(zip(source.spec.attentions, projected_heads(source), strict=True)):
        if a.rope not in rotations:
            rotations[a.rope] = _Rotation(source, a)
        on_layer(layer, _layer_moments(a, heads, rotations[a.rope], random))
        progress()


class _Rotation:
    """RoPE at sampled_positions."""

    def __init__(self, source: Source, attention: Attention):
        rope, length = attention.rope, min(source.spec.context_length, MAX_POSITIONS)
        n_rot = 0 if rope is None else rope.n_rot
        tables = stock_tables(attention.head_dim, n_rot, source.spec.row_order)
        self._partner, rotated = tables.partner, tables.sign != 0
        if rope is None:
            cos = sin = np.zeros((_N_POSITIONS, 1))
        else:
            theta = frequencies(rope, source.rope_factors(rope, length))
            positions = sampled_positions(length)
            cos, sin = (table[positions].astype(np.float64) for table in cos_sin(theta, length, rope.magnitude))
        # y[c] = own[:, c] x[c] + other[:, c] x[partner[c]], float64 [_N_POSITIONS, d]
        self.own = np.where(rotated, cos[:, tables.frequency], 1.0)
        self.other = np.where(rotated, sin[:, tables.frequency] * tables.sign, 0.0)
        self._products = [[a.T @ b / _N_POSITIONS for b in (self.own, self.other)] for a in (self.own, self.other)]

    def mean(self, x: np.ndarray) -> np.ndarray:
        """The mean of rotated x [heads, d] over positions."""
        return x * self.own.mean(axis=0) + x[:, self._partner] * self.other.mean(axis=0)

    def second(self, m: np.ndarray) -> np.ndarray:
        """E[y y^T] over positions of rotated heads with E[x x^T] = m [heads, d, d]."""
        partner = self._partner
        (own_own, own_other), (other_own, other_other) = self._products
        swapped = m[:, partner]
        result = own_own * m + own_other * m[:, :, partner]
        return result + other_own * swapped + other_other * swapped[:, :, partner]

    def turn(self, x: np.ndarray) -> np.ndarray:
        """x [n, heads, d], each of the n at another of the positions."""
        at = np.arange(len(x)) % _N_POSITIONS
        return x * self.own[at, None] + x[..., self._partner] * self.other[at, None]


def sampled_positions(length: int) -> np.ndarray:
    """int [_N_POSITIONS] from 0 to below `length`, with the density position^-3/4.

    That is denser at the beginning than position_weights: plans from weights alone serve short contexts better so.
    """
    quantiles = (np.arange(_N_POSITIONS) + 0.5) / _N_POSITIONS
    return (quantiles**4 * length).astype(np.intp)  # the fourth power has that density


def _layer_moments(
    attention: Attention, heads: ProjectedHeads, rotation: _Rotation, random: np.random.Generator
) -> LayerMoments:
    q, k, v = heads.q, heads.k, heads.v
    q_second, d = rotation.second(q.covariance + _outer(q.mean)), attention.head_dim
    return LayerMoments(
        k_mean=rotation.mean(k.mean),
        k_second=rotation.second(k.covariance + _outer(k.mean)),
        q_second=q_second.reshape(attention.n_kv_heads, -1, d, d).sum(axis=1),
        v_mean=v.mean,
        v_second=v.covariance + _outer(v.mean),
        keys=rotation.turn(_normal_samples(k, random)).astype(np.float32),
        values=_normal_samples(v, random).astype(np.float32),
    )


def _normal_samples(heads: Heads, random: np.random.Generator) -> np.ndarray:
    """[N_SAMPLES, heads, d] of the normal distributions with these means and covariances."""
    mean, covariance = heads.mean, heads.covariance
    jitter = np.trace(covariance, axis1=1, axis2=2)[:, None, None] * 1e-9 + np.finfo(np.float32).tiny
    root = np.linalg.cholesky(covariance + jitter * np.eye(mean.shape[1]))
    return np.einsum("hcd,nhd->nhc", root, random.standard_normal((N_SAMPLES, *mean.shape))) + mean


def _outer(mean: np.ndarray) -> np.ndarray:
    return mean[:, :, None] * mean[:, None, :]
