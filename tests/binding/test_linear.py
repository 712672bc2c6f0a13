"""ksort_linear against float64, at every kernel level."""

import numpy as np
import pytest
import torch
from native_support import drawn

from ksort_gguf.binding.ffi import loaded
from ksort_gguf.binding.rows import FloatRows
from ksort_gguf.binding.run import Linear, Pool

TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def product(pool: Pool, weights: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    y = torch.full((len(x), len(weights)), torch.nan)
    pool.run([Linear(weights, bias).call(pool, FloatRows(x), FloatRows(y))])
    return y


def bound(weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """|error| of a float32 sum of n products in any order: at most n + 1 roundings, each 2^-24 of the magnitudes."""
    magnitudes = x.double().abs() @ weights.double().abs().T
    return (weights.shape[1] + 1) * 2.0**-24 * magnitudes + 1e-30


@drawn(
    30, type_name=list(TYPES), n_in=[1, 7, 16, 63, 64, 129, 576, 1100], n_rows=[1, 2, 3, 4, 5, 9, 29],
    n_out=[1, 5, 37], gaps=[False, True],
)  # fmt: skip
def test_product_is_within_the_bound_of_float64(level, type_name, n_in, n_rows, n_out, gaps):
    """Catches wrong tails, panels and blocks of rows, conversions of f16 and bf16, bias, outputs left unwritten, and
    rows taken for adjacent that are not: what lies between rows of y stays."""
    generator = torch.Generator().manual_seed(n_in * 10 + n_rows)
    weights = torch.randn((n_out, n_in), generator=generator).to(TYPES[type_name])
    x, bias = torch.randn((n_rows, n_in + 3), generator=generator), torch.randn(n_out, generator=generator)
    x = x[:, :n_in] if gaps else x[:, :n_in].contiguous()
    whole = torch.full((n_rows, n_out + 5 * gaps), torch.nan)
    y = whole[:, :n_out]
    with Pool(2) as pool:
        pool.run([Linear(weights, bias).call(pool, FloatRows(x), FloatRows(y))])
    exact = x.double() @ weights.double().T + bias.double()
    assert ((y.double() - exact).abs() <= bound(weights, x) + 2.0**-23 * exact.abs()).all()
    assert whole[:, n_out:].isnan().all()


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_many_parts_give_the_same_as_one_thread(n_threads):
    """Catches parts that overlap or leave gaps, and sums that depend on where outputs are cut: about 30 parts."""
    weights = torch.randn(999, 1001).half()
    with Pool(1) as one, Pool(n_threads) as many:
        for n_rows in (1, 2, 70):
            x = torch.randn(n_rows, 1001)
            assert torch.equal(product(many, weights, x), product(one, weights, x)), n_rows


def test_activations_beyond_f16_stay_finite(level):
    """Catches activations rounded to the weights' type: 1e6 is infinite in f16, and comes out of real models."""
    weights, x = torch.full((8, 40), 0.5).half(), torch.full((1, 40), 1e6)
    with Pool(1) as pool:
        np.testing.assert_allclose(product(pool, weights, x).numpy(), 2e7, rtol=1e-6)


@pytest.mark.parametrize("type_name", TYPES)
def test_runs_of_the_smallest_and_largest(level, type_name):
    """Catches conversions that are only right for ordinary numbers: subnormal f16 and bf16, and their largest."""
    dtype = TYPES[type_name]
    info = torch.finfo(dtype)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for value, factor in ((info.max, 2.0**-120), (smallest, 2.0**100), (-info.smallest_normal, 2.0**100)):
        weights, x = torch.full((5, 48), value, dtype=dtype), torch.full((2, 48), factor)
        with Pool(1) as pool:
            y = product(pool, weights, x)
        exact = 48 * weights[0, 0].double() * factor
        assert exact != 0
        assert ((y.double() - exact).abs() <= 49 * 2.0**-24 * exact.abs()).all(), value


BAD_FIELDS = [
    ("type", 5, "TYPE"),
    ("n_out", 0, "ARGUMENT"),
    ("n_in", 0, "ARGUMENT"),
    ("n_in", 2**62, "ARGUMENT"),
    ("n_rows", 0, "ARGUMENT"),
    ("x_row_stride", 7, "ARGUMENT"),
    ("y_row_stride", 3, "ARGUMENT"),
    ("y_row_stride", 2**63, "ARGUMENT"),
    ("struct_size", 8, "STRUCT_SIZE"),
]


@pytest.mark.parametrize(("field", "value", "status"), BAD_FIELDS)
def test_bad_arguments(field, value, status):
    """Catches reads and writes out of bounds for arguments that make no sense."""
    binding = loaded("ksort_run")
    x, y = torch.zeros(2, 8), torch.full((2, 4), 7.0)
    linear = Linear(torch.zeros(4, 8))
    with Pool(1) as pool:
        linear.call(pool, FloatRows(x), FloatRows(y))
    setattr(linear.struct, field, value)
    assert binding.lib.ksort_linear(linear.struct, 0, 1) == getattr(binding.lib, f"KSORT_ERR_{status}")
    assert binding.lib.ksort_linear(linear.struct, 1, 1) != binding.lib.KSORT_OK
    assert (y == 7).all()
