"""Cache sizes and limits."""

import resource

import pytest

from ksort_gguf.cache.cpu import CpuCache
from ksort_gguf.cache.protocol import CacheOptions, HeadShape
from ksort_gguf.errors import KsortError

HEADS = HeadShape(n_heads=8, n_kv_heads=4, head_dim=64, scale=0.125, window=0)
N_LAYERS = 4


def cache(k_type="bfp12", v_type="f16", block_size=32, query_type="bfp16", n_ctx=4096) -> CpuCache:
    return CpuCache([HEADS] * N_LAYERS, CacheOptions(k_type, v_type, block_size, query_type), n_ctx)


@pytest.mark.parametrize(
    "type_name, bits",
    [
        ("f32", 32),
        ("f16", 16),
        ("bf16", 16),
        ("bfp16", 8.25),
        ("bfp14", 6.25),
        ("bfp12", 4.25),
        ("sbfp12", 4.25),
        ("sbfp11", 3.25),
    ],
)
def test_full_tiles_take_exactly_the_stated_bits(type_name, bits):
    """Would catch hidden copies or padding in what the run reports as its cache, or K and V taken for one another."""
    n_values = 1280 * N_LAYERS * HEADS.n_kv_heads * HEADS.head_dim
    keys, values = cache(k_type=type_name), cache(v_type=type_name)
    keys.n_tokens = values.n_tokens = 1280
    assert (keys.k_bytes() * 8, keys.v_bytes() * 8) == (n_values * bits, n_values * 16)
    assert (values.k_bytes() * 8, values.v_bytes() * 8) == (n_values * 4.25, n_values * bits)


def test_a_started_tile_counts_whole():
    """Would catch sizes that round down, and so promise less memory than is used."""
    c = cache()
    c.n_tokens = 1
    one = c.k_bytes()
    c.n_tokens = 64
    assert c.k_bytes() == one > 0
    c.n_tokens = 65
    assert c.k_bytes() == 2 * one


def test_a_huge_context_costs_nothing_before_it_is_used():
    """Would catch a cache that is touched or zeroed when it is made: 32 GiB would then show in the peak memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kept = cache(k_type="f32", v_type="f32", n_ctx=1 << 21)
    assert kept.k_bytes() == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_truncate_refuses_tokens_that_are_not_there():
    """Would catch a chat that rewinds past what is stored."""
    c = cache()
    c.n_tokens = 10
    c.truncate(4)
    assert c.n_tokens == 4
    with pytest.raises(ValueError, match="cannot keep 5 of 4"):
        c.truncate(5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"block_size": 7}, "block size 7 is not one of"),
        ({"block_size": 128}, "larger than the model's head dimension 64"),
        ({"block_size": 128, "k_type": "f16", "v_type": "bfp14", "query_type": "f32"}, "larger than the model's"),
        ({"n_ctx": 0}, "context size 0"),
    ],
)
def test_impossible_options_are_refused(change, message):
    """Would catch native errors, or worse, reaching the user for options that never fit the model."""
    with pytest.raises(KsortError, match=message):
        cache(**change)
