"""ksort_rms_norm and ksort_swiglu against float64, at every kernel level."""

import numpy as np
import pytest
import torch

from ksort_gguf import native, native_pool

SIZES = [1, 7, 16, 33, 64, 100, 576, 1001]


def rms_norm(pool, x, added, gain, epsilon):
    """x becomes x + added; returns the norm."""
    y = torch.full_like(x, torch.nan)
    norm = native_pool.RmsNorm(len(gain), gain.data_ptr(), epsilon)
    pool.rms_norm(norm, x.data_ptr(), 0 if added is None else added.data_ptr(), y.data_ptr(), len(x))
    return y


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("n_rows", [1, 9])
@pytest.mark.parametrize("with_sum", [False, True])
def test_norm_is_within_the_bound_of_float64(level, n, n_rows, with_sum):
    """Catches wrong tails, a mean over padding, rows that no thread did, and sums that are not kept."""
    generator = torch.Generator().manual_seed(n)
    x, added = (torch.randn((n_rows, n), generator=generator) * 30 for _ in range(2))
    gain = torch.randn(n, generator=generator)
    total = x + added if with_sum else x.clone()
    with native_pool.Pool(3) as pool:
        y = rms_norm(pool, x, added if with_sum else None, gain, 1e-5)
    assert torch.equal(x, total)
    wide = total.double()
    exact = wide / (wide.square().mean(dim=1, keepdim=True) + 1e-5).sqrt() * gain.double()
    assert ((y - exact).abs() <= (n / 2 + 8) * 2.0**-24 * exact.abs()).all()  # n roundings of the sum, halved by sqrt


def test_norm_in_place(level):
    """Catches rows that are written before their sum is known."""
    x = torch.randn(2, 100)
    norm = native_pool.RmsNorm(100, (gain := torch.ones(100)).data_ptr(), 0.0)
    expected = x / x.square().mean(dim=1, keepdim=True).sqrt()
    with native_pool.Pool(1) as pool:
        pool.rms_norm(norm, x.data_ptr(), 0, x.data_ptr(), 2)
    assert torch.allclose(x, expected, rtol=1e-5) and (gain == 1).all()


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("n_rows", [1, 9])
def test_swiglu_is_within_the_bound_of_float64(level, n, n_rows):
    """Catches wrong tails, gate and up mistaken for each other, and exponentials that overflow."""
    rows = torch.randn((n_rows, 2 * n), generator=torch.Generator().manual_seed(n)) * 20
    rows[0, 0] = -200.0
    rows[-1, n - 1] = 200.0
    y = torch.full((n_rows, n), torch.nan)
    with native_pool.Pool(3) as pool:
        pool.swiglu(native_pool.SwiGlu(n), rows.data_ptr(), y.data_ptr(), n_rows)
    gate, up = rows.double().split(n, dim=1)
    exact = torch.nn.functional.silu(gate) * up
    # exp's argument is off by 2^-24 of itself at most, up to 87; the rest is a few roundings
    assert ((y - exact).abs() <= (gate.abs().clamp(max=87) + 8) * 2.0**-23 * exact.abs() + 1e-33).all()


@pytest.mark.parametrize("call", ["rms_norm", "swiglu"])
@pytest.mark.parametrize(
    ("field", "value", "status"),
    [
        ("n", 0, "KSORT_ERR_ARGUMENT"),
        ("n_rows", 0, "KSORT_ERR_ARGUMENT"),
        ("y_row_stride", 7, "KSORT_ERR_ARGUMENT"),
        ("y_row_stride", 2**63, "KSORT_ERR_ARGUMENT"),
        ("struct_size", 8, "KSORT_ERR_STRUCT_SIZE"),
    ],
)
def test_bad_arguments(call, field, value, status):
    """Catches reads and writes out of bounds for arguments that make no sense."""
    binding = native.loaded()
    rows, y = torch.zeros(2, 16), torch.full((2, 8), 7.0)
    if call == "swiglu":
        operation = native_pool.SwiGlu(8)
        operation.aim(rows.data_ptr(), rows.data_ptr() + 32, y.data_ptr(), 2)
    else:
        operation = native_pool.RmsNorm(8, rows.data_ptr(), 1e-5)
        operation.aim(rows.data_ptr(), 0, y.data_ptr(), 2)
    setattr(operation.struct, field, value)
    function = getattr(binding.lib, f"ksort_{call}")
    assert function(operation.struct, 0, 1) == getattr(binding.lib, status)
    assert function(operation.struct, 1, 1) != binding.lib.KSORT_OK
    assert (
        getattr(binding.lib, f"ksort_pool_{call}")(binding.ffi.NULL, operation.struct) == binding.lib.KSORT_ERR_ARGUMENT
    )
    assert (y == 7).all()


def test_what_changes_is_aimed_at():
    """Catches a struct that still points to the rows of the call before."""
    x, y = torch.randn(2, 8), torch.empty(2, 8)
    norm = native_pool.RmsNorm(8, (gain := torch.ones(8)).data_ptr(), 0.0)
    with native_pool.Pool(1) as pool:
        for row in (0, 1):
            pool.rms_norm(norm, x[row].data_ptr(), 0, y[row].data_ptr(), 1)
    np.testing.assert_allclose(y.square().mean(dim=1).numpy(), gain[:2].numpy(), rtol=1e-5)
