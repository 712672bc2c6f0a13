"""What libksort computes, in slow NumPy: the oracle of its tests. FORMAT.md in code; needs only numpy.

Shapes: a head has d channels, a cache T tokens. Stored bytes are uint8 arrays.
"""

from typing import TYPE_CHECKING

import numpy as np

from ksort_gguf.reference_blocks import MANTISSA_BITS, decode_blocks, encode_blocks

if TYPE_CHECKING:
    from ksort_gguf.kvplan import Transform

TILE_TOKENS = 64
STRIP_TOKENS = 16
FLOAT_BYTES = {"f32": 4, "f16": 2, "bf16": 2}
GROUP_CHANNELS = {8: 4, 6: 16, 4: 8, 3: 32}  # channels whose mantissas fill whole 4-byte words together


# --- Blocks (reference_blocks.py) ---


def round_blocks(x: np.ndarray, type_name: str, block_size: int) -> np.ndarray:
    """x [..., d] as a cache or query of type `type_name` holds it: float32 [..., d]."""
    if type_name in MANTISSA_BITS:
        return decode_blocks(*encode_blocks(x, type_name, block_size), type_name, block_size)
    return bytes_to_float(float_to_bytes(x, type_name), type_name)


# --- Transforms: shift, scale, rotate, and rounding with feedback ---


def reorder(x: np.ndarray, permutation: np.ndarray) -> np.ndarray:
    """x [T, heads, d] with channel permutation[h, i] at place i of head h; permutation int [heads, d]."""
    return np.take_along_axis(x, permutation[None], axis=2)


def rotate(x: np.ndarray) -> np.ndarray:
    """The orthonormal Walsh-Hadamard transform W x of float32 x [..., d], its own inverse; float32 additions.

    A d that is no power of two is cut into segments of falling powers of two (80 = 64 + 16), each transformed alone.
    """
    parts, start = [], 0
    while start < x.shape[-1]:
        n = 1 << (x.shape[-1] - start).bit_length() - 1
        part, stride = x[..., start : start + n].astype(np.float32), 1
        while stride < n:  # pairs (i, i + stride) become (a + b, a - b)
            pairs = part.reshape(*x.shape[:-1], -1, 2, stride)
            part = np.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], axis=-2)
            part, stride = part.reshape(*x.shape[:-1], n), 2 * stride
        parts.append(part * np.float32(n**-0.5))
        start += n
    return np.concatenate(parts, axis=-1)


def transform_keys(x: np.ndarray, transform: "Transform") -> np.ndarray:
    """Keys or values float32 x [T, n_kv_heads, d] (keys after RoPE) as they are rounded, before feedback.

    transform: a plan's Transform (kvplan.py); so below.
    """
    y = x if transform.shift is None else x - transform.shift
    y = y if transform.scale is None else y * transform.scale
    y = rotate(y) if transform.rotate else y
    return y if transform.permutation is None else reorder(y, transform.permutation)


def transform_queries(q: np.ndarray, transform: "Transform") -> np.ndarray:
    """float32 q [T, n_heads, d] after RoPE -> what multiplies transformed keys, before its own rounding."""
    if transform.scale is not None:
        q = q / np.repeat(transform.scale, q.shape[1] // len(transform.scale), axis=0)
    q = rotate(q) if transform.rotate else q
    if transform.permutation is not None:
        q = reorder(q, np.repeat(transform.permutation, q.shape[1] // len(transform.permutation), axis=0))
    return q


def restore_values(out: np.ndarray, transform: "Transform") -> np.ndarray:
    """Attention's output float32 [T, n_heads, d] over transformed values -> over the values themselves."""
    if transform.permutation is not None:
        places = np.argsort(transform.permutation, axis=1)
        out = reorder(out, np.repeat(places, out.shape[1] // len(places), axis=0))
    out = rotate(out) if transform.rotate else out
    for name in ("scale", "shift"):
        if (table := getattr(transform, name)) is not None:
            table = np.repeat(table, out.shape[1] // len(table), axis=0)
            out = out / table if name == "scale" else out + table
    return out


# --- Float types ---


def float_to_bytes(x: np.ndarray, type_name: str) -> np.ndarray:
    """float32 [..., d] -> uint8 [..., d * bytes], rounded to nearest, ties to even. Raises ValueError out of range."""
    if type_name == "bf16":
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # half of the dropped 16 bits' weight, less one when even
        stored = rounded.astype("<u2")
        overflow = (stored & 0x7F80) == 0x7F80
    else:
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(x, {"f32": "<f4", "f16": "<f2"}[type_name])
        overflow = np.isinf(stored)
    if overflow.any():
        raise ValueError(f"a value is too large for {type_name}")
    return stored.view(np.uint8)


def bytes_to_float(stored: np.ndarray, type_name: str) -> np.ndarray:
    """uint8 [..., d * bytes] -> float32 [..., d], exact."""
    stored = np.ascontiguousarray(stored)
    if type_name == "bf16":
        return (stored.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return stored.view({"f32": "<f4", "f16": "<f2"}[type_name]).astype(np.float32)


# --- Words: the mantissas of one token in 4-byte words ---


def pack_words(mantissas: np.ndarray, mantissa_bits: int) -> np.ndarray:
    """int8 [..., d] -> uint8 [..., W, 4], little-endian words; the last group is padded with mantissas 0."""
    group = GROUP_CHANNELS[mantissa_bits]
    padding = [(0, 0)] * (mantissas.ndim - 1) + [(0, -mantissas.shape[-1] % group)]
    fields = np.pad(mantissas, padding).view(np.uint8) & (2**mantissa_bits - 1)
    groups = fields.reshape(*fields.shape[:-1], -1, group)
    if mantissa_bits == 8:
        return groups
    if mantissa_bits == 3:
        return _pack_words_of_3_bits(groups)
    nibbles = groups.reshape(*groups.shape[:-1], -1, 2, 4) & 15  # [..., words, low or high half, byte]
    words = nibbles[..., 0, :] | nibbles[..., 1, :] << 4
    if mantissa_bits == 6:
        pairs = (groups >> 4).reshape(*groups.shape[:-1], 4, 4)  # [..., i, b]: high two bits of channel 4 i + b
        high = sum(pairs[..., i, :] << 2 * i for i in range(4))
        words = np.concatenate([words, high[..., None, :]], axis=-2)
    return words.reshape(*mantissas.shape[:-1], -1, 4)


def _pack_words_of_3_bits(groups: np.ndarray) -> np.ndarray:
    """uint8 [..., groups, 32] -> [..., words, 4]: of each group the low two bits in two words, the high bits in one."""
    quads = groups.reshape(*groups.shape[:-1], 8, 4)  # [..., i, b]: channel 4 i + b
    low = [sum((quads[..., 4 * w + i, :] & 3) << 2 * i for i in range(4)) for w in range(2)]
    high = sum((quads[..., i, :] >> 2) << i for i in range(8))
    return np.stack([*low, high], axis=-2).reshape(*groups.shape[:-2], -1, 4)


def unpack_words(words: np.ndarray, mantissa_bits: int, head_dim: int) -> np.ndarray:
    """uint8 [..., W, 4] -> int8 [..., head_dim]: the inverse of pack_words."""
    leading = words.shape[:-2]
    if mantissa_bits == 8:
        fields = words.reshape(*leading, -1)
    elif mantissa_bits == 3:
        groups = words.reshape(*leading, -1, 3, 4)
        quads = [groups[..., i // 4, :] >> 2 * (i % 4) & 3 | (groups[..., 2, :] >> i & 1) << 2 for i in range(8)]
        fields = np.stack(quads, axis=-2).reshape(*leading, -1)
    else:
        groups = words.reshape(*leading, -1, 3 if mantissa_bits == 6 else 1, 4)
        low = groups[..., :2, :] if mantissa_bits == 6 else groups
        fields = np.stack([low & 15, low >> 4], axis=-2)  # [..., word, low or high half, byte]
        if mantissa_bits == 6:
            high = np.stack([groups[..., 2, :] >> 2 * i & 3 for i in range(4)], axis=-2)
            fields = fields.reshape(high.shape) | high << 4
        fields = fields.reshape(*leading, -1)
    sign_bit = 1 << (mantissa_bits - 1)
    return ((fields.astype(np.int16) ^ sign_bit) - sign_bit)[..., :head_dim].astype(np.int8)


# --- Tiles: 64 tokens of one head ---


def pack_tile(x: np.ndarray, type_name: str, block_size: int) -> np.ndarray:
    """float32 x [64, d] -> the tile's bytes, uint8 [tile bytes]; the nearest encoder."""
    if type_name in FLOAT_BYTES:
        return float_to_bytes(x, type_name).ravel()
    return tile_of(*encode_blocks(x, type_name, block_size), type_name)


def tile_of(mantissas: np.ndarray, codes: np.ndarray, type_name: str) -> np.ndarray:
    """int8 mantissas [64, d] and uint8 scale bytes [64, blocks] -> the tile's bytes, uint8 [tile bytes]."""
    words = pack_words(mantissas, MANTISSA_BITS[type_name])  # [64 tokens, W, 4]
    strips = words.reshape(TILE_TOKENS // STRIP_TOKENS, STRIP_TOKENS, -1, 4).swapaxes(1, 2)  # [strip, W, 16 tokens, 4]
    return np.concatenate([strips.ravel(), codes.T.ravel()])


def unpack_tile(tile: np.ndarray, type_name: str, head_dim: int, block_size: int) -> np.ndarray:
    """A tile's bytes, any pattern -> float32 [64, head_dim]."""
    if type_name in FLOAT_BYTES:
        return bytes_to_float(tile.reshape(TILE_TOKENS, -1), type_name)
    bits = MANTISSA_BITS[type_name]
    n_blocks = -(-head_dim // block_size)
    strips, codes = np.split(tile, [tile.size - n_blocks * TILE_TOKENS])
    words = strips.reshape(TILE_TOKENS // STRIP_TOKENS, -1, STRIP_TOKENS, 4).swapaxes(1, 2).reshape(TILE_TOKENS, -1, 4)
    mantissas = unpack_words(words, bits, head_dim)
    return decode_blocks(mantissas, codes.reshape(n_blocks, TILE_TOKENS).T, type_name, block_size)


# --- Attention ---


def rope(
    x: np.ndarray, partner: np.ndarray, sign: np.ndarray, frequency: np.ndarray, cos: np.ndarray, sin: np.ndarray
) -> np.ndarray:
    """Rotary embedding in folded order, each product and the sum rounded to float32 as the library does.

    x float32 [T, heads, d]; tables [heads, d] (models/rope.py); cos, sin float32 [T, n_frequencies].
    """
    head = np.arange(x.shape[1])[:, None]
    turned = x * cos[:, frequency] + sign.astype(np.float32) * x[:, head, partner.astype(np.intp)] * sin[:, frequency]
    return np.where(sign == 0, x, turned).astype(np.float32)


def attend(k: np.ndarray, v: np.ndarray, q: np.ndarray, first_slot: int, scale: float, window: int = 0) -> np.ndarray:
    """softmax(scale q k^T) v in float64: causal, `window` slots back (0: all). Returns float64 [n_queries, n_heads, d].

    k, v [T, n_kv_heads, d] and q [n_queries, n_heads, d] are values as decoded, q after RoPE and rounding. Query i
    stands in slot first_slot + i and head g reads KV head g // (n_heads / n_kv_heads).
    """
    k, v, q = (np.asarray(t, np.float64) for t in (k, v, q))
    n_queries, n_heads, _ = q.shape
    group = n_heads // k.shape[1]
    out = np.empty_like(q)
    for i in range(n_queries):
        end = first_slot + i + 1
        seen = slice(max(0, end - window) if window else 0, end)
        for g in range(n_heads):
            scores = scale * (k[seen, g // group] @ q[i, g])
            weights = np.exp(scores - scores.max())
            out[i, g] = weights / weights.sum() @ v[seen, g // group]
    return out
