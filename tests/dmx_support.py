"""d-Matrix's own casts to BFP and SBFP, the definition of the nearest encoders, and where they are right answers."""

import functools
import importlib
import importlib.util
import sys
import types

import numpy as np
import pytest

from ksort_gguf.reference_blocks import MANTISSA_BITS, SCALED_TYPES, largest_magnitude


@functools.cache
def dmx_format():
    """The module dmx.compressor.numerical.format of dmx-compressor, without its parent packages.

    Those import an old transformers; the format module alone needs only torch, parse and bidict. Skips the test if the
    package is not installed.
    """
    root = importlib.util.find_spec("dmx")
    if root is None:
        pytest.skip("needs: pip install --no-deps dmx-compressor==0.1.11 parse bidict")
    folder = next(iter(root.submodule_search_locations))
    for name in ("dmx", "dmx.compressor", "dmx.compressor.numerical"):
        stub = types.ModuleType(name)
        stub.__path__ = [folder + name.removeprefix("dmx").replace(".", "/")]
        sys.modules[name] = stub
    return importlib.import_module("dmx.compressor.numerical.format")


@functools.cache
def dmx_cast_of(type_name: str, block_size: int):
    """Their BFP[m|8]{n}(SN), or their SBFP of m-bit integers with unsigned scales of five and two bits, bias 15."""
    bits = MANTISSA_BITS[type_name]
    if type_name not in SCALED_TYPES:
        return dmx_format().Format.from_shorthand(f"BFP[{bits}|8]{{{block_size}}}(SN)")
    cast = dmx_format().Format.from_shorthand(f"SBFP<XP[{bits},0](CSN)><FP[0|5|2,15](_N)>{{{block_size}}}")
    cast.scaler_format_exponent_bias_determined = True  # else each cast puts a bias of its own in its place
    return cast


def dmx_cast(x: np.ndarray, type_name: str, block_size: int) -> np.ndarray:
    """float32 x [n, d] cast by d-Matrix along the last axis."""
    import torch

    return dmx_cast_of(type_name, block_size).cast(torch.from_numpy(x), -1).numpy()


def dmx_is_exact(x: np.ndarray, type_name: str, block_size: int) -> np.ndarray:
    """bool [n, d]: where d-Matrix's cast is a right answer.

    BFP: it adds 6 * 2^e to x in float32 and rounds the sum. The addition errs by up to 2^(e - 22), that is 2^(m - 24)
    steps, so inputs that close to a tie, exact ties aside, are rounded twice; and 6 * 2^e overflows from a block
    maximum of 2^126 on. Subnormal maxima give it no exponent.
    SBFP: as far as the largest scale reaches; ours refuses what is larger. Theirs leaves a block as it is whose largest
    value is so small that a mantissa's share of it is 0 in float32.
    """
    exact = np.empty(x.shape, bool)
    for start in range(0, x.shape[1], block_size):
        block = np.abs(x[:, start : start + block_size]).astype(np.float64)
        largest = block.max(axis=1, keepdims=True)
        if type_name in SCALED_TYPES:
            share = (largest / (2 ** (MANTISSA_BITS[type_name] - 1) - 1)).astype(np.float32)
            is_left = (largest > 0) & (share == 0)
            exact[:, start : start + block_size] = (largest <= largest_magnitude(type_name)) & ~is_left
            continue
        bits = MANTISSA_BITS[type_name]
        quotient = np.ldexp(block, bits - 2 - (np.frexp(largest)[1] - 1))
        from_tie = np.abs(quotient - np.floor(quotient) - 0.5)
        near_tie = (from_tie > 0) & (from_tie <= 2.0 ** (bits - 24))
        exact[:, start : start + block_size] = ~near_tie & (largest >= 2.0**-126) & (largest < 2.0**126)
        exact[:, start : start + block_size] |= largest == 0
    return exact
