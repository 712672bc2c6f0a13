"""The comparison of speeds with llama.cpp. Times themselves are never tested."""

import json
import sys

import bench_vs_llama_cpp as bench
import pytest


class Recorder:
    """An engine that only remembers what it was fed after what."""

    def __init__(self):
        self.n_tokens, self.fed = 0, []

    def feed(self, tokens: list[int]) -> None:
        self.fed.append((self.n_tokens, tokens))
        self.n_tokens += len(tokens)

    def truncate(self, n_tokens: int) -> None:
        assert n_tokens <= self.n_tokens
        self.n_tokens = n_tokens


@pytest.mark.parametrize("at_once", [True, False])
def test_turns(at_once: bool):
    """Catches turns that run on into the last one's tokens, a first turn that counts, and engines that skip one."""
    engines = {"a": Recorder(), "b": Recorder()}
    for engine in engines.values():
        engine.feed([0] * 10)
    speeds = bench.take_turns(engines, 10, [1, 2, 3], at_once, n_turns=2)
    one_turn = [(10, [1, 2, 3])] if at_once else [(10, [1]), (11, [2]), (12, [3])]
    for name, engine in engines.items():
        assert engine.fed[1:] == one_turn * 3
        assert len(speeds[name]) == 2 and min(speeds[name]) > 0


def test_ratios_are_of_the_same_turn():
    """Catches the ratio of two medians, which noise in different turns would blur."""
    speeds = {"ours a": [10.0, 40.0, 30.0], "theirs b": [5.0, 40.0, 10.0]}
    (row,) = bench.compare("tg1", speeds, ["a"], ["b"])
    assert (row["ratio"], row["lowest"], row["highest"]) == (2.0, 1.0, 3.0)
    assert (row["ours_ts"], row["theirs_ts"]) == (30.0, 10.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-d", "-1"], "-d -1"),
        (["-r", "0"], "-r 0"),
        (["-n", "-1"], "-n -1"),
        (["--ours", "bfp12"], "--ours bfp12"),
        (["--ours", "bfp12/q4_0"], "--ours bfp12/q4_0"),
        (["--theirs", "f16"], "--theirs f16"),
        ([], "pip install llama-cpp-python"),
    ],
)
def test_mistakes_end_in_one_line(folder, capsys, monkeypatch, arguments, words: str):
    """Catches tracebacks, also where llama.cpp is not installed."""
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    capsys.readouterr()
    assert bench.main(["-m", str(folder / "stock.gguf"), "-t", "1", *arguments]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0]


@pytest.mark.peers
def test_both_engines_run(folder, capsys):
    """Catches calls of llama.cpp that its next version refuses, and rows that are missing."""
    pytest.importorskip("llama_cpp")
    sizes = ["-p", "8", "-n", "2", "-d", "0,16", "-r", "2", "-t", "1"]
    caches = ["--ours", "f16/f16,f16/bfp12", "--theirs", "f16/f16"]
    assert bench.main(["-m", str(folder / "stock.gguf"), *sizes, *caches]) == 0
    *_, line = capsys.readouterr().out.splitlines()
    tests = [row["test"] for row in json.loads(line)["rows"]]
    assert tests == [test for test in ("pp8 @ d16", "tg2 @ d16", "pp8", "tg2") for _ in range(2)]
