"""d-Matrix's own cast to BFP, the definition of the nearest encoder, and where it is a right answer."""

import functools
import importlib
import importlib.util
import sys
import types

import numpy as np
import pytest


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


def dmx_cast(x: np.ndarray, mantissa_bits: int, block_size: int) -> np.ndarray:
    """float32 x [n, d] cast by d-Matrix's BFP[m|8]{n}(SN) along the last axis."""
    import torch

    cast = dmx_format().Format.from_shorthand(f"BFP[{mantissa_bits}|8]{{{block_size}}}(SN)")
    return cast.cast(torch.from_numpy(x), -1).numpy()


def dmx_is_exact(x: np.ndarray, mantissa_bits: int, block_size: int) -> np.ndarray:
    """bool [n, d]: where d-Matrix's cast is a right answer.

    It adds 6 * 2^e to x in float32 and rounds the sum. The addition errs by up to 2^(e - 22), that is 2^(m - 24) steps,
    so inputs that close to a tie, exact ties aside, are rounded twice; and 6 * 2^e overflows from a block maximum of
    2^126 on. Subnormal maxima give it no exponent.
    """
    exact = np.empty(x.shape, bool)
    for start in range(0, x.shape[1], block_size):
        block = np.abs(x[:, start : start + block_size]).astype(np.float64)
        largest = block.max(axis=1, keepdims=True)
        quotient = np.ldexp(block, mantissa_bits - 2 - (np.frexp(largest)[1] - 1))
        from_tie = np.abs(quotient - np.floor(quotient) - 0.5)
        near_tie = (from_tie > 0) & (from_tie <= 2.0 ** (mantissa_bits - 24))
        exact[:, start : start + block_size] = ~near_tie & (largest >= 2.0**-126) & (largest < 2.0**126)
        exact[:, start : start + block_size] |= largest == 0
    return exact
