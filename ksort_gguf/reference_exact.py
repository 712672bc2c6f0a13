"""Attention over a packed cache with exact rows beside it, in slow NumPy: FORMAT.md, 'Exact rows'. The oracle."""

from typing import NamedTuple

import numpy as np


class ExactRows(NamedTuple):
    """Exact rows of keys or values (None: packed ones are read in their place), and which slots are read from them."""

    keys: np.ndarray | None  # [T, n_kv_heads, d]: after RoPE and transform, rounded to f16
    values: np.ndarray | None
    queries: np.ndarray  # [n_queries, n_heads, d]: after RoPE and the keys' transform, not rounded
    n_tail: int
    n_sinks: int
    begin: int = 0  # the first slot, sinks aside, that is kept


def exact_slots(end: int, n_tail: int, n_sinks: int, begin: int) -> np.ndarray:
    """Which of the slots before `end` a query in slot end - 1 reads as exact: bool [end]."""
    slots = np.arange(end)
    return (slots < n_sinks) | (slots >= max(end - n_tail, begin))


def attend(
    k: np.ndarray, v: np.ndarray, q: np.ndarray, first_slot: int, scale: float, window: int, exact: ExactRows
) -> np.ndarray:
    """As reference.attend over the packed k, v and the rounded q, or the exact ones where they are read."""
    n_queries, n_heads, _ = q.shape
    group = n_heads // k.shape[1]
    out = np.empty(q.shape)
    for i in range(n_queries):
        end = first_slot + i + 1
        start = max(0, end - window) if window else 0
        is_exact = exact_slots(end, exact.n_tail, exact.n_sinks, exact.begin)[start:]
        for g in range(n_heads):
            scores, values = (np.asarray(x[start:end, g // group], np.float64) for x in (k, v))
            scores = scale * (scores @ q[i, g].astype(np.float64))
            if exact.keys is not None:
                of_exact = exact.keys[start:end, g // group].astype(np.float64) @ exact.queries[i, g]
                scores = np.where(is_exact, scale * of_exact, scores)
            if exact.values is not None:
                values = np.where(is_exact[:, None], exact.values[start:end, g // group], values)
            weights = np.exp(scores - scores.max())
            out[i, g] = weights / weights.sum() @ values
    return out
