"""First and second moments of a layer's queries, keys and values: all that a plan is made from.

Two sources give the same thing, a layer at a time: text that runs through the model (text_moments.py), or the weights
alone (weight_moments.py).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

N_SAMPLES = 256  # keys and values of a layer that encoders are tried on
MAX_POSITIONS = 4096  # plans are made for contexts up to this, or the model's own


@dataclass(frozen=True)
class LayerMoments:
    """Weighted means over tokens, float64, channels in stock row order; queries and keys after RoPE.

    k_mean, v_mean: [n_kv_heads, d]. k_second, v_second: E[x x^T], [n_kv_heads, d, d]. q_second: E[q q^T] summed over
    the query heads that read the KV head. keys, values: samples, float32 [N_SAMPLES or fewer, n_kv_heads, d].
    """

    k_mean: np.ndarray
    k_second: np.ndarray
    q_second: np.ndarray
    v_mean: np.ndarray
    v_second: np.ndarray
    keys: np.ndarray
    values: np.ndarray

    def is_finite(self) -> bool:
        """Whether nothing overflowed."""
        return all(np.isfinite(values).all() for values in vars(self).values())


OnLayer = Callable[[int, LayerMoments], None]
