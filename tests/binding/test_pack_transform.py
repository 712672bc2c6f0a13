"""Packing with a plan's transforms: the oracle's bytes, at every kernel level."""

import dataclasses

import numpy as np
import pytest
from native_support import (
    BFP_SHAPES,
    BFP_TYPES,
    RUN_TIME_STEPS,
    drawn,
    nasty_rows,
    new_cache,
    random_transform,
    rope_for,
    rotated,
    token_of_byte,
)

from ksort_gguf import reference, reference_blocks
from ksort_gguf.binding import cpu
from ksort_gguf.errors import KsortError
from ksort_gguf.kvplan import Transform


def expected_tiles(x: np.ndarray, type_name: str, block_size: int, transform: Transform) -> np.ndarray:
    """uint8 [tiles, heads, tile bytes] of x [whole tiles of tokens, heads, d] (keys after RoPE), by the reference."""
    y = reference.transform_keys(x, transform)
    with np.errstate(over="ignore"):  # feedback from a block of huge values, in units of a small step
        encoded = reference_blocks.encode_transformed(y, type_name, block_size, transform.feedback)
    mantissas, exponents = (t.reshape(-1, 64, *t.shape[1:]).swapaxes(1, 2) for t in encoded)
    n_tiles, n_heads = mantissas.shape[:2]
    return np.stack(
        [
            [reference.tile_of(mantissas[tile, head], exponents[tile, head], type_name) for head in range(n_heads)]
            for tile in range(n_tiles)
        ]
    )


def nasty_heads(rng, n_tokens: int, n_heads: int, head_dim: int, type_name: str) -> np.ndarray:
    """float32 [n_tokens, n_heads, head_dim] of nasty rows that can be packed whatever random_transform does."""
    rows = nasty_rows(rng, n_tokens * n_heads, head_dim, reference.MANTISSA_BITS[type_name])
    largest = 100 if type_name in reference_blocks.SCALED_TYPES else 1e32
    return np.clip(rows, -largest, largest).astype(np.float32).reshape(n_tokens, n_heads, head_dim)


STEPS = [(), *((step,) for step in RUN_TIME_STEPS), RUN_TIME_STEPS, RUN_TIME_STEPS[:4], RUN_TIME_STEPS[:3]]


@drawn(36, type_name=BFP_TYPES, shape=BFP_SHAPES, steps=STEPS)
def test_packed_bytes_equal_the_reference(level, rng, type_name, shape, steps):
    """Catches products rounded or fused where they should not be, another order of sums, strides or errors, a wrong
    choice of scale byte, and ties."""
    head_dim, block_size = shape
    transform = random_transform(rng, 2, head_dim, steps)
    x = nasty_heads(rng, 128, 2, head_dim, type_name)
    cache, tiles = new_cache(type_name, head_dim, block_size, 2, 128)
    for start, end in ((0, 1), (1, 19), (19, 21), (21, 37), (37, 128)):  # one by one, a group and a rest, across tiles
        cache.pack(x[start:end], start, transform=transform)
    assert (tiles == expected_tiles(x, type_name, block_size, transform)).all()


@pytest.mark.parametrize("type_name", ["bfp12", "sbfp11"])
@pytest.mark.parametrize("head_dim", [64, 90])
def test_every_number_of_tokens(level, rng, type_name, head_dim):
    """Catches groups of tokens that lose, repeat or mix up tokens, and stores beyond the call's slots."""
    first_slot, transform = 13, random_transform(rng, 2, head_dim)
    x = nasty_heads(rng, 128, 2, head_dim, type_name)
    whole = expected_tiles(x, type_name, 32, transform)
    slot_of_byte = token_of_byte(type_name, head_dim, 32) + 64 * np.arange(2)[:, None, None]
    for n_tokens in range(1, 101):
        cache, tiles = new_cache(type_name, head_dim, 32, 2, 128, fill=0xA5)
        cache.pack(x[first_slot : first_slot + n_tokens], first_slot, transform=transform)
        written = (slot_of_byte >= first_slot) & (slot_of_byte < first_slot + n_tokens)
        assert (tiles == np.where(written, whole, 0xA5)).all(), n_tokens


@pytest.mark.parametrize("nth", [2, 3, 7, 100])
def test_parts_make_the_whole(level, rng, nth):
    """Catches parts whose borders inside a head's tokens change bytes: groups begin elsewhere there."""
    transform = random_transform(rng, 3, 80)
    x = nasty_heads(rng, 64, 3, 80, "bfp14")
    cache, tiles = new_cache("bfp14", 80, 32, 3, 64, fill=0xA5)
    for ith in reversed(range(nth)):
        cache.pack(x[5:], 5, ith=ith, nth=nth, transform=transform)
    written = token_of_byte("bfp14", 80, 32) >= 5
    assert (tiles == np.where(written, expected_tiles(x, "bfp14", 32, transform), 0xA5)).all()


def test_rope_comes_first(level, rng):
    """Catches a shift or scale of keys before RoPE, and tables of another head or token."""
    transform = random_transform(rng, 3, 64)
    _, rope = rope_for(rng, 3, 64, 64, "half", 64)
    x = rng.standard_normal((64, 3, 64)).astype(np.float32)
    cache, tiles = new_cache("bfp12", 64, 32, 3, 64)
    cache.pack(x, 0, **rope, transform=transform)
    assert (tiles == expected_tiles(rotated(x, **rope), "bfp12", 32, transform)).all()


@pytest.mark.parametrize("type_name", BFP_TYPES)
def test_runs_of_one_magnitude(level, rng, type_name):
    """Catches exponents below 1 or too large, and signs lost: whole heads of the smallest and largest numbers."""
    feedback = random_transform(rng, 1, 64, ("feedback",))
    largest = 2.0**119
    if type_name in reference_blocks.SCALED_TYPES:
        largest = reference_blocks.largest_magnitude(type_name)
    for value in (2.0**-149, 2.0**-126, 2.0**-125, 2.0**-14, 1.0, largest):
        x = (rng.choice([-1, 1], (64, 1, 64)) * value).astype(np.float32)
        for transform in (Transform(), feedback):
            cache, tiles = new_cache(type_name, 64, 32, 1, 64)
            cache.pack(x, 0, transform=transform)
            assert (tiles == expected_tiles(x, type_name, 32, transform)).all(), (value, transform is feedback)


@pytest.mark.parametrize("type_name", reference_blocks.SCALED_TYPES)
@pytest.mark.parametrize("shape", [(16, 16), (34, 32), (64, 32), (128, 64), (256, 128)])
def test_every_scale(level, rng, type_name, shape):
    """Catches a scale byte off by one, a wrong sign where the largest values differ by it, and steps below 2^-14."""
    head_dim, block_size = shape
    low = 2 ** (reference.MANTISSA_BITS[type_name] - 1)
    scales = reference_blocks.decode_scales(np.arange(1, 0x7C, dtype=np.uint8))
    around = np.nextafter(np.repeat(scales, 3), np.tile(np.float32([0, 1, 1e9]), len(scales)))
    around = np.where(np.arange(len(around)) % 3 == 1, np.repeat(scales, 3), around)
    largest = np.resize(np.minimum(low * around, (low - 1) * scales[-1]), 6 * 64)[:, None, None]
    x = rng.uniform(-1, 1, (6 * 64, 1, head_dim)) * largest
    at = rng.integers(0, head_dim, (len(x), 1, 2))  # of a pair, the first decides
    np.put_along_axis(x, at, largest * rng.choice([-1, 1], at.shape), axis=2)
    x = x.astype(np.float32)
    for transform in (Transform(), random_transform(rng, 1, head_dim, ("feedback",))):
        cache, tiles = new_cache(type_name, head_dim, block_size, 1, len(x))
        cache.pack(x[:1], 0, transform=transform)
        cache.pack(x[1:], 1, transform=transform)
        assert (tiles == expected_tiles(x, type_name, block_size, transform)).all()


GROWTH = {  # transforms of a head of 16 equal channels, and how much larger its largest channel becomes
    "nothing": (Transform(), 1),
    "scale": (Transform(scale=np.full((1, 16), 8, np.float32)), 8),
    "rotate": (Transform(rotate=True), 4),
}


@pytest.mark.parametrize("type_name", ["bfp12", *reference_blocks.SCALED_TYPES])
@pytest.mark.parametrize("name", GROWTH)
@pytest.mark.parametrize("n_tokens", [1, 20])
def test_range_after_the_transform(level, type_name, name, n_tokens):
    """Catches a range check before the transform, one that refuses what fits, and bytes written before a refusal.

    And advice that does not help: the transform goes with every BFP and SBFP type, so only float types do.
    """
    transform, growth = GROWTH[name]
    largest = np.nextafter(np.float32(2.0**120), np.float32(0))
    if type_name in reference_blocks.SCALED_TYPES:
        largest = np.float32(reference_blocks.largest_magnitude(type_name))
    largest = largest / np.float32(growth)
    x = np.full((64, 1, 16), largest, np.float32)
    cache, tiles = new_cache(type_name, 16, 16, 1, 64, fill=0xA5)
    for too_large in (np.nextafter(largest, np.float32(np.inf)), 3e38):
        x[n_tokens - 1] = too_large
        with pytest.raises(KsortError, match=r"too large.*`cache_type_k` f32 and `cache_type_v` f32"):
            cache.pack(x[:n_tokens], 0, transform=transform)
    assert (tiles == 0xA5).all()
    x[:] = largest
    cache.pack(x[:n_tokens], 0, transform=transform)
    written = token_of_byte(type_name, 16, 16) < n_tokens
    assert (tiles == np.where(written, expected_tiles(x, type_name, 16, transform), 0xA5)).all()


def test_huge_shift_is_a_range_error(level):
    """Catches a bound that leaves the shift out, and infinity minus infinity taken for a small number."""
    shift = np.full((1, 16), 3e38, np.float32)
    cache, tiles = new_cache("bfp12", 16, 16, 1, 64, fill=0xA5)
    for transform in (Transform(shift=shift), Transform(shift=shift, rotate=True)):
        for sign in (-1, 1):
            with pytest.raises(KsortError, match="too large"):
                cache.pack(np.full((1, 1, 16), sign, np.float32), 0, transform=transform)
    assert (tiles == 0xA5).all()


@pytest.mark.parametrize("n_tokens", [1, 20])
def test_damaged_feedback_stays_in_its_head(level, rng, n_tokens):
    """Catches NaN in one head's feedback that reaches another head, an exponent, a zero block or an earlier channel."""
    transform = random_transform(rng, 2, 64, ("feedback",))
    x = rng.standard_normal((64, 2, 64)).astype(np.float32)
    x[:, :, 32:] = 0
    damaged = dataclasses.replace(transform, feedback=transform.feedback.copy())
    damaged.feedback[0, 10, 11:] = np.nan
    caches = [new_cache("bfp12", 64, 32, 2, 64) for _ in range(2)]
    for (cache, _), chosen in zip(caches, (transform, damaged), strict=True):
        cache.pack(x[:n_tokens], 0, transform=chosen)
    (good, good_tiles), (bad, bad_tiles) = caches
    assert (good_tiles[:, 1] == bad_tiles[:, 1]).all()
    assert (good_tiles[:, :, -128:] == bad_tiles[:, :, -128:]).all()  # exponents
    same = [*range(11), *range(32, 64)]
    assert (good.unpack(0, n_tokens)[:, 0, same] == bad.unpack(0, n_tokens)[:, 0, same]).all()


@pytest.mark.parametrize("field", ["shift", "scale", "permutation", "feedback"])
def test_wrong_shapes_are_refused(rng, field):
    """Catches tables of another model read out of bounds: C sees only a pointer."""
    cache, _ = new_cache("bfp12", 32, 16, 2, 64)
    x = np.zeros((1, 2, 32), np.float32)
    for other in (random_transform(rng, 1, 32), random_transform(rng, 2, 30)):
        transform = Transform(**{field: getattr(other, field)})
        with pytest.raises(ValueError, match=field):
            cache.pack(x, 0, transform=transform)
        for name in ("k_transform", "v_transform"):
            with pytest.raises(ValueError, match=field):
                cpu.attend(cache, cache, x, 0, scale=1.0, **{name: transform})


@pytest.mark.parametrize(("field", "bad"), [("shift", np.nan), ("scale", 0), ("scale", -1), ("permutation", 32)])
def test_a_damaged_plan_says_what_to_do(rng, field, bad):
    """Catches a damaged table taken for a programming error: the user needs to make the plan again."""
    transform = random_transform(rng, 2, 32)
    getattr(transform, field)[1, 31] = bad
    cache, tiles = new_cache("bfp12", 32, 16, 2, 64, fill=0xA5)
    x = np.zeros((1, 2, 32), np.float32)
    with pytest.raises(KsortError, match=r"plan is damaged.*again"):
        cache.pack(x, 0, transform=transform)
    assert (tiles == 0xA5).all()
