"""ksort_pack and ksort_unpack against the oracle, byte for byte, at every kernel level."""

import dataclasses
import mmap

import numpy as np
import pytest
from dmx_support import dmx_cast, dmx_is_exact
from native_support import (
    BFP_TYPES,
    FLOAT_TYPES,
    drawn,
    nasty_rows,
    new_cache,
    random_formats,
    rope_for,
    rotated,
    token_of_byte,
)

from ksort_gguf import reference
from ksort_gguf.binding import cpu, ffi
from ksort_gguf.errors import KsortError
from ksort_gguf.names import BLOCK_SIZES, CACHE_TYPES
from ksort_gguf.reference_blocks import SCALED_TYPES, largest_magnitude

FORMATS = random_formats(36)


def storable(x: np.ndarray, type_name: str) -> np.ndarray:
    """x with the values that `type_name` cannot hold made smaller."""
    largest = {"f16": 65504.0, "bf16": 3.3e38}.get(type_name, np.inf)
    if type_name in SCALED_TYPES:
        largest = largest_magnitude(type_name)
    return np.clip(x, -largest, largest).astype(np.float32)


def expected_tiles(x: np.ndarray, type_name: str, block_size: int) -> np.ndarray:
    """uint8 [tiles, heads, tile bytes] of x [whole tiles of tokens, heads, d], by the reference."""
    tiles = x.reshape(-1, reference.TILE_TOKENS, *x.shape[1:]).swapaxes(1, 2)  # [tiles, heads, 64, d]
    return np.stack([[reference.pack_tile(head, type_name, block_size) for head in tile] for tile in tiles])


@pytest.mark.parametrize("type_name", CACHE_TYPES)
def test_one_size_rule(type_name):
    """Catches the library and the runner reserving different sizes for a tile, of any head."""
    for head_dim in range(2, 257, 2):
        for block_size in BLOCK_SIZES if type_name in BFP_TYPES else (16,):
            if block_size <= head_dim or type_name in FLOAT_TYPES:
                ours = CACHE_TYPES[type_name].tile_bytes(head_dim, block_size)
                assert cpu.tile_bytes(type_name, head_dim, block_size) == ours, (head_dim, block_size)


@drawn(36, format=FORMATS)
def test_packed_bytes_equal_the_reference(level, rng, format):
    """Catches any wrong rounding, word, strip or exponent byte; packing starts and ends inside strips and tiles."""
    type_name, head_dim, block_size = format
    bits = CACHE_TYPES[type_name].value_bits
    x = storable(nasty_rows(rng, 192 * 2, head_dim, min(bits, 8)), type_name).reshape(192, 2, head_dim)
    cache, tiles = new_cache(type_name, head_dim, block_size, 2, 192)
    for start, end in ((0, 1), (1, 17), (17, 140), (140, 192)):
        cache.pack(x[start:end], start)
    assert (tiles == expected_tiles(x, type_name, block_size)).all()
    unpacked = cache.unpack(0, 192)
    assert unpacked.tobytes() == reference.round_blocks(x, type_name, block_size).tobytes()


@drawn(9, type_name=BFP_TYPES, shape=[(90, 16), (90, 32), (90, 64), (128, 16), (128, 32), (128, 64), (128, 128)])
def test_encoder_equals_dmx(level, rng, type_name, shape):
    """Catches a kernel that departs from d-Matrix's BFP[m|8]{n}(SN) or SBFP, the definition of the nearest encoder."""
    head_dim, block_size = shape
    x = storable(nasty_rows(rng, 512, head_dim, reference.MANTISSA_BITS[type_name]), type_name)
    cache, _ = new_cache(type_name, head_dim, block_size, 1, 512)
    cache.pack(x[:, None], 0)
    comparable = dmx_is_exact(x, type_name, block_size)
    assert comparable.mean() > 0.5
    assert (cache.unpack(0, 512)[:, 0] == dmx_cast(x, type_name, block_size))[comparable].all()


@drawn(36, format=FORMATS)
def test_every_byte_pattern_decodes(level, rng, format):
    """Catches decoders that only read what the nearest encoder writes: mantissa -2^(m-1), E = 0 with mantissas set."""
    type_name, head_dim, block_size = format
    cache, tiles = new_cache(type_name, head_dim, block_size, 2, 128)
    tiles[:] = rng.integers(0, 256, tiles.shape)
    unpacked = cache.unpack(0, 128).reshape(2, 64, 2, head_dim).swapaxes(1, 2)
    for index in np.ndindex(2, 2):
        decoded = reference.unpack_tile(tiles[index], type_name, head_dim, block_size)
        np.testing.assert_array_equal(unpacked[index], decoded)
    np.testing.assert_array_equal(cache.unpack(37, 50), cache.unpack(0, 128)[37:87])


@drawn(36, format=FORMATS, nth=[1, 3, 50], span=[(59, 9), (3, 1), (14, 20), (0, 5), (64, 64), (126, 2), (17, 47)])
def test_other_slots_keep_their_bytes(level, rng, format, nth, span):
    """Catches a kernel that stores whole strips or words of neighbouring tokens, and parts that miss or repeat work."""
    (type_name, head_dim, block_size), (first_slot, n_tokens) = format, span
    x = rng.standard_normal((n_tokens, 2, head_dim)).astype(np.float32)
    cache, tiles = new_cache(type_name, head_dim, block_size, 2, 128, fill=0xA5)
    for ith in reversed(range(nth)):
        cache.pack(x, first_slot, ith=ith, nth=nth)
    whole = np.zeros((128, 2, head_dim), np.float32)
    whole[first_slot : first_slot + n_tokens] = x
    slot_of_byte = token_of_byte(type_name, head_dim, block_size) + np.array([0, 64])[:, None, None]
    written = (slot_of_byte >= first_slot) & (slot_of_byte < first_slot + n_tokens)
    assert (tiles == np.where(written, expected_tiles(whole, type_name, block_size), 0xA5)).all()


ROPE_SHAPES = (  # head_dim, n_rot
    *((2, 2), (6, 4), (8, 8), (12, 12), (18, 2), (40, 40), (64, 64), (64, 32), (80, 20), (90, 90)),
    *((96, 96), (128, 128), (128, 64), (160, 160), (256, 256), (256, 64), (64, 0)),
)


@drawn(26, shape=ROPE_SHAPES, row_order=["half", "interleaved"], folded=[False, True])
def test_rope_is_bit_exact(level, rng, row_order, shape, folded):
    """Catches fused multiply-adds, wrong partners and frequencies: every level must store the same bits."""
    head_dim, n_rot = shape
    n_kv_heads, n_tokens = 3, 64
    _, rope = rope_for(rng, n_kv_heads, head_dim, n_rot, row_order, n_tokens, folded)
    x = rng.standard_normal((n_tokens, n_kv_heads, head_dim)).astype(np.float32)
    expected = rotated(x, **rope)
    for type_name in ("f32", "bfp12", "sbfp12") if head_dim >= 16 else ("f32", "f16"):
        cache, tiles = new_cache(type_name, head_dim, 16, n_kv_heads, n_tokens)
        cache.pack(x, 0, **rope)
        assert (tiles == expected_tiles(expected, type_name, 16)).all()


@pytest.mark.parametrize("n_frequencies", [40, 64, 65, 128, 129, 65536])
def test_rope_with_any_number_of_frequencies(level, rng, n_frequencies):
    """Catches lookups that are only right among a head's own pairs, and reads of what a channel that stays names."""
    _, rope = rope_for(rng, 2, 90, 80, "half", 20)
    tables, pairs = rope["rope"], np.sort(rng.permutation(n_frequencies)[:40])
    used = np.where(tables.sign == 0, 65535, pairs[tables.frequency % 40]).astype(np.uint16)
    positions = {name: np.full((20, n_frequencies), 1e30, np.float32) for name in ("cos", "sin")}
    for name, table in positions.items():
        table[:, pairs] = rope[name]
    x = rng.standard_normal((20, 2, 90)).astype(np.float32)
    cache, _ = new_cache("f32", 90, 16, 2, 64)
    cache.pack(x, 0, dataclasses.replace(tables, frequency=used), **positions)
    assert (cache.unpack(0, 20) == rotated(x, **rope)).all()


@drawn(12, type_name=BFP_TYPES + FLOAT_TYPES, bad=[np.nan, np.inf, -np.inf], with_rope=[False, True])
def test_non_finite_is_refused_everywhere(level, rng, type_name, bad, with_rope):
    """Catches a check that skips tail channels or later tokens, or comes after the first bytes were written."""
    n_tokens, n_kv_heads, head_dim = 3, 2, 18
    cache, tiles = new_cache(type_name, head_dim, 16, n_kv_heads, 64, fill=0xA5)
    rope = rope_for(rng, n_kv_heads, head_dim, 4, "half", n_tokens)[1] if with_rope else {}
    x = rng.standard_normal((n_tokens, n_kv_heads, head_dim)).astype(np.float32)
    for place in np.ndindex(x.shape):
        damaged = x.copy()
        damaged[place] = bad
        for ith in range(2):
            with pytest.raises(KsortError, match="NaN or infinity"):
                cache.pack(damaged, 0, ith=ith, nth=2, **rope)
    assert (tiles == 0xA5).all()


@pytest.mark.parametrize(
    ("type_name", "value"),
    [  # the first of a type: by one bit
        *(("f16", 65504.004), ("f16", -65520.0), ("bf16", 3.3895316e38), ("bf16", -3.4e38)),
        *(("sbfp12", 401408.03), ("sbfp12", -1e30), ("sbfp11", -172032.02), ("sbfp11", 3.4e38)),
    ],
)
def test_too_large_for_the_type_is_refused(level, type_name, value):
    """Catches infinity stored for a finite value, in any channel of any token."""
    cache, tiles = new_cache(type_name, 18, 16, 1, 64, fill=0xA5)
    for channel in range(18):
        x = np.ones((2, 1, 18), np.float32)
        x[1, 0, channel] = value
        with pytest.raises(KsortError, match="too large"):
            cache.pack(x, 0)
    assert (tiles == 0xA5).all()


def test_largest_values_are_stored(level):
    """Catches range checks that refuse what the type can hold."""
    floats = ("f16", 65504.0), ("bf16", 3.3895314e38), ("f32", 3.4028235e38)
    for type_name, value in (*floats, ("bfp16", 3.4028235e38), ("sbfp12", 401408.0), ("sbfp11", 172032.0)):
        cache, _ = new_cache(type_name, 16, 16, 1, 64)
        x = np.full((1, 1, 16), value, np.float32)
        cache.pack(x, 0)
        assert (cache.unpack(0, 1) == reference.round_blocks(x, type_name, 16)).all()


@pytest.mark.parametrize(
    ("type_name", "value"),
    [("f16", 6e4), ("bf16", 3e38), ("f32", 3e38), ("bfp12", 3e38), ("sbfp12", 4e5), ("sbfp11", 1.7e5)],
)
def test_overflow_by_rope_is_refused(level, rng, type_name, value):
    """Catches a range check of the keys before RoPE only: 45 degrees make sqrt(2) of a value."""
    _, rope = rope_for(rng, 1, 16, 16, "half", 1, folded=False)
    rope["cos"][:] = rope["sin"][:] = np.float32(np.sqrt(0.5))
    cache, tiles = new_cache(type_name, 16, 16, 1, 64, fill=0xA5)
    with pytest.raises(KsortError):
        cache.pack(np.full((1, 1, 16), value, np.float32), 0, **rope)
    assert (tiles == 0xA5).all()
    cache.pack(np.full((1, 1, 16), value / 2, np.float32), 0, **rope)


@pytest.mark.parametrize("type_name", ["bfp12", "f16"])
def test_strides(level, rng, type_name):
    """Catches tiles placed by a fixed layout: here heads are outermost, with gaps that must stay untouched."""
    n_kv_heads, n_slots, head_dim = 2, 192, 32
    one_tile = cpu.tile_bytes(type_name, head_dim, 32)
    tile_stride, head_stride = one_tile + 64, 3 * (one_tile + 64)
    memory = ffi.aligned_buffer(n_kv_heads * head_stride)
    memory[:] = 0xA5
    cache = cpu.PackedHeads(type_name, head_dim, 32, n_kv_heads, n_slots, memory, tile_stride, head_stride)
    x = rng.standard_normal((n_slots, n_kv_heads, head_dim)).astype(np.float32)
    cache.pack(x, 0)
    tiles = memory.reshape(n_kv_heads, 3, one_tile + 64)
    assert (tiles[..., :one_tile].swapaxes(0, 1) == expected_tiles(x, type_name, 32)).all()
    assert (tiles[..., one_tile:] == 0xA5).all()


def test_the_worked_example_of_the_readme():
    """Catches pointer arithmetic in native/README.md that an embedder would copy and that is wrong."""
    cache, tiles = new_cache("bfp12", 64, 32, 2, 192)
    assert (cache.struct.head_stride, cache.struct.tile_stride) == (2176, 4352)
    x = np.zeros((1, 2, 64), np.float32)
    x[0, 1, 43] = 4.0
    cache.pack(x, 165)
    memory = tiles.ravel()
    assert np.flatnonzero(memory).tolist() == [12247, 13029]
    assert memory[[12247, 13029]].tolist() == [4, 2 + 127]


def test_a_growing_context_does_not_move(level, rng):
    """Catches re-packing or moving of stored tokens: earlier bytes and the base address stay, in reserved memory."""
    n_slots, step = 64 * 16, 50
    with mmap.mmap(-1, cpu.tile_bytes("bfp12", 64, 32) * n_slots // 64) as memory:
        cache = cpu.PackedHeads("bfp12", 64, 32, 1, n_slots, memory)
        base = cache.struct.base
        stored = np.empty((0, 1, 64), np.float32)
        for start in range(0, n_slots - step, step):
            cache.pack(rng.standard_normal((step, 1, 64)).astype(np.float32), start)
            now = cache.unpack(0, start + step)
            assert now[:start].tobytes() == stored.tobytes()
            stored = now
        assert cache.struct.base == base
        del cache, base


def test_buffer_too_small_is_refused():
    """Catches a cache whose last tile lies outside its buffer."""
    memory = ffi.aligned_buffer(cpu.tile_bytes("bfp12", 64, 32) * 2)
    cpu.PackedHeads("bfp12", 64, 32, 1, 128, memory)
    with pytest.raises(ValueError, match="too small"):
        cpu.PackedHeads("bfp12", 64, 32, 1, 129, memory)
