"""The GPU's benchmarks as far as they run without one: arguments, and what is measured. Times are never tested."""

from pathlib import Path
from types import SimpleNamespace

import bench_attend_cuda
import bench_decode_cuda
import cuda_steps
import pytest
import torch
import torch.nn.functional as F

from ksort_gguf.cache import cuda_device

SHAPE = cuda_steps.Shape(8, 32, 8, 128, 32768)
without_gpu = pytest.mark.skipif(cuda_device.missing() is None, reason="has a GPU")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--parts", "decode,bogus"], "'bogus'"),
        (["--heads", "32"], "--heads 32"),
        (["--heads", "32/12"], "multiple"),
        (["-D", "72"], "-D 72"),
        (["-B", "0"], "-B 0"),
        (["-d", "deep"], "-d deep"),
        (["--types", "f16/f16"], "--types f16/f16"),
        (["-r", "0"], "-r 0"),
        pytest.param([], "--device cuda: ", marks=without_gpu),
    ],
)
def test_mistakes_end_in_one_line(capsys, arguments, words):
    """Catches tracebacks, and mistakes found only after minutes on a GPU."""
    assert bench_attend_cuda.main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-d", "0"], "-d 0"),
        (["--types", "bfp12"], "--types bfp12"),
        pytest.param([], "--device cuda: ", marks=without_gpu),
    ],
)
def test_decode_mistakes_end_in_one_line(capsys, arguments, words):
    """Catches a model that is loaded before its arguments are looked at."""
    assert bench_decode_cuda.main(["-m", "none.gguf", *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line


def test_bytes_are_those_that_must_move():
    """Catches query heads counted as KV heads, one context counted for all, and f16 rows counted as f32."""
    assert SHAPE.cache_bytes("f16", "f16") == 8 * 32768 * 8 * 128 * 2 * 2
    assert SHAPE.cache_bytes("f16", "f16") / SHAPE.cache_bytes("bfp12", "f16") == pytest.approx(1.58, abs=0.01)
    assert SHAPE.cache_bytes("f16", "f16") / SHAPE.cache_bytes("bfp12", "bfp12") == pytest.approx(3.765, abs=0.01)
    assert cuda_steps.Shape(2, 8, 4, 64, 4096, 4096).x_bytes() == 2 * 4096 * 4 * 64 * 2 * 2


class Model:
    """What bench_decode_cuda asks of a model, remembering which steps ran with a graph, behind how many tokens."""

    def __init__(self):
        self.use_graph, self.steps, self.cache = True, [], self
        self.n_tokens = 0

    def start(self, options, n_ctx):
        self.n_ctx = n_ctx
        return self

    def forward(self, tokens):
        self.steps.append((self.use_graph, self.n_tokens, len(tokens)))
        self.n_tokens += len(tokens)
        assert self.n_tokens <= self.n_ctx

    def truncate(self, n_tokens):
        self.n_tokens = n_tokens

    def k_bytes(self):
        return self.n_tokens

    def v_bytes(self):
        return 2 * self.n_tokens


def test_decode_turns():
    """Catches turns that run on into the last one's tokens, a turn without graph that has one, and bytes of another
    depth."""
    model = Model()
    loaded = SimpleNamespace(backend=model, path=Path("m.gguf"), cache_options=lambda *types: types)
    row = bench_decode_cuda.measure(loaded, "bfp12", "f16", [0] * 13, depth=10, n_turns=2)
    one_turn = [(use_graph, n, 1) for use_graph in (True, False) for n in (10, 11, 12)]
    assert model.steps == [(True, 0, 10), *one_turn * 3]
    assert (row["k_bytes"], row["v_bytes"]) == (10, 20)
    assert 0 < row["lowest"] <= row["ratio"] <= row["highest"]


@pytest.mark.skipif(cuda_device.missing() is not None, reason="needs a GPU")
def test_steps_attend_as_torch_does():
    """Catches rows, strides or lengths that the library reads otherwise: a benchmark of something else."""
    shape = cuda_steps.Shape(3, 8, 2, 128, 200, 200)
    rope = cuda_steps.Rope(2, 128, 200)
    steps = cuda_steps.PackedSteps(shape, "bfp16", "f16", 1, rope)
    for call in (*steps.pack_calls(), *steps.attend_calls()):
        call()
    steps.check()
    cos, sin = (table.repeat(1, 2) for table in (rope.cos, rope.sin))  # [200, 128]: both halves of a head turn alike

    def heads(rows: torch.Tensor) -> torch.Tensor:
        return rows.view(3, 200, -1, 128).transpose(1, 2).float()

    def turned(rows: torch.Tensor) -> torch.Tensor:
        x = heads(rows)
        return x * cos + torch.cat((-x[..., 64:], x[..., :64]), -1) * sin

    k, v = steps.x[0]
    expected = F.scaled_dot_product_attention(turned(steps.q), turned(k), heads(v), is_causal=True, enable_gqa=True)
    assert (heads(steps.out) - expected).abs().mean() < 0.02 * expected.std()
