"""Blocks of BFP and SBFP types, and their encoders, in slow NumPy: FORMAT.md sections 1 and 3. Part of reference.py.

Shapes: a head has d channels. The byte that a block's channels share is its scale byte: an exponent, or a signed scale.
"""

import numpy as np

MANTISSA_BITS = {"bfp16": 8, "bfp14": 6, "bfp12": 4, "sbfp12": 4, "sbfp11": 3}
SCALED_TYPES = ("sbfp12", "sbfp11")
EXPONENT_BIAS = 127


def decode_scales(codes: np.ndarray) -> np.ndarray:
    """Signed scale bytes uint8 [...], e5m2, the upper bytes of f16 values -> float32 [...]."""
    return (codes.astype("<u2") << 8).view("<f2").astype(np.float32)


_SCALES = decode_scales(np.arange(0x7C, dtype=np.uint8))  # those that are not negative, in ascending order
_SIGN = 0x80  # of a scale byte


def largest_magnitude(type_name: str) -> float:
    """What an SBFP type holds at most: its largest mantissa times the largest scale. Packers refuse more."""
    return (2 ** (MANTISSA_BITS[type_name] - 1) - 1) * float(_SCALES[-1])


def encode_blocks(x: np.ndarray, type_name: str, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The nearest encoders: finite float32 x [..., d] -> mantissas int8 [..., d], scale bytes uint8 [..., blocks].

    Raises ValueError on NaN, infinity, and values beyond an SBFP type's largest magnitude.
    """
    _check_finite(x, type_name)
    encode = _nearest_scaled if type_name in SCALED_TYPES else _nearest_bfp
    return _join([encode(block, MANTISSA_BITS[type_name]) for block in _blocks(x.astype(np.float32), block_size)])


def decode_blocks(mantissas: np.ndarray, codes: np.ndarray, type_name: str, block_size: int) -> np.ndarray:
    """Mantissas int8 [..., d] and scale bytes uint8 [..., blocks], of any byte values -> float32 [..., d]."""
    stored = np.repeat(codes, block_size, axis=-1)[..., : mantissas.shape[-1]]
    with np.errstate(over="ignore", invalid="ignore"):  # beyond float32, or scales that no encoder makes
        if type_name in SCALED_TYPES:
            return mantissas * decode_scales(stored)
        power = stored.astype(np.int32) - EXPONENT_BIAS - (MANTISSA_BITS[type_name] - 2)
        return np.where(stored == 0, 0.0, np.ldexp(mantissas.astype(np.float64), power)).astype(np.float32)


def encode_transformed(
    y: np.ndarray, type_name: str, block_size: int, feedback: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """The encoder of transformed heads: float32 y [T, heads, d] -> mantissas int8 [T, heads, d], scale bytes uint8.

    feedback: float32 [heads, d, d] or None. All arithmetic is float32: products that are added are fused, every other
    operation is rounded. Raises ValueError as encode_blocks does.
    """
    _check_finite(y, type_name)
    y, bits = y.astype(np.float32), MANTISSA_BITS[type_name]
    choose = _scale_codes if type_name in SCALED_TYPES else _exponents
    codes = np.stack([choose(block, bits) for block in _blocks(y, block_size)], axis=-1)
    steps, inverses = _steps(codes, type_name)
    mantissas = np.zeros(y.shape, np.int8)
    for c in range(y.shape[-1]):
        step, inverse = steps[..., c // block_size], inverses[..., c // block_size]
        mantissa = np.where(step == 0, np.float32(0), _round(_times(y[..., c], inverse), bits))
        mantissas[..., c] = mantissa
        if feedback is not None:
            error = multiply_add(-mantissa, step, y[..., c])
            y[..., c + 1 :] = multiply_add(-error[..., None], feedback[:, c, c + 1 :], y[..., c + 1 :])
    return mantissas, codes


def multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The fused a * b + c of float32 arrays, rounded once, which NumPy does not have.

    The product is exact in float64. Their sum is rounded to odd there (a last bit that is lost makes the last bit kept
    1), after which rounding to float32 cannot go wrong (Boldo and Melquiond, IEEE Transactions on Computers 57, 2008).
    """
    product, addend = a.astype(np.float64) * b, np.asarray(c, np.float64)
    total = product + addend
    part = total - product  # Knuth's two-sum: what rounding took from the sum
    lost = (product - (total - part)) + (addend - part)
    bits = np.ascontiguousarray(total).view(np.int64)
    away = np.where((lost > 0) == (total > 0), 1, -1)
    odd = np.where((lost != 0) & (bits & 1 == 0), bits + away, bits)
    return odd.view(np.float64).reshape(total.shape).astype(np.float32)


def _check_finite(x: np.ndarray, type_name: str) -> None:
    if not np.isfinite(x).all():
        raise ValueError("NaN or infinity cannot be stored")
    if type_name in SCALED_TYPES and np.abs(x).max(initial=0) > largest_magnitude(type_name):
        raise ValueError(f"a value is too large for {type_name}")


def _blocks(x: np.ndarray, block_size: int) -> list[np.ndarray]:
    return [x[..., start : start + block_size] for start in range(0, x.shape[-1], block_size)]


def _join(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    mantissas, codes = zip(*parts, strict=True)
    return np.concatenate(mantissas, axis=-1), np.concatenate(codes, axis=-1)


def _nearest_bfp(block: np.ndarray, mantissa_bits: int) -> tuple[np.ndarray, np.ndarray]:
    largest_mantissa = 2 ** (mantissa_bits - 1) - 1
    block = block.astype(np.float64)
    largest = np.abs(block).max(axis=-1, keepdims=True)
    stored = largest >= 2.0**-126  # below: subnormal or zero, the whole block becomes zero
    exponent = np.frexp(largest)[1] - 1  # floor(log2(largest)): frexp's fraction lies in [1/2, 1)
    quotient = np.ldexp(block, -(exponent - (mantissa_bits - 2)))  # x / step, exact in float64
    rounded = np.clip(np.rint(quotient), -largest_mantissa, largest_mantissa)  # rint rounds half to even
    codes = np.where(stored, exponent + EXPONENT_BIAS, 0).astype(np.uint8)
    return np.where(stored, rounded, 0).astype(np.int8), codes


def _nearest_scaled(block: np.ndarray, mantissa_bits: int) -> tuple[np.ndarray, np.ndarray]:
    largest_mantissa = np.float32(2 ** (mantissa_bits - 1) - 1)
    scale = np.abs(block).max(axis=-1, keepdims=True) / largest_mantissa
    above = np.searchsorted(_SCALES, scale)  # the first code whose scale is as large
    below = np.maximum(above, 1) - 1
    exact, low, high = scale.astype(np.float64), _SCALES[below].astype(np.float64), _SCALES[above].astype(np.float64)
    nearer_above = (high - exact < exact - low) | ((high - exact == exact - low) & (above % 2 == 0))
    codes = np.where(nearer_above, above, below).astype(np.uint8)
    with np.errstate(divide="ignore", invalid="ignore"):
        rounded = np.clip(np.rint(block / scale), -largest_mantissa, largest_mantissa)
    return np.where(codes == 0, 0, rounded).astype(np.int8), codes


def _round(units: np.ndarray, mantissa_bits: int) -> np.ndarray:
    """Of the whole range of mantissas, the nearest."""
    half = 2 ** (mantissa_bits - 1)
    return np.rint(np.clip(units, np.float32(-half), np.float32(half - 1)))


def _sum_of_squares(errors: np.ndarray) -> np.ndarray:
    """float32 errors [..., n] -> sum of their squares: 16 fused partial sums, channel c adding to sum c % 16, which are
    then added in halves: 8, 4, 2, 1."""
    errors = np.pad(errors, [(0, 0)] * (errors.ndim - 1) + [(0, -errors.shape[-1] % 16)])
    sums = np.zeros((*errors.shape[:-1], 16), np.float32)
    for start in range(0, errors.shape[-1], 16):
        part = errors[..., start : start + 16]
        sums = multiply_add(part, part, sums)
    for half in (8, 4, 2, 1):
        sums = sums[..., :half] + sums[..., half : 2 * half]
    return sums[..., 0]


def _exponents(block: np.ndarray, mantissa_bits: int) -> np.ndarray:
    """BFP: float32 block [..., n] -> exponents uint8 [...]: floor(log2 of the largest), or one less where that lowers
    the sum of squared errors of nearest rounding, and is not below 1."""
    largest = np.abs(block).max(axis=-1)
    exponent = np.where(largest >= 2.0**-126, np.frexp(largest)[1] - 1 + EXPONENT_BIAS, 0)
    units = np.ldexp(block, (mantissa_bits - 2 + EXPONENT_BIAS - exponent)[..., None])  # of the larger step
    own, halved = (_sum_of_squares(u - _round(u, mantissa_bits)) for u in (units, 2 * units))
    smaller = (halved < 4 * own) & (exponent > 1)  # errors of the second are in half the unit
    return np.where(smaller, exponent - 1, exponent).astype(np.uint8)


def _scale_codes(block: np.ndarray, mantissa_bits: int) -> np.ndarray:
    """SBFP: float32 block [..., n] -> scale bytes uint8 [...]. The largest value, the first of equal ones, is to take
    the lowest mantissa, -2^(m-1): that gives the sign; the magnitude is the scale next above, or next below where that
    lowers the sum of squared errors."""
    place = np.abs(block).argmax(axis=-1)[..., None]
    largest = np.take_along_axis(block, place, axis=-1)[..., 0]
    above = np.searchsorted(_SCALES, np.abs(largest) / np.float32(2 ** (mantissa_bits - 1)))
    above = np.minimum(above, len(_SCALES) - 1).astype(np.uint8)
    sign = np.where((largest > 0) & (above > 0), _SIGN, 0).astype(np.uint8)
    sums = []
    for magnitude in (above, np.maximum(above, 1) - 1):
        step, inverse = _scaled_steps(sign | magnitude.astype(np.uint8))
        units = block * inverse[..., None]
        sums.append(_sum_of_squares(units - _round(units, mantissa_bits)) * (step * step))
    lower = (above > 1) & (sums[1] < sums[0])
    return sign | np.where(lower, above - 1, above).astype(np.uint8)


def _scaled_steps(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps and their float32 reciprocals, 0 for the scale byte 0."""
    step = decode_scales(codes)
    return step, np.divide(np.float32(1), step, out=np.zeros_like(step), where=step != 0)


def _steps(codes: np.ndarray, type_name: str) -> tuple[np.ndarray, np.ndarray]:
    """What y is divided by, float32, 0 for blocks of zeros; and what it is multiplied by, float64 for BFP, whose
    reciprocals may be beyond float32 while all products that count are exact."""
    if type_name in SCALED_TYPES:
        return _scaled_steps(codes)
    power = codes.astype(np.int32) - EXPONENT_BIAS - (MANTISSA_BITS[type_name] - 2)
    return np.where(codes == 0, 0, np.ldexp(1.0, power)).astype(np.float32), np.ldexp(1.0, -power)


def _times(y: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    return (y * inverse).astype(np.float32)
