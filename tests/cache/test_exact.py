"""Exact rows in caches: which types have them, how they are counted and cut, and attention over them."""

import numpy as np
import pytest
from tiny_support import write_tiny_gguf

from ksort_gguf import CacheTypeError, KsortError, PackedCache, load, make_plan, reference
from ksort_gguf.binding.rows import FloatRows
from ksort_gguf.binding.run import Pool
from ksort_gguf.cache.cpu import CpuAttention, CpuCache
from ksort_gguf.cache.exact import begin_after, exact_rows, ring_tiles, steps
from ksort_gguf.cache.protocol import CacheOptions, HeadShape, LayerPlan
from ksort_gguf.cache.rope_table import RopeTable
from ksort_gguf.engine.load import load_model
from ksort_gguf.kvplan import RopeTables
from ksort_gguf.reference_exact import ExactRows, attend

HEADS = HeadShape(n_heads=4, n_kv_heads=2, head_dim=32, scale=0.2, window=0)


@pytest.mark.parametrize(
    ("types", "asked", "found"),
    [
        (("bfp12", "f16"), (None, None), (128, 4, False)),
        (("f16", "bfp12"), (None, None), (128, 4, False)),
        (("bfp12", "bfp16"), (None, None), (128, 4, False)),
        (("bfp14", "bfp16"), (None, None), (0, 0, False)),
        (("f16", "f32"), (None, None), (0, 0, False)),
        (("f16", "f32"), (0, 0), (0, 0, False)),
        (("bfp12", "bfp12"), (0, None), (0, 4, False)),
        (("bfp12", "bfp16"), (64, None), (64, 4, True)),
        (("bfp16", "f16"), (None, 2), (0, 2, True)),
    ],
)
def test_defaults(types, asked, found):
    """Catches a 4-bit type without exact rows, another with some unasked for, and 0 taken for nothing said."""
    assert exact_rows(*types, *asked) == found


def test_which_side_has_them():
    """Catches values of 8 bits that get what is the default of 4-bit keys, or don't get what is asked for."""
    for asked, everywhere in (((None, None), False), ((64, None), True)):
        options = CacheOptions("bfp12", "bfp16", 32, "bfp16", *exact_rows("bfp12", "bfp16", *asked))
        assert (options.has_exact("bfp12"), options.has_exact("bfp16")) == (True, everywhere)
        assert not options.has_exact("f16")
        cache = CpuCache([HEADS], options, 1000)
        assert (cache.k[0].exact is not None, cache.v[0].exact is not None) == (True, everywhere)


@pytest.mark.parametrize(
    ("k_type", "tail", "sinks", "field"),
    [
        ("bfp12", -1, None, "cache_exact_tail"),
        ("bfp12", None, -1, "cache_exact_sinks"),
        ("bfp12", (1 << 20) + 1, None, "cache_exact_tail"),
        ("bfp12", None, 65, "cache_exact_sinks"),
        ("f16", 1, None, "cache_exact_tail"),
        ("f16", None, 1, "cache_exact_sinks"),
    ],
)
def test_what_is_refused(tmp_path, k_type, tail, sinks, field):
    """Catches numbers that no ring can hold, and a number asked for that nothing comes of."""
    with pytest.raises(CacheTypeError, match=f"`{field}`") as caught:
        exact_rows(k_type, "f16", tail, sinks)
    assert caught.value.field == field
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(KsortError, match=f"`{field}`"):
        load(path, cache_type_k=k_type, cache_exact_tail=tail, cache_exact_sinks=sinks)


def test_a_gpu_has_none(tmp_path):
    """Catches exact rows asked for on a GPU that are left out without a word, and a default that is refused there."""
    cuda = pytest.importorskip("ksort_gguf.cache.cuda")
    with pytest.raises(CacheTypeError, match="`cache_exact_tail` 9"):
        cuda.check_options(CacheOptions("bfp12", "bfp12", 32, "bfp16", 9), 64)
    loaded = load_model(write_tiny_gguf(tmp_path / "tiny.gguf"), n_threads=1)
    assert loaded.cache_options("bfp12", "f16").exact_tail == 128
    type(loaded.backend).has_exact_rows = False
    try:
        assert loaded.cache_options("bfp12", "f16").exact_tail == 0
        assert loaded.cache_options("bfp12", "f16", exact_tail=9).exact_tail == 9  # for the cache to refuse
    finally:
        type(loaded.backend).has_exact_rows = True


def test_rings_hold_what_steps_need():
    """Catches a ring that is a row short, or larger than its context."""
    assert [ring_tiles(n, 10**6) for n in (0, 1, 2, 65, 128, 129)] == [0, 1, 2, 2, 3, 3]
    assert ring_tiles(128, 64) == 1 and ring_tiles(10**6, 130) == 3
    assert begin_after(0, 0, 100, 2) == 0 and begin_after(0, 100, 100, 2) == 72
    assert begin_after(72, 20, 10, 2) == 20 and begin_after(72, 80, 1, 2) == 72
    assert steps(100, 130, 5, 3) == [(0, 64, 5), (64, 128, 36), (128, 130, 38)]


def test_bytes_count_them():
    """Catches exact rows that the run reports nothing of, or a whole ring before it is used."""
    n_values = HEADS.n_kv_heads * HEADS.head_dim * 64  # of a tile
    cache = CpuCache([HEADS] * 3, CacheOptions("bfp12", "bfp12", 32, "bfp16", 128, 4), 4096)
    for n_tokens, n_tiles, n_exact in ((0, 0, 0), (1, 1, 2), (65, 2, 3), (4096, 64, 4)):
        cache.n_tokens = n_tokens
        assert cache.k_bytes() == cache.v_bytes() == 3 * n_values * (n_tiles * 4.25 / 8 + n_exact * 2)
    sinks = CpuCache([HEADS], CacheOptions("bfp12", "f16", 32, "bfp16", 0, 4), 4096)
    sinks.n_tokens = 4096
    assert sinks.k_bytes() == n_values * (64 * 4.25 / 8 + 2) and sinks.v_bytes() == n_values * 64 * 2


def rows_of(rng, n: int) -> np.ndarray:
    return rng.standard_normal((n, HEADS.qkv_width)).astype(np.float32)


def attended(qkv: np.ndarray, options: CacheOptions, *step_sizes: int) -> np.ndarray:
    """float32 of all tokens, without RoPE, fed in these steps."""
    out = np.full((len(qkv), HEADS.n_heads * HEADS.head_dim), np.nan, np.float32)
    none = np.zeros((HEADS.n_kv_heads, HEADS.head_dim), np.int64)
    plan = LayerPlan(HEADS, RopeTables(none, none, none), RopeTable(np.zeros(1)))
    with Pool(2) as pool:
        attention = CpuAttention(pool, CpuCache([HEADS], options, 500), [plan])
        first = 0
        for n in step_sizes:
            attention.begin(n, first + n)
            attention.run(0, FloatRows(qkv[first : first + n]), FloatRows(out[first : first + n]))
            first += n
    return out


def expected(qkv: np.ndarray, n_tail: int, n_sinks: int, begin: int = 0) -> np.ndarray:
    """The oracle's, where keys and values are BFP12 in blocks of 32 and have exact rows."""
    h = HEADS
    heads = qkv.reshape(len(qkv), -1, h.head_dim)
    q, k, v = np.split(heads, [h.n_heads, h.n_heads + h.n_kv_heads], axis=1)
    exact = ExactRows(*(reference.round_blocks(x, "f16", 32) for x in (k, v)), q, n_tail, n_sinks, begin)
    packed = [reference.round_blocks(x, "bfp12", 32) for x in (k, v)]
    rounded = reference.round_blocks(q, "bfp16", 32)
    return attend(*packed, rounded, 0, h.scale, 0, exact).reshape(len(qkv), -1)


@pytest.mark.parametrize(
    "sizes", [(300,), (64, 236), (1,) * 300, (5, 1, 200, 1, 93)], ids=["1", "2", "decode", "mixed"]
)
@pytest.mark.parametrize("tail", [(128, 4), (20, 0), (0, 7), (1, 64)])
def test_attention_does_not_depend_on_steps(rng, sizes, tail):
    """Catches tails lost in a ring that is smaller than the prompt, and a ring that turns too far."""
    qkv = rows_of(rng, 300)
    options = CacheOptions("bfp12", "bfp12", 32, "bfp16", *tail)
    np.testing.assert_allclose(attended(qkv, options, *sizes), expected(qkv, *tail), rtol=0, atol=2e-3)


@pytest.mark.parametrize("back", [10, 150, 300])
def test_a_truncated_text_goes_on(rng, back):
    """Catches rows of forgotten tokens that are read as those of the tokens in their place."""
    qkv = rows_of(rng, 300)
    before = np.concatenate([qkv[: 300 - back], rows_of(rng, back)])
    options = CacheOptions("bfp12", "bfp12", 32, "bfp16", 40, 4)
    with Pool(2) as pool:
        none = np.zeros((HEADS.n_kv_heads, HEADS.head_dim), np.int64)
        plan = LayerPlan(HEADS, RopeTables(none, none, none), RopeTable(np.zeros(1)))
        attention = CpuAttention(pool, CpuCache([HEADS], options, 500), [plan])
        out = np.empty((300, HEADS.n_heads * HEADS.head_dim), np.float32)
        for rows, first in ((before, 0), (qkv, 300 - back)):
            attention.begin(300 - first, 300)
            attention.run(0, FloatRows(rows[first:]), FloatRows(out[first:]))
    begin = 0 if back < 80 else 300 - back  # the ring holds 128 rows
    np.testing.assert_allclose(out[-1], expected(qkv, 40, 4, begin)[-1], rtol=0, atol=2e-3)


def test_packed_cache_reads_them(rng, tmp_path):
    """Catches a PackedCache without its default tail, with another plan's rows, or that refuses many queries."""
    plan = make_plan(write_tiny_gguf(tmp_path / "tiny.gguf"), plan="balanced", block_size=16)
    k, v = rng.standard_normal((2, 400, 2, 32)).astype(np.float32)
    q = rng.standard_normal((300, 4, 32)).astype(np.float32)

    def of(**options) -> np.ndarray:
        cache = PackedCache(n_kv_heads=2, head_dim=32, n_ctx=1000, plan=plan, layer=1, block_size=16, **options)
        outs = []
        for start in range(0, 400, 50):
            cache.append(k[start : start + 50], v[start : start + 50])
            if start >= 100:
                outs.append(cache.attend(q[start - 100 : start - 50]))
        assert cache.attend(q).shape == q.shape  # many at once: in steps
        return np.concatenate(outs)

    floats = of(cache_type_k="f32", cache_type_v="f32")
    none, some, all_exact = (
        np.abs(of(**options) - floats).mean()
        for options in ({"exact_tail": 0, "exact_sinks": 0}, {}, {"exact_tail": 1000})
    )
    assert all_exact < 1e-3 < some < 0.9 * none
