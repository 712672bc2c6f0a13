"""The oracle itself, against numbers worked out by hand and against d-Matrix's package."""

import numpy as np
import pytest
from dmx_support import dmx_cast, dmx_is_exact
from native_support import BFP_TYPES, drawn, nasty_rows, random_formats

from ksort_gguf import reference
from ksort_gguf.models.rope import stock_tables
from ksort_gguf.names import CACHE_TYPES
from ksort_gguf.reference_blocks import SCALED_TYPES, largest_magnitude


def test_nearest_encoder_by_hand():
    """Catches a step off by one bit, ties away from zero, and a clamp at -8: block maximum 7.9 gives step 1, e = 2."""
    x = np.zeros((1, 16), np.float32)
    x[0, :8] = [7.9, -7.9, 0.5, 1.5, 2.5, -2.5, 0.49, 6.51]
    mantissas, exponents = reference.encode_blocks(x, "bfp12", 16)
    assert mantissas[0, :8].tolist() == [7, -7, 0, 2, 2, -2, 0, 7]
    assert exponents.tolist() == [[2 + 127]]


@pytest.mark.parametrize(
    ("largest", "code", "mantissas"),
    [
        (7.0, 0x3C, [7, -7, 0, 2, 2, -2]),  # scale 1
        (7.875, 0x3C, [7, -7, 0, 1, 2, -2]),  # 1.125, a tie: to the even 1; 1.5 / 1.125 = 1.33, 2.5 / 1.125 = 2.22
        (9.625, 0x3E, [7, -7, 0, 1, 2, -2]),  # 1.375, a tie: to the even 1.5
        (7 * 57344.0, 0x7B, [7, -7, 0, 0, 0, 0]),
    ],
)
def test_nearest_scales_by_hand(largest, code, mantissas):
    """Catches ties away from even codes, and mantissas divided by the scale as stored; m = 4."""
    x = np.zeros((1, 16), np.float32)
    x[0, :6] = [largest, -largest, 0.5, 1.5, 2.5, -2.5]
    stored, codes = reference.encode_blocks(x, "sbfp12", 16)
    assert codes.tolist() == [[code]] and stored[0, :6].tolist() == mantissas


@pytest.mark.parametrize(("scale", "code"), [(2.0**-17, 0), (2.0**-17 * 1.01, 1), (2.0**-16 * 1.5, 2), (2.0**-14, 4)])
def test_smallest_scales(scale, code):
    """Catches subnormal scales rounded as if they were normal: steps of 2^-16 below 2^-14."""
    mantissas, codes = reference.encode_blocks(np.full((1, 16), 3 * scale, np.float32), "sbfp11", 16)
    assert codes.tolist() == [[code]]
    assert (mantissas == (3 if code else 0)).all()


@pytest.mark.parametrize(
    ("type_name", "code", "mantissa", "value"),
    [
        *(("bfp12", 0, 5, 0.0), ("bfp12", 129, -8, -8.0), ("bfp12", 1, 1, 2.0**-128), ("bfp12", 127, 7, 1.75)),
        *(("sbfp12", 0, 5, 0.0), ("sbfp12", 0x3D, -8, -10.0), ("sbfp12", 0x80, 7, 0.0), ("sbfp12", 0x01, 1, 2.0**-16)),
        *(("sbfp12", 0xFB, -8, 8 * 57344.0), ("sbfp11", 0x3E, -4, -6.0), ("sbfp11", 0x7C, 1, np.inf)),
    ],
)
def test_decode_by_hand(type_name, code, mantissa, value):
    """Catches decoders that forget E = 0, the smallest two's complement mantissa, subnormals, or signs."""
    stored = np.array([[mantissa]], np.int8), np.array([[code]], np.uint8)
    decoded = reference.decode_blocks(*stored, type_name, 16)
    assert decoded.tolist() == [[value]]


def test_words_by_hand():
    """Catches swapped nibbles or bytes: the word tables of FORMAT.md, one channel at a time."""
    channels = np.arange(8, dtype=np.int8)
    assert reference.pack_words(channels, 4).tolist() == [[0x40, 0x51, 0x62, 0x73]]
    assert reference.pack_words(channels, 8).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    for channel in range(16):
        one = np.zeros(16, np.int8)
        one[channel] = -1  # bits 111111
        words = reference.pack_words(one, 6)
        assert words.shape == (3, 4)
        low_word, low_half, byte = channel // 8, channel % 8 // 4, channel % 4
        expected = np.zeros((3, 4), np.uint8)
        expected[low_word, byte] = 0xF << 4 * low_half
        expected[2, byte] |= 0b11 << 2 * (channel // 4)
        assert (words == expected).all()
    for channel in range(32):
        one = np.zeros(32, np.int8)
        one[channel] = -1  # bits 111
        expected = np.zeros((3, 4), np.uint8)
        expected[channel // 16, channel % 4] = 0b11 << 2 * (channel % 16 // 4)
        expected[2, channel % 4] = 1 << channel // 4
        assert (reference.pack_words(one, 3) == expected).all()


@pytest.mark.parametrize("mantissa_bits", [3, 4, 6, 8])
@pytest.mark.parametrize("head_dim", [2, 6, 16, 80, 90])
def test_words_round_trip(rng, mantissa_bits, head_dim):
    """Catches a padding or sign-extension slip: every mantissa comes back, padding is zero."""
    limit = 2 ** (mantissa_bits - 1)
    mantissas = rng.integers(-limit, limit, (50, head_dim)).astype(np.int8)
    words = reference.pack_words(mantissas, mantissa_bits)
    assert (reference.unpack_words(words, mantissa_bits, head_dim) == mantissas).all()
    n_channels = words.shape[1] * 32 // mantissa_bits
    assert not reference.unpack_words(words, mantissa_bits, n_channels)[:, head_dim:].any()


@pytest.mark.parametrize(("type_name", "head_dim", "block_size"), random_formats(30))
def test_tile_size_and_round_trip(rng, type_name, head_dim, block_size):
    """Catches a tile layout whose size differs from the one size rule, or that does not invert."""
    x = rng.standard_normal((64, head_dim)).astype(np.float32)
    tile = reference.pack_tile(x, type_name, block_size)
    assert tile.size == CACHE_TYPES[type_name].tile_bytes(head_dim, block_size)
    unpacked = reference.unpack_tile(tile, type_name, head_dim, block_size)
    assert (unpacked == reference.round_blocks(x, type_name, block_size)).all()


def test_tile_bytes_by_hand():
    """Catches tokens and words swapped in a strip, or exponents out of place: one value, its word and exponent byte."""
    x = np.zeros((64, 64), np.float32)
    x[37, 43] = 4.0  # token 5 of strip 2; word 5 (channels 40-47), byte 3, low nibble; block 1 of 32
    tile = reference.pack_tile(x, "bfp12", 32)
    n_words = 8
    assert dict(zip(np.flatnonzero(tile).tolist(), tile[tile != 0].tolist(), strict=True)) == {
        2 * 64 * n_words + (5 * 16 + 5) * 4 + 3: 4,
        256 * n_words + 64 * 1 + 37: 2 + 127,
    }


@pytest.mark.parametrize("type_name", ["f16", "bf16"])
def test_floats_round_like_torch(rng, type_name):
    """Catches truncation instead of round to nearest even."""
    import torch

    x = nasty_rows(rng, 400, 64)
    x = x[np.abs(x).max(axis=1) < 60000]
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[type_name]
    expected = torch.from_numpy(x).to(dtype).float().numpy()
    assert reference.round_blocks(x, type_name, 16).tobytes() == expected.tobytes()


@pytest.mark.parametrize("type_name", ["f16", "bf16"])
def test_float_overflow_raises(type_name):
    """Catches a value that silently becomes infinity."""
    with pytest.raises(ValueError, match=type_name):
        reference.float_to_bytes(np.array([3.4e38], np.float32), type_name)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_encoder_refuses_non_finite(bad):
    """Catches an exponent made from NaN or infinity."""
    with pytest.raises(ValueError, match="NaN"):
        reference.encode_blocks(np.array([[1.0, bad]], np.float32), "bfp12", 16)


@drawn(12, type_name=BFP_TYPES, block_size=(16, 32, 64, 128), head_dim=(90, 128))
def test_encoder_equals_dmx(rng, type_name, block_size, head_dim):
    """Catches any departure from d-Matrix's BFP[m|8]{n}(SN) and SBFP, short last blocks included."""
    x = nasty_rows(rng, 600, head_dim, reference.MANTISSA_BITS[type_name])
    if type_name in SCALED_TYPES:
        x = np.clip(x, -largest_magnitude(type_name), largest_magnitude(type_name))
    ours = reference.round_blocks(x, type_name, block_size)
    comparable = dmx_is_exact(x, type_name, block_size)
    assert comparable.mean() > 0.5
    assert (ours == dmx_cast(x, type_name, block_size))[comparable].all()


@pytest.mark.parametrize("row_order", ["half", "interleaved"])
def test_rope_equals_complex_rotation(rng, row_order):
    """Catches a wrong sign or pairing: RoPE is multiplication by e^(i angle) of the pair as a complex number."""
    head_dim, n_rot = 12, 8
    x = rng.standard_normal((3, 1, head_dim)).astype(np.float32)
    angle = rng.uniform(-3, 3, (3, n_rot // 2))
    tables = stock_tables(head_dim, n_rot, row_order)
    y = reference.rope(
        x, tables.partner[None], tables.sign[None], tables.frequency[None],
        np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32),
    )  # fmt: skip
    first, second = (slice(0, 4), slice(4, 8)) if row_order == "half" else (slice(0, 8, 2), slice(1, 8, 2))
    turned = (x[:, 0, first] + 1j * x[:, 0, second]) * np.exp(1j * angle)
    np.testing.assert_allclose(y[:, 0, first], turned.real, rtol=0, atol=1e-6)
    np.testing.assert_allclose(y[:, 0, second], turned.imag, rtol=0, atol=1e-6)
    assert (y[..., n_rot:] == x[..., n_rot:]).all()


def test_attend_equals_torch(rng):
    """Catches a slip in the oracle's masks or head groups: against torch's attention, 3 queries on 20 slots."""
    import torch

    k, v = rng.standard_normal((2, 20, 2, 8))
    q = rng.standard_normal((3, 4, 8))
    position, slot = torch.arange(17, 20)[:, None], torch.arange(20)
    for window in (0, 5):
        mask = (slot <= position) & ((slot > position - window) if window else True)
        expected = torch.nn.functional.scaled_dot_product_attention(
            *(torch.from_numpy(t).transpose(0, 1) for t in (q, k, v)), attn_mask=mask, scale=0.3, enable_gqa=True
        )
        np.testing.assert_allclose(
            reference.attend(k, v, q, 17, 0.3, window), expected.transpose(0, 1).numpy(), rtol=1e-12, atol=1e-12
        )
