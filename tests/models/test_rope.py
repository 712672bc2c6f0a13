"""RoPE tables, against the textbook formula."""

import numpy as np
import pytest

from ksort_gguf.models.rope import folded_tables, row_map, stock_tables

SHAPES = [(8, 8), (20, 20), (64, 32), (6, 0)]


def turned(x: np.ndarray, tables, angles: np.ndarray) -> np.ndarray:
    """x [head_dim] turned as the tables say; angles [n_rot / 2]."""
    c, s = np.append(np.cos(angles), 1)[tables.frequency], np.append(np.sin(angles), 0)[tables.frequency]
    return np.where(tables.sign == 0, x, x * c + tables.sign * x[tables.partner] * s)


def textbook(x: np.ndarray, pairs: list[tuple[int, int]], angles: np.ndarray) -> np.ndarray:
    y = x.copy()
    for (a, b), t in zip(pairs, angles, strict=True):
        y[a], y[b] = x[a] * np.cos(t) - x[b] * np.sin(t), x[b] * np.cos(t) + x[a] * np.sin(t)
    return y


@pytest.mark.parametrize("head_dim, n_rot", SHAPES)
@pytest.mark.parametrize("row_order", ["half", "interleaved"])
def test_stock_tables_turn_pairs(rng, head_dim, n_rot, row_order):
    """Would catch wrong partners, signs or frequencies in either row order, and channels turned that should rest."""
    half = n_rot // 2
    pairs = [(f, f + half) if row_order == "half" else (2 * f, 2 * f + 1) for f in range(half)]
    x, angles = rng.standard_normal(head_dim), rng.uniform(-3, 3, half)
    np.testing.assert_allclose(
        turned(x, stock_tables(head_dim, n_rot, row_order), angles), textbook(x, pairs, angles), atol=1e-12
    )


@pytest.mark.parametrize("head_dim, n_rot", SHAPES)
@pytest.mark.parametrize("row_order", ["half", "interleaved"])
def test_reordering_commutes_with_rope(rng, head_dim, n_rot, row_order):
    """Would catch an order used where its inverse is due: turning and reordering must commute."""
    stock = stock_tables(head_dim, n_rot, row_order)
    order = np.stack([rng.permutation(head_dim) for _ in range(3)])
    folded = folded_tables(stock, order)
    x, angles = rng.standard_normal(head_dim), rng.uniform(-3, 3, n_rot // 2)
    for head in range(3):
        tables = type(stock)(folded.partner[head], folded.sign[head], folded.frequency[head])
        np.testing.assert_allclose(
            turned(x[order[head]], tables, angles), turned(x, stock, angles)[order[head]], atol=1e-12
        )


def test_impossible_shapes_are_refused():
    """Would catch tables with half a pair or more pairs than channels."""
    for head_dim, n_rot, row_order in ((8, 5, "half"), (8, 10, "half"), (8, 8, "neox")):
        with pytest.raises(ValueError):
            stock_tables(head_dim, n_rot, row_order)


@pytest.mark.parametrize("n_rot", [32, 16])
def test_row_map_keeps_each_channels_part_in_rope(n_rot: int):
    """Catches a permutation that pairs channels of different frequencies, or swaps the sides of pairs."""
    half, interleaved = (stock_tables(32, n_rot, order) for order in ("half", "interleaved"))
    head_map = row_map(32, n_rot, "half", "interleaved")
    assert np.array_equal(half.sign[head_map], interleaved.sign)
    assert np.array_equal(half.frequency[head_map], interleaved.frequency)
    assert np.array_equal(head_map[row_map(32, n_rot, "interleaved", "half")], np.arange(32))
