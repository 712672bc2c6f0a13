"""ksort_attend over BFP values: every shape, number of rows and stored byte, at every kernel level."""

import numpy as np
import pytest
from native_support import (
    BFP_SHAPES,
    BFP_TYPES,
    FLOAT_TYPES,
    SCALE_BYTES,
    Shape,
    assert_close,
    drawn,
    new_cache,
    random_problem,
    token_of_byte,
)

from ksort_gguf.binding import cpu
from ksort_gguf.reference_blocks import SCALED_TYPES

SCALE = 0.2


def any_heads(rng, n_tokens: int, n_heads: int, head_dim: int) -> np.ndarray:
    """Normally distributed float32 [n_tokens, n_heads, head_dim]."""
    return rng.standard_normal((n_tokens, n_heads, head_dim)).astype(np.float32)


def packed(x: np.ndarray, type_name: str = "f32") -> cpu.PackedHeads:
    """A cache of x [n_tokens, 1, head_dim]."""
    cache, _ = new_cache(type_name, x.shape[2], 32, 1, len(x))
    cache.pack(x, 0)
    return cache


SPANS = [(0, 1, 0), (77, 1, 20), (130, 9, 70), (40, 25, 0)]  # first slot, queries, window


@drawn(36, v_shape=BFP_SHAPES, v_type=BFP_TYPES, span=SPANS)
def test_shapes(level, rng, v_shape, v_type, span):
    """Catches a block, column or tail channel weighed by another's exponent, and spans that begin or end in a strip."""
    (head_dim, v_block_size), (first_slot, n_queries, window) = v_shape, span
    shape = Shape(head_dim, 16, 4, 2, first_slot, n_queries, window, head_dim, v_type, 2, v_block_size)
    k_cache, v_cache, q, rope, used = random_problem(rng, shape, "bfp14", "bfp16")
    out = cpu.attend(k_cache, v_cache, q, first_slot, scale=SCALE, window=window, nth=2, **rope)
    assert_close(out, *used, first_slot, SCALE, window, v_type)


@drawn(24, n_heads=range(1, 13), v_type=BFP_TYPES)
def test_numbers_of_rows(level, rng, n_heads, v_type):
    """Catches rows left over after whole groups of rows: one query of n_heads heads on one KV head is n_heads rows."""
    shape = Shape(80, 32, n_heads, 1, 100, 1, 0, 80, v_type, 1, v_block_size=16)
    k_cache, v_cache, q, rope, used = random_problem(rng, shape, "f32", "f32")
    out = cpu.attend(k_cache, v_cache, q, 100, scale=SCALE, query_type="f32", **rope)
    assert_close(out, *used, 100, SCALE, 0, v_type)


@pytest.mark.parametrize("v_type", BFP_TYPES)
@pytest.mark.parametrize("n_queries", [1, 19])
def test_any_stored_bytes(level, rng, v_type, n_queries):
    """Catches kernels that only read our encoder's bytes: mantissa -2^(m-1), E = 0 or padding with mantissas set."""
    head_dim, block_size, n_slots = 90, 32, 128
    v_cache, tiles = new_cache(v_type, head_dim, block_size, 1, n_slots)
    tiles[:] = rng.integers(0, 256, tiles.shape)
    tiles[..., -64 * 3 :] = rng.choice(SCALE_BYTES[v_type], (2, 1, 64 * 3))
    k, q = any_heads(rng, n_slots, 1, head_dim), any_heads(rng, n_queries, 2, head_dim)
    first_slot = n_slots - n_queries
    out = cpu.attend(packed(k), v_cache, q, first_slot, scale=SCALE, query_type="f32", nth=2)
    assert_close(out, k, v_cache.unpack(0, n_slots), q, first_slot, SCALE, 0, v_type)


@drawn(8, v_type=BFP_TYPES + FLOAT_TYPES, n_queries=[1, 6])
def test_unseen_bytes_do_not_matter(level, rng, v_type, n_queries):
    """Catches 0 * infinity: bytes before the window and after the last slot, in tiles that are read, are all ones."""
    head_dim, block_size, n_slots, first_slot, window = 80, 32, 192, 150, 60
    k_cache = packed(any_heads(rng, n_slots, 1, head_dim), "bfp12")
    v_cache, tiles = new_cache(v_type, head_dim, block_size, 1, n_slots)
    v_cache.pack(any_heads(rng, n_slots, 1, head_dim), 0)
    q = any_heads(rng, n_queries, 4, head_dim)
    before = cpu.attend(k_cache, v_cache, q, first_slot, scale=SCALE, window=window)
    slot_of_byte = token_of_byte(v_type, head_dim, block_size) + 64 * np.arange(len(tiles))[:, None]
    unseen = (slot_of_byte < first_slot + 1 - window) | (slot_of_byte >= first_slot + n_queries)
    tiles[:, 0][unseen] = 0xFF
    assert cpu.attend(k_cache, v_cache, q, first_slot, scale=SCALE, window=window).tobytes() == before.tobytes()


@pytest.mark.parametrize(
    ("v_type", "power"),
    [(name, power) for name in BFP_TYPES for power in ((-14, 13) if name in SCALED_TYPES else (-110, 110))],
)
def test_extreme_values(level, rng, v_type, power):
    """Catches an exponent that over- or underflows before it meets its mantissas."""
    head_dim, n_slots, n_queries = 64, 70, 2
    k, q = any_heads(rng, n_slots, 1, head_dim), any_heads(rng, n_queries, 3, head_dim)
    v_cache = packed(np.ldexp(k, power), v_type)
    out = cpu.attend(packed(k), v_cache, q, n_slots - n_queries, scale=SCALE, query_type="f32")
    assert_close(out, k, v_cache.unpack(0, n_slots), q, n_slots - n_queries, SCALE, 0, v_type)
