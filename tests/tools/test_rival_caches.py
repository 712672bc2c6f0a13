"""The caches of 2025 and 2026 that this project is compared with: against slow definitions and known tables."""

import math

import gguf
import numpy as np
import pytest
import torch
from simulated_caches import SCHEMES
from simulated_caches.kvarn import even_deviations
from simulated_caches.oscar import Oscar, bit_reversed
from simulated_caches.scheme import LayerTensors, hadamard, random_hadamard
from simulated_caches.squat import Squat
from simulated_caches.turboquant import centroids
from simulated_support import HEAD_DIM, N, fitted, found, layer_of, on_grid, turned, with_window


def test_centroids_of_known_laws():
    """Would catch a wrong exponent of the density or moment, and Lloyd's steps that stop early.

    A coordinate of a unit vector is uniform in 3 dimensions, and normal in many: J. Max's table (1960).
    """
    np.testing.assert_allclose(centroids(3, 4), (2 * np.arange(16) + 1) / 16 - 1, atol=1e-6)
    normal = np.array([0.2451, 0.7560, 1.3439, 2.1520])
    np.testing.assert_allclose(centroids(100_000, 3) * 100_000**0.5, [*-normal[::-1], *normal], atol=3e-4)


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("n_bits", [3, 4])
def test_turboquant_takes_the_nearest_direction_and_keeps_the_norm(n_bits, side):
    """Would catch a rotation that is not undone, centroids of another scale, and a norm that is not corrected."""
    x = layer_of(1).side(side)
    stored = SCHEMES[f"turboquant-{n_bits}"].store(layer_of(1), side).decoded
    torch.testing.assert_close(stored.norm(dim=-1), x.norm(dim=-1), rtol=1e-3, atol=0)
    rotation, points = random_hadamard(HEAD_DIM), torch.tensor(centroids(HEAD_DIM, n_bits)).float()
    for t in (0, 7, 299):
        direction = x[1, t] / x[1, t].norm() @ rotation
        nearest = torch.stack([points[(points - value).abs().argmin()] for value in direction])
        got = stored[1, t] / stored[1, t].norm() @ rotation
        torch.testing.assert_close(got, nearest / nearest.norm(), atol=1e-5, rtol=1e-5)


def test_vllm_rounds_values_plainly_and_leaves_outer_layers():
    """Would catch values that are rotated, and layers that are stored though they should be exact, or the reverse."""
    layer, scheme = layer_of(1), SCHEMES["turboquant-vllm-3"]
    torch.testing.assert_close(scheme.store(layer, "v").decoded, on_grid(layer.v, 3))
    assert [scheme.in_layer(i, 7).name for i in range(7)] == ["f16"] * 2 + [scheme.name] * 3 + ["f16"] * 2
    assert [scheme.in_layer(i, 3).name for i in range(3)] == ["f16", scheme.name, "f16"]
    assert scheme.in_layer(0, 7).store(layer, "k").bits == 16


def test_saw_int4_rotates_keys_alone():
    """Would catch a rotation of values, which the recipe leaves out, and grids that are not a head's."""
    layer, matrix = layer_of(2), hadamard(HEAD_DIM)
    torch.testing.assert_close(SCHEMES["saw-int4"].store(layer, "k").decoded, on_grid(layer.k @ matrix, 4) @ matrix)
    torch.testing.assert_close(SCHEMES["saw-int4"].store(layer, "v").decoded, on_grid(layer.v, 4))


def slow_even_deviations(tile: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """KVarN's loop, with one scale after the other: of rows [rows] and of columns [columns]."""
    rows, columns = np.zeros(len(tile)), np.zeros(tile.shape[1])

    def now():
        return tile / np.exp(rows)[:, None] / np.exp(columns)

    def imbalance():
        return sum(std.max() / std.min() for std in (now().std(0, ddof=1), now().std(1, ddof=1)))

    best = imbalance(), rows.copy(), columns.copy()
    for _ in range(16):
        columns = np.clip(columns + np.log(now().std(0, ddof=1)), -0.3, 10)
        rows = np.clip(rows + np.log(now().std(1, ddof=1)), -0.3, 10)
        if imbalance() <= best[0]:
            best = imbalance(), rows.copy(), columns.copy()
    return np.exp(best[1]), np.exp(best[2])


@pytest.mark.parametrize("size", [0.1, 5.0])  # at 0.1 the least scale, exp(-0.3), is reached
def test_kvarn_evens_deviations_as_its_loop(size, rng):
    """Would catch axes in the wrong order, biased deviations, or the last round in the place of the best."""
    tile = size * rng.standard_normal((8, 12)) * np.exp(rng.standard_normal((8, 1)) + rng.standard_normal(12))
    rows, columns = even_deviations(torch.tensor(tile)[None])
    expected = slow_even_deviations(tile)
    np.testing.assert_allclose(rows[0, :, 0], expected[0], rtol=1e-9)
    np.testing.assert_allclose(columns[0, 0], expected[1], rtol=1e-9)


@pytest.mark.parametrize("side", ["k", "v"])
def test_kvarn_stores_full_tiles_but_the_first(side):
    """Would catch a stored first tile, a tile that is found too early, and grids along the wrong axis."""
    layer, n_bits = layer_of(3), {"k": 4, "v": 2}[side]
    x, stored = layer.side(side), SCHEMES["kvarn-2"].store(layer, side)
    exact = x[0].half().float()
    torch.testing.assert_close(found(stored, x, 0, 255), exact[:256], atol=0, rtol=0)
    tile = (x[0, 128:256] @ hadamard(HEAD_DIM)).numpy().astype(np.float64)
    tile = tile.T if side == "k" else tile
    rows, columns = slow_even_deviations(tile)
    even = tile / rows[:, None] / columns
    low = even.min(1, keepdims=True)
    step = (even.max(1, keepdims=True) - low) / (2**n_bits - 1)
    scale, zero, other = (np.float16(x) for x in (rows[:, None] * step, rows[:, None] * low, columns))
    decoded = (np.round((even - low) / step) * scale + zero) * other.astype(np.float64)
    decoded = torch.tensor(decoded.T if side == "k" else decoded).float() @ hadamard(HEAD_DIM)
    expected = torch.cat([exact[:128], decoded, exact[256:]])
    torch.testing.assert_close(found(stored, x, 0, 299), expected, atol=1e-3, rtol=0)


def test_ik_q4_0_refits_the_scale_of_q4_0():
    """Would catch other integers than q4_0's, weights other than x^2, and a head that is not turned whole."""
    x = layer_of(4, n=10, head_dim=128).v
    blocks = (x @ hadamard(128)).reshape(-1, 32).numpy()
    packed = gguf.quants.quantize(blocks, gguf.GGMLQuantizationType.Q4_0)[:, 2:]
    q = np.concatenate([packed & 15, packed >> 4], 1).astype(np.float64) - 8
    d = (blocks**3 * q).sum(1) / ((blocks * q) ** 2).sum(1)
    expected = torch.tensor(np.float16(d).astype(np.float64)[:, None] * q).float().reshape(x.shape) @ hadamard(128)
    stored = SCHEMES["ik_q4_0+hadamard"].store(layer_of(4, n=10, head_dim=128), "v")
    torch.testing.assert_close(stored.decoded, expected, atol=2e-3, rtol=0)


def test_exl3_reads_midpoints():
    """Would catch a rounding grid in the place of midpoints, and the end that falls outside of 0 .. 15."""
    turned_block = torch.linspace(-1, 1, 32)
    block = (3 * turned_block @ hadamard(32))[None]
    got = SCHEMES["exl3-4"].decode(block)[0] @ hadamard(32) / 3
    expected = [(min(math.floor(8 * v + 8 + 1e-6), 15) - 7.5) / 8 for v in turned_block.tolist()]
    torch.testing.assert_close(got, torch.tensor(expected), atol=1e-3, rtol=0)


def test_oscar_rotates_by_what_attention_looks_at():
    """Would catch a covariance of the wrong tensor or weights, and factors in another order."""
    assert bit_reversed(8).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]
    spread = torch.tensor([1.0, 8.0, 2.0, 4.0])  # queries' deviations by channel
    eye = torch.eye(4)[None]
    v = eye * torch.tensor([9.0, 0.01, 1.5, 1.0])  # token t is one value, at channel t
    sample = LayerTensors((eye * spread).repeat(2, 1, 1), eye, eye, v, turned, 1.0)
    # Channels by eigenvalue, ascending: of queries 1 4 16 64, of values with the weights 1 64 4 16: 81 0.006 9 16.
    for side, ascending in (("k", [0, 2, 3, 1]), ("v", [1, 2, 3, 0])):
        # The largest, second, third and least go to places 0 2 1 3.
        expected = (torch.eye(4)[:, ascending] @ hadamard(4))[:, [3, 1, 2, 0]]
        rotation = Oscar().fit(sample, side)._rotation
        assert rotation is not None
        torch.testing.assert_close((rotation.T @ expected).abs(), torch.eye(4), atol=1e-5, rtol=0)


def test_squat_carries_errors_to_where_queries_do_not_see_them():
    """Would catch a carried error of the wrong sign or size, and rounding that is not KIVI's without it."""
    layer = layer_of(5)
    n_full = N // 32 * 32
    plain = Squat(torch.eye(HEAD_DIM).expand(2, -1, -1)).store(layer, "k").decoded[:, :n_full]
    groups = layer.k[:, :n_full].unflatten(1, (-1, 32)).transpose(2, 3)
    torch.testing.assert_close(plain, on_grid(groups, 4).transpose(2, 3).flatten(1, 2))
    # Channels i and i + 32 meet queries only as their difference, so that the second takes the first's error.
    pairs = torch.cat([torch.eye(32), -torch.eye(32)], 1)
    metric = torch.eye(HEAD_DIM) + 1e4 * pairs.T @ pairs
    carried = Squat(metric.expand(2, -1, -1)).store(layer, "k").decoded[:, :n_full]
    torch.testing.assert_close(carried[..., :32], plain[..., :32])
    error = plain[..., :32] - layer.k[:, :n_full, :32]
    moved = layer.k[:, :n_full, 32:] + error * 1e4 / (1e4 + 1)
    expected = on_grid(moved.unflatten(1, (-1, 32)).transpose(2, 3), 4).transpose(2, 3).flatten(1, 2)
    off_by_a_step = (carried[..., 32:] - expected).abs() > 1e-4  # where sums fall on either side of a tie
    assert off_by_a_step.float().mean() < 1e-3


@pytest.mark.parametrize(
    "name, side, bits",
    [
        ("turboquant-4", "k", 4.25), ("turboquant-3", "v", 3.25),
        ("turboquant-vllm-4", "k", 4.25), ("turboquant-vllm-3", "v", 3.5), ("saw-int4", "k", 4.5),
        ("ik_q4_0+hadamard", "v", 4.5), ("exl3-4", "k", 4.5), ("oscar-4", "k", 4.5), ("oscar-4", "v", 4.5),
        # three f16 numbers for a channel (keys) or token (values) and its counterpart, in tiles of 64 by 128
        ("kvarn-4", "k", with_window(4 + 16 * (2 * 64 + 128) / (64 * 128), lambda t: max(t // 128 * 128 - 128, 0))),
        ("kvarn-2", "v", with_window(2 + 16 * (64 + 2 * 128) / (64 * 128), lambda t: max(t // 128 * 128 - 128, 0))),
        ("squat-4", "k", with_window(5, lambda t: t // 32 * 32)), ("squat-4", "v", with_window(5, lambda t: t - 32)),
    ],
)  # fmt: skip
def test_all_bits_are_counted(name, side, bits):
    """Would catch norms, scales, zero points, tiles or windows that are left out of the count."""
    assert fitted(name, side).store(layer_of(9), side).bits == pytest.approx(bits)
