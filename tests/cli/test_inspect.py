"""`inspect`: reports on models and plan files."""

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoint_support import HEAD_DIM, N_KV_HEADS, N_LAYERS, QWEN2, random_weights, write_checkpoint

from ksort_gguf.cli.inspect import inspect
from ksort_gguf.cli.main import main
from ksort_gguf.plan.convert import convert
from ksort_gguf.plan.statistics import mean_crest


@pytest.fixture
def files(tmp_path: Path, rng) -> Path:
    """A folder with checkpoint/, stock.gguf, folded.gguf, balanced.gguf and plan.gguf of one model."""
    directory = write_checkpoint(tmp_path / "checkpoint", QWEN2, random_weights(rng, biases=True))
    convert(directory, tmp_path / "stock.gguf", plan="none", block_size=16)
    convert(directory, tmp_path / "folded.gguf", plan="ksort", rank="effective-norm", block_size=16)
    convert(directory, tmp_path / "balanced.gguf", block_size=16)
    assert main(["plan", str(tmp_path / "stock.gguf"), "--outfile", str(tmp_path / "plan.gguf")]) == 0
    return tmp_path


def test_statistics_of_a_folded_file_are_those_of_its_source(files: Path):
    """Catches statistics that take folded rows for stock rows."""
    convert(files / "stock.gguf", files / "weight-norm.gguf", plan="ksort", block_size=16)
    for name in ("weight-norm.gguf", "balanced.gguf"):
        assert inspect(files / name)["layers"] == inspect(files / "stock.gguf")["layers"]
    for layer in inspect(files / "folded.gguf")["layers"]:
        assert layer["crest_sorted"] < layer["crest_stock"]


def test_cache_bytes(files: Path):
    """Catches a forgotten exponent, layer or head: BFP12 in blocks of 16 takes 4.5 bits a value, F16 takes 16."""
    report = inspect(files / "stock.gguf")["cache_bytes_per_token"]
    n_values = N_LAYERS * N_KV_HEADS * HEAD_DIM
    assert report["bfp12"] == {"k": n_values * 4.5 / 8, "v": n_values * 4.5 / 8}
    assert report["f16"] == {"k": n_values * 2, "v": n_values * 2}
    exact = inspect(files / "stock.gguf")["exact_rows"]
    assert (exact["types"], exact["tail"], exact["sinks"]) == (["bfp12"], 128, 4)
    assert exact["k_bytes"] == exact["v_bytes"] == 3 * 64 * n_values * 2  # the sinks' tile, and a context of 128


def test_kinds(files: Path, capsys):
    """Catches files taken for one another, and output that is not JSON."""
    kinds = {"checkpoint": "checkpoint", "stock": "stock", "folded": "folded", "balanced": "folded", "plan": "plan"}
    for name, kind in kinds.items():
        path = files / name if name == "checkpoint" else files / f"{name}.gguf"
        capsys.readouterr()
        assert main(["inspect", str(path), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["kind"] == kind
        assert (report["plan"] is not None) == (kind in ("folded", "plan"))
        assert main(["inspect", str(path)]) == 0
        assert "qwen2" in capsys.readouterr().out


def test_plan_says_what_it_is_and_comes_from(files: Path, capsys):
    """Catches a rank shown for a plan that does not sort, empty places in the line, and steps that are left out."""
    assert main(["inspect", str(files / "balanced.gguf")]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("plan: "))
    assert line.startswith("plan: balanced, steps shift scale rotate feedback, made from weights, row order half, made")
    assert main(["inspect", str(files / "folded.gguf")]) == 0
    assert "plan: ksort, steps order, ranked by effective-norm, made from weights, row" in capsys.readouterr().out
    report = inspect(files / "plan.gguf")["plan"]
    assert report["steps"] == ["shift", "scale", "rotate", "feedback"] and report["rank"] is None
    assert report["statistics"] == "weights"


def test_mean_crest():
    """Catches the short last block being dropped, and the mean of squares without its root."""
    norms = np.array([[3.0, 4.0, 5.0]])
    assert mean_crest(norms, 2) == pytest.approx((4 / np.sqrt(12.5) + 1) / 2)
