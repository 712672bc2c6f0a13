"""The rope table: cos and sin by position, extended as positions come."""

import numpy as np
import pytest

from ksort_gguf.cache.rope_table import RopeTable, cos_sin

THETA = 10000.0 ** (-np.arange(16) / 16)


def test_angles_are_exact_at_long_context():
    """Catches angles in float32: at position 131071 they are off by up to 2^-8 radians."""
    cos, sin = cos_sin(THETA, 131072, magnitude=1.5)
    position, c = 131071, 3
    angle = np.longdouble(THETA[c]) * position
    assert cos[position, c] == pytest.approx(float(1.5 * np.cos(angle)), abs=2e-7)
    assert sin[position, c] == pytest.approx(float(1.5 * np.sin(angle)), abs=2e-7)


def test_rows_do_not_depend_on_growth():
    """Catches a table that begins anew at position 0 where it grows, or rows of another position behind the old end."""
    table, whole = RopeTable(THETA, 0.7), cos_sin(THETA, 5000, 0.7)
    for first, n in ((0, 1), (1, 1), (511, 2), (600, 1000), (0, 3), (4999, 1)):
        for rows, expected in zip(table.rows(first, n), whole, strict=True):
            assert (rows.n_rows, rows.width) == (n, 16)
            assert (rows.numpy() == expected[first : first + n]).all(), (first, n)


def test_rows_given_stay_as_they_are():
    """Catches rows that a step still uses and that another context's growth moves, frees or overwrites."""
    table = RopeTable(THETA)
    cos, _ = table.rows(3, 2)
    before = cos.numpy().copy()
    table.rows(20000, 1)
    assert (cos.numpy() == before).all()


def test_growth_is_by_doubling():
    """Catches a table that is computed anew for every token of a long text."""
    table, computed = RopeTable(THETA), []
    grow = table._extend
    table._extend = lambda n_positions: (computed.append(n_positions), grow(n_positions))[1]
    for position in range(3000):
        table.rows(position, 1)
    assert len(computed) <= 4


def test_arrays_and_no_frequencies():
    """Catches a layer without RoPE whose table has no column, which the library refuses."""
    cos, sin = RopeTable(np.zeros(0)).arrays(7)
    assert cos.shape == sin.shape == (7, 1)
    assert (cos == 1).all() and (sin == 0).all()
    table = RopeTable(THETA)
    assert table.arrays(9)[0].shape == (9, 16) and table.arrays(2)[1].shape == (2, 16)
