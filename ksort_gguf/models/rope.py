"""Which channels of a head RoPE turns together, in a stock row order and after a plan's reordering.

Two row orders exist in stock GGUF files. With n_rot rotated channels, pair f (frequency index f) is
    "half":         channels f and f + n_rot/2   (NEOX; Hugging Face, and llama.cpp for Qwen2)
    "interleaved":  channels 2f and 2f + 1       (llama.cpp for Llama)
Channels from n_rot on are not rotated. The first channel of a pair becomes x0 cos - x1 sin, the second x1 cos + x0 sin
(RoFormer, arXiv 2104.09864, eq. 34).
"""

import numpy as np

from ksort_gguf.kvplan import KVPlan, RopeTables
from ksort_gguf.models.spec import Attention, Rope

ROW_ORDERS = ("half", "interleaved")
HF_ROW_ORDER = "half"  # of q and k rows in all Hugging Face checkpoints


def stock_tables(head_dim: int, n_rot: int, row_order: str) -> RopeTables:
    """RoPE tables [head_dim] of a stock file. Raises ValueError for an unknown row order or an impossible n_rot."""
    if row_order not in ROW_ORDERS:
        raise ValueError(f"unknown row order {row_order!r}")
    if n_rot % 2 or not 0 <= n_rot <= head_dim:
        raise ValueError(f"{n_rot} rotated channels do not fit a head of {head_dim}")
    channel = np.arange(head_dim)
    half = n_rot // 2
    if row_order == "half":
        second = channel >= half
        partner = np.where(second, channel - half, channel + half)
        frequency = np.where(second, channel - half, channel)
    else:
        second = channel % 2 == 1
        partner = channel ^ 1
        frequency = channel // 2
    rotated = channel < n_rot
    return RopeTables(
        np.where(rotated, partner, channel).astype(np.uint16),
        np.where(rotated, np.where(second, 1, -1), 0).astype(np.int8),
        np.where(rotated, frequency, 0).astype(np.uint16),
    )


def frequencies(rope: Rope, factors: np.ndarray | None) -> np.ndarray:
    """float64 [n_rot / 2]: the angle, in radians, by which each pair turns from one position to the next.

    theta_f = base^(-2f / n_rot) (RoFormer, section 3.2.2); `factors` [n_rot / 2] and linear scaling divide it.
    """
    pair = np.arange(0, rope.n_rot, 2, dtype=np.float64)
    theta = rope.base ** (-pair / rope.n_rot)
    if factors is not None:
        theta /= factors.astype(np.float64)
    if rope.linear_factor != 1:
        theta /= rope.linear_factor
    return theta


def row_map(head_dim: int, n_rot: int, source: str, target: str) -> np.ndarray:
    """int [head_dim]: place i of a head in row order `target` holds the channel of `source` with the same part in RoPE,
    that is the same frequency and the same side of its pair. Raises ValueError as stock_tables does."""
    place_of_role = np.argsort(_roles(head_dim, n_rot, source))
    return place_of_role[_roles(head_dim, n_rot, target)]


def _roles(head_dim: int, n_rot: int, row_order: str) -> np.ndarray:
    """int [head_dim]: a number for each channel's part in RoPE, the same in every row order."""
    tables = stock_tables(head_dim, n_rot, row_order)
    second = tables.sign > 0
    return np.where(tables.sign == 0, np.arange(head_dim), 2 * tables.frequency.astype(np.intp) + second)


def folded_tables(stock: RopeTables, order: np.ndarray) -> RopeTables:
    """Tables after reordering: `order` [n_kv_heads, head_dim] says which stock channel stands at each place.

    The partner of place i is the place where the stock partner of order[i] went, so it is looked up in order's inverse.
    """
    place_of = np.argsort(order, axis=-1)
    partner = np.take_along_axis(place_of, stock.partner[order].astype(np.intp), axis=-1)
    return RopeTables(partner.astype(np.uint16), stock.sign[order], stock.frequency[order])


def layer_tables(attention: Attention, row_order: str, plan: KVPlan | None, layer: int) -> RopeTables:
    """RoPE tables [n_kv_heads, head_dim] of a layer: stock, or in the plan's order; without RoPE all signs are 0."""
    a = attention
    stock = stock_tables(a.head_dim, 0 if a.rope is None else a.rope.n_rot, row_order)
    order = np.tile(np.arange(a.head_dim), (a.n_kv_heads, 1))
    if plan is not None and plan.order is not None:
        order = plan.order[layer]
    return folded_tables(stock, order)
