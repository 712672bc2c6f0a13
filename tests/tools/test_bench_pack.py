"""The measurement of packing, on a small random model. Times themselves are never tested."""

import json

import bench_pack
import numpy as np
import pytest
from model_variants import ModelVariants

from ksort_gguf.binding.run import PARTS
from ksort_gguf.cache.protocol import CacheOptions
from ksort_gguf.plan.file import read_plan


def run(capsys, *arguments) -> tuple[int, str, str]:
    capsys.readouterr()  # of the fixture
    status = bench_pack.main([*map(str, arguments), "-t", "1"])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_table_and_json(folder, capsys):
    """Would catch missing rows, turns that are not counted or counted twice, and times of another test or way."""
    status, out, err = run(
        capsys, "-m", folder / "stock.gguf", "--plan-file", folder / "steps.gguf",
        "-p", 20, "-n", 3, "-d", "0,70", "-ctv", "bfp14", "-r", 2,
    )  # fmt: skip
    assert status == 0, err
    *table, line = out.splitlines()
    summary = json.loads(line)
    tests = ["pp20 @ d0", "tg3 @ d0", "pp20 @ d70", "tg3 @ d70"]
    assert [row["test"] for row in summary["rows"]] == tests
    assert [line.split(" | ")[0] for line in table[-4:]] == [f"| {test}" for test in tests]
    assert (summary["type_k"], summary["type_v"], summary["n_threads"]) == ("bfp12", "bfp14", 1)
    for row in summary["rows"]:
        assert len(row["whole_ms"]) == 2
        assert set(row["part_ms"]) == {"with", "without"}
        for part_ms in row["part_ms"].values():
            assert list(part_ms) == list(PARTS)
            assert all(len(turns) == 2 for turns in part_ms.values())


@pytest.mark.parametrize("model", ["stock.gguf", "folded.gguf"])
def test_plan_without_a_plan_file(folder, capsys, model):
    """Would catch a stock file measured without any plan, and a folded file's own plan that is left out."""
    status, out, err = run(capsys, "-m", folder / model, "-p", 4, "-n", 1, "-d", "0", "-r", 1)
    assert status == 0, err
    own_plan = read_plan(folder / "steps.gguf").name
    assert json.loads(out.splitlines()[-1])["plan"] == ("balanced" if model == "stock.gguf" else own_plan)


@pytest.mark.parametrize("feeds", [[list(range(15, 35))], [[15, 16], list(range(17, 35))]])
def test_parts_are_the_whole_step(folder, feeds):
    """Would catch a part that is left out, or run on another step's tokens: the caches' bytes then differ."""
    variants = ModelVariants(str(folder / "stock.gguf"), [str(folder / "steps.gguf")], 1)
    model = variants.model("steps")
    tokens = list(range(5, 35))
    stored = []
    for in_parts in (False, True):
        text = bench_pack.Text(model, CacheOptions("bfp12", "bfp12", 32, "bfp16"), tokens[:10], 20)
        if in_parts:
            text.whole_ns([tokens[:20]])  # other tokens, to be written over
            assert list(text.part_ns(feeds)) == list(PARTS)
        else:
            assert text.whole_ns(feeds) > 0
        cache = text.cache
        stored.append([layer.unpack(0, 30) for layer in (*cache.k, *cache.v)])
    np.testing.assert_array_equal(stored[0], stored[1])


def test_without_means_without(folder):
    """Would catch a comparison of the plan's steps with themselves: keys must then be stored alike."""
    variants = ModelVariants(str(folder / "stock.gguf"), [str(folder / "steps.gguf")], 1)
    keys = []
    for run_time_steps in (True, False):
        model = variants.model("steps", run_time_steps)
        text = bench_pack.Text(model, CacheOptions("bfp12", "f16", 32, "bfp16"), [7, 8, 9], 1)
        keys.append(text.cache.k[0].unpack(0, 3))
    assert np.abs(keys[0] - keys[1]).max() > 0.1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--plan-file", "{dir}/sorted.gguf"], "the plan (ksort) does nothing at run time to bfp12 keys"),
        (["--plan-file", "{dir}/steps.gguf", "-ctk", "f16"], "use a BFP -ctk"),
        (["--plan-file", "{dir}/none.gguf"], "none.gguf"),
        (["-m", "{dir}/folded.gguf", "--plan-file", "{dir}/steps.gguf"], "folded already"),
        (["-m", "{dir}/none.gguf"], "none.gguf"),
        (["-d", "0,deep"], "--n-depth 0,deep"),
        (["-d", "-1"], "--n-depth -1"),
        (["-p", "0"], "--n-prompt 0"),
        (["-n", "-2"], "--n-gen -2"),
        (["-r", "0"], "--repetitions 0"),
    ],
)
def test_mistakes_end_in_one_line(folder, capsys, arguments, words):
    """Would catch tracebacks, and tables of a comparison with nothing."""
    filled = [argument.format(dir=folder) for argument in arguments]
    status, out, err = run(capsys, "-m", folder / "stock.gguf", *filled)
    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 1 and err.startswith("error: ") and words in err
