"""Simulated caches: their arithmetic against peers and slow definitions, and what queries may know."""

import gguf
import numpy as np
import pytest
import torch
from simulated_caches import FLOATS, SCHEMES, qaq
from simulated_caches.attention import attend
from simulated_caches.gear import Gear
from simulated_caches.kivi import Kivi
from simulated_caches.microscaling import nvfp4, nvint4, round_to_e2m1
from simulated_caches.scheme import LayerTensors, hadamard, random_hadamard, uniform
from simulated_support import HEAD_DIM, N, fitted, found, layer_of, on_grid, turned, with_window


@pytest.mark.parametrize("name", ["q4_0", "q5_0", "q8_0"])
def test_ggml_types_bit_for_bit(name):
    """Would catch another scale, sign, rounding or tie rule than ggml's, on values that reach all of them."""
    x = np.random.default_rng(1).standard_normal((500, 32)).astype(np.float32)
    x[0] = 0
    x[1] = np.tile([-3.0, 3.0], 16)  # two of largest magnitude: the first one gives the sign
    x[2] = np.linspace(-8, 7.5, 32)  # ties
    x[3] = np.linspace(-127, 127, 32) / 2
    kind = gguf.GGMLQuantizationType[name.upper()]
    expected = gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)
    np.testing.assert_array_equal(SCHEMES[name].decode(torch.from_numpy(x)).numpy(), expected)


def test_mxfp4_equals_gguf(rng):
    """Would catch a wrong shared exponent, or elements that saturate too early."""
    x = rng.standard_normal((500, 32)).astype(np.float32) * np.exp2(rng.integers(-9, 9, (500, 1))).astype(np.float32)
    kind = gguf.GGMLQuantizationType.MXFP4
    expected = gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)
    np.testing.assert_array_equal(SCHEMES["mxfp4"].decode(torch.from_numpy(x)).numpy(), expected)


def test_mxint8_on_known_values():
    """Would catch a scale that is off by a power of two, half-up ties, and a missing clamp below 2."""
    block = torch.zeros(1, 32)
    block[0, :5] = torch.tensor([1.999, 1.0, 0.5 / 64, 1.5 / 64, -1.999])
    decoded = SCHEMES["mxint8"].decode(4 * block)[0, :5] / 4
    assert (decoded * 64).tolist() == [127, 64, 0, 2, -127]


def test_e2m1_rounds_ties_to_even_codes():
    """Would catch ties that go away from zero, and values beyond 6."""
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, -0.75, -5.0])
    assert round_to_e2m1(x).tolist() == [0, 1, 1, 2, 2, 4, 4, 6, -1, -4]


@pytest.mark.parametrize("scheme", [nvfp4(), nvint4(), nvint4(with_hadamard=True)], ids=lambda s: s.name)
def test_tensor_scale_follows_the_calibration_text(scheme):
    """Would catch a block scale that ignores the tensor scale: E4M3 holds neither 1e-6 nor 1e6."""
    layer = layer_of(1)
    expected = scheme.fit(layer, "v").store(layer, "v").decoded
    for factor in (2.0**-30, 2.0**20):
        scaled = LayerTensors(layer.q, layer.k, layer.k_before_rope, layer.v * factor, turned, 1.0)
        torch.testing.assert_close(scheme.fit(scaled, "v").store(scaled, "v").decoded, expected * factor)


def test_rotations_are_orthonormal():
    """Would catch a matrix that changes scores, or that does not undo itself."""
    torch.testing.assert_close(hadamard(64) @ hadamard(64), torch.eye(64))
    matrix = random_hadamard(32)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(32))
    assert not torch.equal(matrix, hadamard(32))


@pytest.mark.parametrize("side, size", [("k", 128), ("v", 64)])
def test_llama_cpp_rotates_whole_key_heads_and_64_channels_of_values(side, size):
    """Would catch one matrix size for both: llama.cpp takes the largest for K, 64 for V."""
    layer = layer_of(2, n=10, head_dim=128)
    matrix = torch.block_diag(*[hadamard(size)] * (128 // size))
    blocks = (layer.side(side) @ matrix).unflatten(-1, (-1, 32))
    expected = SCHEMES["q4_0"].decode(blocks).flatten(-2) @ matrix
    torch.testing.assert_close(SCHEMES["q4_0+hadamard"].store(layer, side).decoded, expected)


@pytest.mark.parametrize("name", [*SCHEMES, *FLOATS])
def test_queries_know_nothing_of_later_tokens(name):
    """Would catch scales, ranks, outliers or bits of a token that depend on tokens after the query that reads it."""
    keys, values = fitted(name, "k"), fitted(name, "v")
    now, cut = layer_of(3), 210  # inside of a group and of a window
    later = layer_of(4)
    changed = LayerTensors(
        *(torch.cat([a[:, :cut], 3 * b[:, cut:]], 1) for a, b in zip(
            (now.q, now.k, now.k_before_rope, now.v), (later.q, later.k, later.k_before_rope, later.v), strict=True)),
        turned, now.score_scale,
    )  # fmt: skip
    outputs = [attended(layer, keys, values)[:cut] for layer in (now, changed)]
    torch.testing.assert_close(outputs[0], outputs[1], atol=2e-5, rtol=1e-5)


def attended(layer, keys, values, window=0, ends=(0, 0)) -> torch.Tensor:
    n_heads, n, head_dim = layer.q.shape
    out = torch.empty(n, n_heads, head_dim)
    k, v = keys.store(layer, "k").with_exact(*ends), values.store(layer, "v").with_exact(*ends)
    attend(layer.q, layer, k, v, window, out)
    return out


@pytest.mark.parametrize("ends", [(0, 0), (20, 0), (0, 3), (150, 150)], ids=str)  # the tail, the sinks
@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("name", ["f32", "q4_0", "kivi-2"])
def test_attention_equals_its_definition(name, window, ends):
    """Would catch a wrong mask, window, head group, or token that is read as stored while it is still exact."""
    layer, scheme = layer_of(5), fitted(name, "k")
    k, v = (scheme.store(layer, side).with_exact(*ends) for side in ("k", "v"))
    out = attended(layer, scheme, scheme, window, ends)
    for t in (0, 1, 130, 131, 255, 256, 299):
        first = max(0, t + 1 - window) if window else 0
        for head in (0, 2, 5):
            seen = [found(stored, exact, head // 3, t)[first:] for stored, exact in ((k, layer.k), (v, layer.v))]
            weights = torch.softmax(seen[0] @ layer.q[head, t] * layer.score_scale, 0)
            torch.testing.assert_close(out[t, head], weights @ seen[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name, tail, sink", [("q4_0", 7, 4), ("kivi-4", 200, 0), ("kivi-4", 1, 2)])
def test_exact_ends_are_the_newest_and_the_first_tokens(name, tail, sink):
    """Would catch a tail that leaves out the query's own token, shortens the source's own window, or is not counted."""
    layer = layer_of(5)
    plain = fitted(name, "k").store(layer, "k")
    stored = plain.with_exact(tail, sink)
    token_bits = {"q4_0": 4.5, "kivi-4": 5}[name]
    bits = []
    for t in range(N // 2, N):
        by_source = t + 1 if name == "q4_0" else t // 128 * 128
        is_stored = [sink <= token < by_source and token <= t - tail for token in range(t + 1)]
        bits.append(sum(token_bits if is_so else 16 for is_so in is_stored) / (t + 1))
        if t % 25 == 0:
            exact = layer.k[0, : t + 1].half().float()
            expected = torch.where(torch.tensor(is_stored)[:, None], plain.decoded[0, : t + 1], exact)
            torch.testing.assert_close(found(stored, layer.k, 0, t), expected, atol=0, rtol=0)
    assert stored.bits == pytest.approx(sum(bits) / len(bits))


@pytest.mark.parametrize("side", ["k", "v"])
def test_kivi_equals_its_decoding_steps(side):
    """Would catch a residual window that is off by one token, or groups along the wrong axis."""
    layer, n_bits = layer_of(6), 2
    stored = Kivi(n_bits).store(layer, side)
    x, residual, packed = layer.side(side)[0], [], torch.empty(0, HEAD_DIM)
    for t in range(N):
        residual.append(x[t])
        expected = torch.cat([packed, torch.stack(residual).half().float()])
        torch.testing.assert_close(found(stored, layer.side(side), 0, t), expected)
        if side == "k" and len(residual) == 128:
            groups = torch.stack(residual).unflatten(0, (4, 32)).transpose(1, 2)  # [groups, channels, tokens]
            packed = torch.cat([packed, on_grid(groups, n_bits).transpose(1, 2).flatten(0, 1)])
            residual = []
        elif side == "v" and len(residual) == 129:
            packed = torch.cat([packed, on_grid(residual.pop(0).view(2, 32), n_bits).view(1, -1)])


def test_gear_leaves_less_error_than_its_grid_alone():
    """Would catch a low rank or outliers that are computed and not used."""
    layer = layer_of(7, n=256)
    for side in ("k", "v"):
        x = layer.side(side)
        gear = Gear(2).store(layer, side).decoded
        dim = 1 if side == "k" else 2
        grid = uniform(x.unflatten(dim, (-1, 64)), 2, dim=dim + 1).flatten(dim, dim + 1)
        assert (gear - x).square().mean() < 0.7 * (grid - x).square().mean()
        largest = x.abs() == x.abs().amax()  # an outlier, exact but for the low rank's share
        assert (gear - x)[largest].abs().item() < 0.2 * (grid - x).abs().amax()


@pytest.mark.parametrize("few, many", [("kivi-2", "kivi-4"), ("kvquant-2", "kvquant-3"), ("kvquant-3", "kvquant-4"),
                                       ("gear-2", "gear-4"), ("q4_0", "q5_0"), ("q5_0", "q8_0")])  # fmt: skip
@pytest.mark.parametrize("side", ["k", "v"])
def test_more_bits_store_more(few, many, side):
    """Would catch points, steps or clamps that do not follow the number of bits."""
    layer = layer_of(8)
    errors, bits = [], []
    for name in (few, many):
        stored = fitted(name, side).store(layer, side)
        errors.append((stored.decoded - layer.side(side)).square().mean())
        bits.append(stored.bits)
    assert errors[1] < 0.5 * errors[0] and bits[0] < bits[1]


@pytest.mark.parametrize("name", ["nvfp4", "nvint4+hadamard", "mxfp4", "kvquant-4", "os+-4"])
def test_errors_are_those_of_about_four_bits(name):
    """Would catch a decoder that forgets a shift, scale, rotation or centre."""
    layer = layer_of(8)
    for side in ("k", "v"):
        x = layer.side(side)
        error = (fitted(name, side).store(layer, side).decoded - x).square().mean() / x.square().mean()
        assert error < 0.025


@pytest.mark.parametrize(
    "name, side, bits",
    [
        ("q4_0", "k", 4.5), ("q5_0+hadamard", "v", 5.5), ("q8_0", "k", 8.5),
        ("mxint8", "k", 8.25), ("mxfp4", "k", 4.25), ("nvfp4", "v", 4.5), ("nvint4", "k", 4.5),
        ("kivi-2", "k", with_window(3, lambda t: t // 128 * 128)),
        ("kivi-4", "v", with_window(5, lambda t: t - 128)),
        # 1 channel in 64 outlying at either end; two f16 factors of 64 + 64 values for 64 * 64
        ("gear-4", "k", with_window(4 + 0.5 + 2 / 64 * 24 + 1, lambda t: t // 64 * 64)),
        ("os+-4", "k", 4.5), ("f16", "v", 16), ("f32", "k", 32),
    ],
)  # fmt: skip
def test_all_bits_are_counted(name, side, bits):
    """Would catch scales, indices or windows that are left out of the count."""
    assert fitted(name, side).store(layer_of(9), side).bits == pytest.approx(bits)


def test_bits_of_kvquant_count_outliers_and_the_exact_token():
    """Would catch a share of outliers that is assumed rather than counted: here it is 1% by construction."""
    layer = layer_of(9)  # the text that it was fitted on
    bits = fitted("kvquant-4", "k").store(layer, "k").bits
    share = 4 / N  # quantiles 0.5% and 99.5% of 300 tokens leave two beyond either
    assert bits == pytest.approx(with_window(4 + 32 * share, lambda t: t), abs=0.01)


def test_qaq_gives_bits_to_tokens_that_are_attended_to():
    """Would catch bits that do not follow the attention: one value token gets all of it, the others none."""
    layer = layer_of(10, n=40)
    q, k = torch.ones_like(layer.q), torch.zeros_like(layer.k)
    k[:, 12] = 10.0
    scheme = SCHEMES["qaq"]
    n_bits = scheme._bits(LayerTensors(q, k, k, layer.v, turned, 1.0), "v", torch.full((36,), 4.0))
    assert int(n_bits.argmax()) == 12 and n_bits[12] > n_bits[20]


@pytest.mark.parametrize("side", ["k", "v"])
def test_qaq_stores_well_what_must_be_stored_well(side, monkeypatch):
    """Would catch a grid that is off, or does not follow the bits: a tiny target asks for 8 bits."""
    monkeypatch.setitem(qaq.TARGET_ERROR, side, 1e-9)
    layer = layer_of(8)
    stored, x = SCHEMES["qaq"].store(layer, side), layer.side(side)
    assert (stored.decoded - x).square().mean() / x.square().mean() < 3e-5
    assert stored.bits == pytest.approx(8 + 32 / 64 + 3 / 128 + 2 / 64 * 24, abs=0.2)
