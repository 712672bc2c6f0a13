"""ksort_linear against float64, at every kernel level."""

import numpy as np
import pytest
import torch

from ksort_gguf import native, native_pool

TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def product(pool, weights: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    type_name = next(name for name, dtype in TYPES.items() if dtype == weights.dtype)
    matrix = native_pool.Weights(
        type_name, *weights.shape, weights.data_ptr(), None if bias is None else bias.data_ptr()
    )
    y = torch.full((len(x), len(weights)), torch.nan)
    pool.linear(matrix, x.data_ptr(), y.data_ptr(), len(x))
    return y


def bound(weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """|error| of a float32 sum of n products in any order: at most n + 1 roundings, each 2^-24 of the magnitudes."""
    magnitudes = x.double().abs() @ weights.double().abs().T
    return (weights.shape[1] + 1) * 2.0**-24 * magnitudes + 1e-30


@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("n_in", [1, 7, 16, 63, 64, 129, 576, 1100])
@pytest.mark.parametrize("n_rows", [1, 2, 3, 4, 5, 9, 29])
def test_product_is_within_the_bound_of_float64(level, type_name, n_in, n_rows):
    """Catches wrong tails, panels and blocks of rows, conversions of f16 and bf16, bias, and outputs left unwritten."""
    generator = torch.Generator().manual_seed(n_in * 10 + n_rows)
    weights = torch.randn((37, n_in), generator=generator).to(TYPES[type_name])
    x, bias = torch.randn((n_rows, n_in), generator=generator), torch.randn(37, generator=generator)
    with native_pool.Pool(2) as pool:
        y = product(pool, weights, x, bias)
    exact = x.double() @ weights.double().T + bias.double()
    assert ((y.double() - exact).abs() <= bound(weights, x) + 2.0**-23 * exact.abs()).all()


@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize("n_rows", [1, 2, 70])
def test_many_parts_give_the_same_as_one_thread(n_threads, n_rows):
    """Catches parts that overlap or leave gaps, and sums that depend on where outputs are cut: about 30 parts."""
    weights, x = torch.randn(999, 1001).half(), torch.randn(n_rows, 1001)
    with native_pool.Pool(1) as one, native_pool.Pool(n_threads) as many:
        assert torch.equal(product(many, weights, x), product(one, weights, x))


def test_activations_beyond_f16_stay_finite(level):
    """Catches activations rounded to the weights' type: 1e6 is infinite in f16, and comes out of real models."""
    weights, x = torch.full((8, 40), 0.5).half(), torch.full((1, 40), 1e6)
    with native_pool.Pool(1) as pool:
        np.testing.assert_allclose(product(pool, weights, x).numpy(), 2e7, rtol=1e-6)


@pytest.mark.parametrize(
    ("field", "value", "status"),
    [
        ("type", 5, "KSORT_ERR_TYPE"),
        ("n_out", 0, "KSORT_ERR_ARGUMENT"),
        ("n_in", 0, "KSORT_ERR_ARGUMENT"),
        ("n_in", 2**62, "KSORT_ERR_ARGUMENT"),
        ("n_rows", 0, "KSORT_ERR_ARGUMENT"),
        ("x_row_stride", 7, "KSORT_ERR_ARGUMENT"),
        ("y_row_stride", 3, "KSORT_ERR_ARGUMENT"),
        ("y_row_stride", 2**63, "KSORT_ERR_ARGUMENT"),
        ("struct_size", 8, "KSORT_ERR_STRUCT_SIZE"),
    ],
)
def test_bad_arguments(field, value, status):
    """Catches reads and writes out of bounds for arguments that make no sense."""
    binding = native.loaded()
    weights, x, y = torch.zeros(4, 8), torch.zeros(1, 8), torch.full((1, 4), 7.0)
    args = native_pool.Weights("f32", 4, 8, weights.data_ptr()).struct
    args.x, args.y = (binding.ffi.cast("float *", t.data_ptr()) for t in (x, y))
    args.n_rows = 1
    setattr(args, field, value)
    assert binding.lib.ksort_linear(args, 0, 1) == getattr(binding.lib, status)
    assert binding.lib.ksort_linear(args, 1, 1) != binding.lib.KSORT_OK
    assert (y == 7).all()
