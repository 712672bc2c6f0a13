"""ksort_rms_norm and ksort_swiglu against float64, at every kernel level."""

import numpy as np
import pytest
import torch
from native_support import drawn

from ksort_gguf.binding.ffi import loaded
from ksort_gguf.binding.rows import FloatRows
from ksort_gguf.binding.run import Pool, RmsNorm, SwiGlu

SIZES = [1, 7, 16, 33, 64, 100, 576, 1001]


def between(values: torch.Tensor, gap: int) -> torch.Tensor:
    """The same rows, `gap` NaNs behind each."""
    room = torch.full((len(values), values.shape[1] + gap), torch.nan)
    room[:, : values.shape[1]] = values
    return room[:, : values.shape[1]]


@drawn(24, n=SIZES, heads=[1, 1, 2, 5], n_rows=[1, 2, 9], added_scale=[None, 1.0, 0.22, -3.0], gap=[0, 6])
def test_norm_is_within_the_bound_of_float64(level, n, heads, n_rows, added_scale, gap):
    """Catches wrong tails, a mean over padding or over all heads, rows that no thread did, a sum that is not kept, or
    scaled before it is rounded, and strides taken from other rows. added_scale None: nothing is added."""
    generator = torch.Generator().manual_seed(n)
    x, added = (torch.randn((n_rows, heads * n), generator=generator) * 30 for _ in range(2))
    gain = torch.randn(n, generator=generator)
    total = x if added_scale is None else x + added * torch.tensor(added_scale)
    x, added, y = between(x, gap), between(added, 2 * gap), between(torch.full_like(x, torch.nan), 3 * gap)
    norm = RmsNorm(gain, 1e-5, heads=heads, **({} if added_scale is None else {"added_scale": added_scale}))
    with Pool(3) as pool:
        pool.run([norm.call(pool, FloatRows(x), None if added_scale is None else FloatRows(added), FloatRows(y))])
    assert torch.equal(x, total)
    wide = total.double().view(n_rows, heads, n)
    exact = wide / (wide.square().mean(dim=2, keepdim=True) + 1e-5).sqrt() * gain.double()
    exact = exact.view(n_rows, heads * n)
    assert ((y - exact).abs() <= (n / 2 + 8) * 2.0**-24 * exact.abs()).all()  # n roundings of the sum, halved by sqrt


@drawn(8, n=[64, 100], heads=[1, 4], with_sum=[False, True])
def test_norm_in_place(level, n, heads, with_sum):
    """Catches rows that are written before their sum is known."""
    generator = torch.Generator().manual_seed(1)
    x, added = (torch.randn((3, heads * n), generator=generator) for _ in range(2))
    elsewhere, y = x.clone(), torch.empty_like(x)
    norm, rows = RmsNorm(torch.rand(n, generator=generator), 1e-6, heads), FloatRows(added) if with_sum else None
    with Pool(2) as pool:
        pool.run([norm.call(pool, FloatRows(elsewhere), rows, FloatRows(y))])
        in_place = FloatRows(x)
        pool.run([norm.call(pool, in_place, rows, in_place)])
    assert torch.equal(x, y)


def test_norm_of_part_of_a_row(level):
    """Catches a norm of q's heads that reaches into k, or of k's that begins at q: both stand in one row."""
    n, n_heads, n_kv_heads = 64, 3, 2
    qkv = torch.randn((4, (n_heads + 2 * n_kv_heads) * n), generator=torch.Generator().manual_seed(2))
    before = qkv.clone()
    norm = RmsNorm(torch.ones(n), 0.0, heads=n_kv_heads)
    k = FloatRows(qkv).columns(n_heads * n, (n_heads + n_kv_heads) * n)
    with Pool(2) as pool:
        pool.run([norm.call(pool, k, None, k)])
    of_k = slice(n_heads * n, (n_heads + n_kv_heads) * n)
    expected = torch.nn.functional.rms_norm(before[:, of_k].view(4, n_kv_heads, n), (n,), eps=0.0).view(4, -1)
    assert torch.allclose(qkv[:, of_k], expected, rtol=1e-5)
    before[:, of_k] = qkv[:, of_k]
    assert torch.equal(qkv, before)


@drawn(16, n=SIZES, n_rows=[1, 9], is_fused=[True, False], y_gap=[0, 3])
def test_swiglu_is_within_the_bound_of_float64(level, n, n_rows, is_fused, y_gap):
    """Catches wrong tails, gate and up mistaken for each other, a stride that is n, and exponentials that overflow.

    is_fused: gate and up are halves of one row; else they are arrays of their own."""
    rows = torch.randn((n_rows, 2 * n), generator=torch.Generator().manual_seed(n)) * 20
    rows[0, :n] = torch.linspace(-400, 400, n)  # beyond where exp is cut, at every distance
    gate, up = rows.split(n, dim=1) if is_fused else (part.contiguous() for part in rows.split(n, dim=1))
    y = between(torch.full((n_rows, n), torch.nan), y_gap)
    with Pool(3) as pool:
        pool.run([SwiGlu(n).call(pool, FloatRows(gate), FloatRows(up), FloatRows(y))])
    exact = torch.nn.functional.silu(gate.double()) * up.double()
    # exp's argument is off by 2^-24 of itself at most, up to 87; the rest is a few roundings
    assert ((y - exact).abs() <= (gate.double().abs().clamp(max=87) + 8) * 2.0**-23 * exact.abs() + 1e-33).all()


@pytest.mark.parametrize("target", ["gate", "up"])
def test_swiglu_in_place(level, target):
    """Catches a half that is overwritten before it is read."""
    rows = torch.randn((3, 200), generator=torch.Generator().manual_seed(4))
    gate, up = rows.clone().split(100, dim=1)
    y = torch.empty(3, 100)
    with Pool(2) as pool:
        pool.run([SwiGlu(100).call(pool, FloatRows(gate), FloatRows(up), FloatRows(y))])
        out = gate if target == "gate" else up
        pool.run([SwiGlu(100).call(pool, FloatRows(gate), FloatRows(up), FloatRows(out))])
    assert torch.equal(out, y)


def test_gate_and_up_apart_are_refused():
    """Catches rows of up read with gate's stride: the struct has one for both."""
    gate, up, y = torch.zeros(2, 8), torch.zeros(2, 9)[:, :8], torch.zeros(2, 8)
    with Pool(1) as pool, pytest.raises(ValueError, match="8 and 9 apart"):
        SwiGlu(8).call(pool, FloatRows(gate), FloatRows(up), FloatRows(y))


BAD_FIELDS = [
    ("n", 0, "ARGUMENT"),
    ("n_rows", 0, "ARGUMENT"),
    ("y_row_stride", 7, "ARGUMENT"),
    ("y_row_stride", 2**63, "ARGUMENT"),
    ("struct_size", 8, "STRUCT_SIZE"),
]
BAD = [(name, *bad) for name in ("rms_norm", "swiglu") for bad in BAD_FIELDS] + [
    ("rms_norm", "x_row_stride", 7, "ARGUMENT"),
    ("rms_norm", "added_row_stride", 7, "ARGUMENT"),
    ("rms_norm", "heads", 2, "ARGUMENT"),  # rows of 16 floats, 8 apart
    ("rms_norm", "heads", 2**32 - 1, "ARGUMENT"),
    ("swiglu", "row_stride", 7, "ARGUMENT"),
]


@pytest.mark.parametrize(("name", "field", "value", "status"), BAD)
def test_bad_arguments(name, field, value, status):
    """Catches reads and writes out of bounds for arguments that make no sense."""
    binding = loaded("ksort_run")
    x, other, y = (torch.zeros(2, 8) for _ in range(3))
    operation = SwiGlu(8) if name == "swiglu" else RmsNorm(torch.ones(8), 1e-5)
    y[:] = 7.0
    with Pool(1) as pool:
        operation.call(pool, FloatRows(x), FloatRows(other), FloatRows(y))
    setattr(operation.struct, field, value)
    function, of_pool = (getattr(binding.lib, f"ksort_{prefix}{name}") for prefix in ("", "pool_"))
    assert function(operation.struct, 0, 1) == getattr(binding.lib, f"KSORT_ERR_{status}")
    assert function(operation.struct, 1, 1) != binding.lib.KSORT_OK
    assert of_pool(binding.null, operation.struct) == binding.lib.KSORT_ERR_ARGUMENT
    assert (y == 7).all()


def test_calls_aim_at_their_rows():
    """Catches a struct that still points to the rows of the call before."""
    x, y = torch.randn(2, 8), torch.empty(2, 8)
    norm = RmsNorm(torch.ones(8), 0.0)
    with Pool(1) as pool:
        for row in (0, 1):
            pool.run([norm.call(pool, FloatRows(x[row : row + 1]), None, FloatRows(y[row : row + 1]))])
    np.testing.assert_allclose(y.square().mean(dim=1).numpy(), 1, rtol=1e-5)
