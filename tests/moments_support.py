"""Moments of samples, for tests of what is made from moments."""

import numpy as np

from ksort_gguf.plan.moments import LayerMoments


def samples(rng, n: int, n_heads: int, head_dim: int) -> np.ndarray:
    """float32 [n, n_heads, head_dim]: correlated channels of sizes from 1/8 to 8, away from 0."""
    mix = rng.standard_normal((n_heads, head_dim, head_dim)) / np.sqrt(head_dim) + np.eye(head_dim)
    sizes = 2.0 ** rng.uniform(-3, 3, (n_heads, head_dim))
    x = np.einsum("hcd,nhd->nhc", mix, rng.standard_normal((n, n_heads, head_dim))) * sizes
    return (x + 2 * sizes * rng.standard_normal((n_heads, head_dim))).astype(np.float32)


def moments_of(k: np.ndarray, q: np.ndarray, v: np.ndarray | None = None) -> LayerMoments:
    """The moments of k, v (default: k) [n, n_kv_heads, d] and q [n, n_heads, d], every token alike and a sample."""
    v = k if v is None else v
    grouped = q.reshape(len(q), k.shape[1], -1, k.shape[2]).astype(np.float64)
    return LayerMoments(
        k_mean=k.mean(axis=0, dtype=np.float64),
        k_second=second(k),
        q_second=np.einsum("nhgc,nhgd->hcd", grouped, grouped) / len(q),
        v_mean=v.mean(axis=0, dtype=np.float64),
        v_second=second(v),
        keys=k,
        values=v,
    )


def second(x: np.ndarray) -> np.ndarray:
    """E[x x^T] over x [n, heads, d]: float64 [heads, d, d]."""
    heads = np.ascontiguousarray(x.transpose(1, 0, 2), np.float64)
    return heads.swapaxes(1, 2) @ heads / len(x)
