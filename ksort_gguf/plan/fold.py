"""Folding: the rows of q and k projections in the order of a plan."""

import numpy as np


def fold_rows(raw: np.ndarray, shape: tuple[int, ...], order: np.ndarray, n_heads: int) -> np.ndarray:
    """Permute the rows of one projection; rows move as bytes and are never re-quantized.

    raw: uint8, the encoded tensor, row after row.
    shape: numpy order, [n_heads * head_dim, n_inputs] for a weight or [n_heads * head_dim] for a bias.
    order: int [n_kv_heads, head_dim]; place i of KV head h takes stock row order[h, i].
    n_heads: heads of this tensor: n_kv_heads for k, n_heads for q, whose heads of a group share their KV head's order.
    Returns uint8 of the same size.
    """
    n_kv_heads, head_dim = order.shape
    if shape[0] != n_heads * head_dim or n_heads % n_kv_heads:
        raise ValueError(f"{shape[0]} rows are not {n_heads} heads of {head_dim}, {n_kv_heads} orders")
    head_order = np.repeat(order, n_heads // n_kv_heads, axis=0)
    rows = raw.reshape(n_heads, head_dim, -1)
    return np.take_along_axis(rows, head_order[:, :, None], axis=1).reshape(-1)


def inverse_order(order: np.ndarray) -> np.ndarray:
    """The order that undoes `order` [..., head_dim]: at stock channel c, the place where it went."""
    return np.argsort(order, axis=-1)
