"""CpuAttention: layers with their own heads, RoPE, rope table and window, over one cache, in steps of any length."""

import numpy as np
import pytest

from ksort_gguf import reference
from ksort_gguf.binding.rows import FloatRows
from ksort_gguf.binding.run import Pool
from ksort_gguf.cache.cpu import CpuAttention, CpuCache
from ksort_gguf.cache.protocol import CacheOptions, HeadShape, LayerPlan
from ksort_gguf.cache.rope_table import RopeTable, cos_sin
from ksort_gguf.errors import KsortError
from ksort_gguf.kvplan import RopeTables
from ksort_gguf.models.rope import stock_tables

FLOAT = CacheOptions("f32", "f32", 32, "f32")
NEAR, FAR = 10000.0 ** (-np.arange(32) / 32), 1e6 ** (-np.arange(16) / 16)
HEADS = (HeadShape(6, 2, 64, 0.125, 0), HeadShape(4, 4, 32, 0.2, 9), HeadShape(6, 2, 64, 0.125, 0))


def rope_of(heads: HeadShape, n_rot: int) -> RopeTables:
    stock = stock_tables(heads.head_dim, n_rot, "half")
    return RopeTables(*(np.tile(table, (heads.n_kv_heads, 1)) for table in vars(stock).values()))


def layers() -> list[LayerPlan]:
    """Two layers that share a rope table between them, and one with another, of other heads and with a window; the last
    does not turn."""
    near = RopeTable(NEAR)
    tables = (near, RopeTable(FAR, 1.2), near)
    n_rots = (64, 32, 0)
    return [
        LayerPlan(heads, rope_of(heads, n_rot), table)
        for heads, n_rot, table in zip(HEADS, n_rots, tables, strict=True)
    ]


def expected(plan: LayerPlan, qkv: np.ndarray) -> np.ndarray:
    """float64 [n, n_heads * head_dim] of a whole text's rows."""
    h, n = plan.heads, len(qkv)
    q, k, v = np.split(qkv.reshape(n, -1, h.head_dim), [h.n_heads, h.n_heads + h.n_kv_heads], axis=1)
    theta, magnitude = (FAR, 1.2) if h.head_dim == 32 else (NEAR, 1.0)
    tables = list(vars(plan.rope).values())
    of_queries = [np.repeat(table, h.n_heads // h.n_kv_heads, axis=0) for table in tables]
    positions = cos_sin(theta, n, magnitude)
    q, k = reference.rope(q, *of_queries, *positions), reference.rope(k, *tables, *positions)
    return reference.attend(k, v, q, 0, h.scale, h.window).reshape(n, -1)


@pytest.mark.parametrize("steps", [(40,), (1,) * 40, (1, 20, 3, 16)], ids=["prompt", "decode", "mixed"])
def test_layers_are_the_references(rng, steps):
    """Catches a layer that turns by another layer's rope table, positions that begin anew with a step, a window or a
    scale of another layer."""
    plans = layers()
    cache = CpuCache(HEADS, FLOAT, 600)
    rows = [rng.standard_normal((40, heads.qkv_width)).astype(np.float32) for heads in HEADS]
    outs = [np.empty((40, heads.n_heads * heads.head_dim), np.float32) for heads in HEADS]
    with Pool(2) as pool:
        attention = CpuAttention(pool, cache, plans)
        first = 0
        for n in steps:
            attention.begin(n, first + n)
            for layer in (2, 0, 1):  # in any order
                qkv, out = (FloatRows(x[layer][first : first + n]) for x in (rows, outs))
                attention.run(layer, qkv, out)
            first += n
    for plan, qkv, out in zip(plans, rows, outs, strict=True):
        np.testing.assert_allclose(out, expected(plan, qkv), atol=2e-5)


def test_a_step_again_overwrites(rng):
    """Catches slots that keep what was in them: after truncate the same slots hold other tokens."""
    heads, plan = HEADS[0], layers()[0]
    qkv = rng.standard_normal((30, heads.qkv_width)).astype(np.float32)
    out = np.empty((30, heads.n_heads * heads.head_dim), np.float32)
    with Pool(1) as pool:
        attention = CpuAttention(pool, CpuCache([heads], FLOAT, 64), [plan])
        attention.begin(30, 30)
        attention.run(0, FloatRows(np.flip(qkv).copy()), FloatRows(out))
        attention.begin(20, 30)  # behind 10 tokens that stay
        fresh = np.concatenate([np.flip(qkv)[:10], qkv[10:]])
        attention.run(0, FloatRows(fresh[10:]), FloatRows(out[10:]))
    np.testing.assert_allclose(out[10:], expected(plan, fresh)[10:], atol=2e-5)


def test_errors_name_the_layer(rng):
    """Catches an error of layer 1 that names layer 0, or none."""
    plans, cache = layers(), CpuCache(HEADS, FLOAT, 64)
    qkv = rng.standard_normal((2, HEADS[1].qkv_width)).astype(np.float32)
    qkv[1, -1] = np.nan
    with Pool(1) as pool:
        attention = CpuAttention(pool, cache, plans)
        attention.begin(2, 2)
        out = FloatRows(np.empty((2, HEADS[1].n_heads * HEADS[1].head_dim), np.float32))
        with pytest.raises(KsortError, match=r"\(layer 1\)"):
            attention.run(1, FloatRows(qkv), out)


def test_layers_of_different_heads_have_their_own_sizes():
    """Catches a cache sized by its first layer."""
    cache = CpuCache(HEADS, CacheOptions("bfp12", "f16", 32, "bfp16"), 64)
    cache.n_tokens = 1
    assert cache.k_bytes() == sum(h.n_kv_heads * 64 * h.head_dim * 4.25 / 8 for h in HEADS)
    assert cache.v_bytes() == sum(h.n_kv_heads * 64 * h.head_dim * 2 for h in HEADS)
    assert [k.heads for k in cache.k] == [(h.n_kv_heads, h.head_dim) for h in HEADS]
