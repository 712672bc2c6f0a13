"""The measurement of attention alone, on tiny caches. Times themselves are never tested."""

import json

import attend_steps
import bench_attend
import numpy as np
import pytest
import read_bandwidth

from ksort_gguf.binding.cpu import attend
from ksort_gguf.binding.levels import available_levels, kernels
from ksort_gguf.binding.run import Pool

LAYER = attend_steps.Layer(4, 2, 32, "bfp12", "f16")


@pytest.fixture
def small_memory(monkeypatch):
    """Buffers of some kB in place of those that no processor's cache holds."""
    monkeypatch.setattr(bench_attend, "READ_BYTES", 1 << 16)
    monkeypatch.setattr(bench_attend, "last_cache_bytes", lambda: 4096)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = bench_attend.main([*arguments, "-t", "2"])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_table_and_json(small_memory, capsys):
    """Catches rows that are missing, turns that are not counted or counted twice, and a kernel level left changed."""
    before = kernels()
    status, out, err = run(capsys, "-H", "4", "-KH", "2", "-D", "64", "-d", "64,192,640", "-r", "2")
    assert status == 0, err
    *table, line = out.splitlines()
    summary = json.loads(line)
    levels = available_levels()[::-1]
    expected = [(level, depth) for level in levels for depth in (64, 192, 640)]
    assert [(row["level"], row["depth"]) for row in summary["rows"]] == expected
    assert [tuple(cells.split(" | ")[:2]) for cells in table[4 : 4 + len(expected)]] == [
        (f"| {level}", str(depth)) for level, depth in expected
    ]
    assert [fit["level"] for fit in summary["fits"]] == levels
    for row in summary["rows"]:
        assert row["bytes"] == row["depth"] * 2 * 64 * 2 * 4.25 / 8  # 2 KV heads, K and V
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["us"] / 1e3)
        assert 0 < row["lowest"] <= row["share"] <= row["highest"]
    assert err.count("turn ") == 3
    assert (summary["n_threads"], kernels()) == (2, before)


@pytest.mark.parametrize(
    ("k_type", "v_type", "bits"), [("bfp12", "bfp12", 8.5), ("bfp12", "f16", 20.25), ("f32", "bfp16", 40.25)]
)
def test_bytes(k_type: str, v_type: str, bits: float):
    """Catches keys counted as values, query heads counted as KV heads, and tiles of which only a part is seen."""
    layer = attend_steps.Layer(32, 8, 128, k_type, v_type)
    assert layer.step_bytes(32768) == 32768 * 8 * 128 * bits / 8
    assert layer.step_bytes(65) == layer.step_bytes(128)


def test_copies_fill_memory():
    """Catches copies that a processor's cache can hold, and more than one of a cache that is larger."""
    n_bytes = LAYER.step_bytes(64)
    assert [LAYER.n_copies(64, size) for size in (1, n_bytes, n_bytes + 1, 3 * n_bytes)] == [1, 1, 2, 3]


@pytest.mark.parametrize("depth", [1, 100, 192])
def test_steps_are_whole(depth: int):
    """Catches steps of too few tokens or of another copy's: the output must be that of cpu.attend on that copy."""
    n_tiles = attend_steps.n_tiles(depth)
    generator = np.random.default_rng(1)
    k, v = (attend_steps.Memory(LAYER, name, 2 * n_tiles, generator) for name in (LAYER.k_type, LAYER.v_type))
    outputs = []
    with Pool(2) as pool:
        for copy in (0, 1):
            caches = k.cache(depth, copy), v.cache(depth, copy)
            steps = attend_steps.DecodeSteps(LAYER, pool, depth, [caches])
            assert steps.run() > 0
            expected = attend(
                *caches, steps.q[None], depth - 1, scale=LAYER.scale, rope=LAYER.rope(), query_type=LAYER.query_type,
                cos=steps.cos, sin=steps.sin, nth=2,
            )  # fmt: skip
            np.testing.assert_allclose(steps.out, expected[0], rtol=1e-5, atol=1e-6)
            outputs.append(steps.out)
    assert np.abs(outputs[0] - outputs[1]).max() > 0.01


def test_readers_read_everything():
    """Catches a reader that skips a thread's piece, or that reads pages which were never written."""
    with Pool(2) as pool:
        readers = read_bandwidth.Readers(pool, 1 << 20)
        speeds = readers.run()
        assert min(speeds.values()) > 0
        np.testing.assert_array_equal(readers._y[0], read_bandwidth.READ_ROW)  # ones times ones, row by row
        for name in ("or of int64", "maximum of float32"):
            pieces = readers._readers[name]()
            assert len(pieces) == 2 and len(set(pieces)) == 1 and pieces[0] != 0


def test_fastest_reader_by_medians():
    """Catches a bandwidth that one lucky run decides, and the slower reader taken, which flatters the share."""
    row = bench_attend.Row("scalar", None)
    row.read_gb_s = [{"slow": speed, "fast": 3.0} for speed in (1.0, 9.0, 2.0)]
    assert list(bench_attend.reader_speeds([row]).items()) == [("fast", 3.0), ("slow", 2.0)]


def test_share_is_of_the_same_turn():
    """Catches the ratio of two medians, which noise in different turns would blur."""

    class Steps:
        depth, n_bytes = 64, 6000

    row = bench_attend.Row("scalar", Steps, us=[1.0, 2.0, 3.0], read_gb_s=[{"a": 6.0}, {"a": 12.0}, {"a": 4.0}])
    summary = row.summary("a")
    assert (summary["us"], summary["gb_s"]) == (2.0, 3.0)
    assert [summary[key] for key in ("lowest", "share", "highest")] == [0.25, 0.5, 1.0]


def test_fit():
    """Catches units mixed up, and deviations that are absolute or of the wrong sign."""
    depths = [2000, 8000, 32000]
    exact = bench_attend.fit("scalar", depths, [5 + 0.25 * depth for depth in depths])
    assert exact["ns_per_token"] == pytest.approx(250) and exact["intercept_us"] == pytest.approx(5)
    assert exact["largest_deviation"] < 1e-9
    bent = bench_attend.fit("scalar", depths, [100.0, 400.0, 3200.0])
    assert bent["largest_deviation"] > 0.1


def test_no_fit_of_two_points():
    """Catches a line through two points, which proves nothing, shown as a fit."""
    rows = [{"level": "scalar", "depth": depth, "us": 1.0 * depth} for depth in (64, 128)]
    assert bench_attend.fits(rows) == []
    (fit,) = bench_attend.fits([*rows, {"level": "scalar", "depth": 256, "us": 256.0}])
    assert fit["ns_per_token"] == pytest.approx(1000)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-d", "0"], "-d 0"),
        (["-d", "deep"], "-d deep"),
        (["-r", "0"], "-r 0"),
        (["-t", "-1"], "-t -1"),
        (["-t", "65536"], "-t 65536"),
        (["-H", "12"], "-H 12 is not a multiple of -KH 8"),
        (["-H", "0"], "-H 0"),
        (["-KH", "0"], "-KH 0"),
        (["-D", "258"], "-D 258"),
        (["-D", "8"], "-D 8"),
        (["-D", "33"], "-D 33 is odd"),
        (["--levels", "avx2048"], "--levels avx2048"),
        (["--levels", ""], "--levels "),
        (["-d", "10000000000000"], "lower the depths with -d"),
    ],
)
def test_mistakes_end_in_one_line(capsys, arguments: list[str], words: str):
    """Catches tracebacks, and mistakes found only after minutes of packing."""
    capsys.readouterr()
    assert bench_attend.main(arguments) == 1
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if not line.startswith("packing ")]
    assert captured.out == ""
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0]
