"""The GPU runner against the CPU runner, on random tiny models.

Each comparison runs twice: on the GPU (skipped where there is none), and on the CPU with libksort_cuda replaced by
tests/native/cuda_stand_in.c, which shows that models, caches and calls are right apart from the kernels.
"""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_support import LLAMA, random_weights, write_checkpoint

from ksort_gguf.binding import cpu as native
from ksort_gguf.binding import cuda, ffi, files
from ksort_gguf.cache import cuda_device
from ksort_gguf.cache.cuda import check_options
from ksort_gguf.cache.cuda_float_attention import TorchRope
from ksort_gguf.cache.protocol import CacheOptions, HeadShape, LayerPlan
from ksort_gguf.cache.rope_table import RopeTable, cos_sin
from ksort_gguf.engine.load import load_model
from ksort_gguf.errors import KsortError
from ksort_gguf.eval import perplexity as protocol
from ksort_gguf.eval.compare import Comparison
from ksort_gguf.models.gguf_source import open_gguf
from ksort_gguf.models.rope import folded_tables, stock_tables
from ksort_gguf.models.run_torch import Float32, TorchModel
from ksort_gguf.models.weights import load_weights
from ksort_gguf.plan.convert import convert
from ksort_gguf.plan.file import folded_plan

STAND_IN = Path(__file__).parents[1] / "native" / "cuda_stand_in.c"
HEADERS = Path(__file__).parents[2] / "native" / "include"
HAS_GPU = cuda_device.missing() is None
N_CTX = 700  # more than the smallest bound of a float cache's steps

N_VOCAB = 97
CONFIG = {**LLAMA, "head_dim": 64, "vocab_size": N_VOCAB, "max_position_embeddings": 1024}
MODELS = {
    "qwen2": {**CONFIG, "architectures": ["Qwen2ForCausalLM"]},  # with biases
    "mistral-window": {**CONFIG, "architectures": ["MistralForCausalLM"], "sliding_window": 24},
}
FLOAT = dict(k_type="f32", v_type="f32")
NO_EXACT_ROWS = dict(exact_tail=0, exact_sinks=0)
CACHES = [FLOAT, dict(k_type="f16", v_type="bf16"), dict(k_type="bfp12"), dict(k_type="bfp16", v_type="bfp12")]


@pytest.fixture(scope="module", params=["stand-in", "cuda"])
def device(request, tmp_path_factory):
    """The torch device that the GPU runner runs on."""
    if request.param == "cuda":
        if not HAS_GPU:
            pytest.skip(cuda_device.missing())
        yield "cuda"
        return
    if shutil.which("cc") is None:
        pytest.skip("needs cc")
    library, libksort = tmp_path_factory.mktemp("stand-in") / "libksort_cuda.so", files.library_path()
    sources = [f"-I{HEADERS}", STAND_IN, libksort, f"-Wl,-rpath,{libksort.parent}"]
    subprocess.run(["cc", "-std=c11", "-shared", "-fPIC", "-Wall", "-Werror", *sources, "-o", library], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(files.CUDA_LIBRARY_VARIABLE, str(library))
        stand_in = ffi.Binding("ksort_cuda")
        patch.setattr(cuda, "loaded", lambda name: stand_in)
        yield "cpu"


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request, tmp_path_factory):
    """A folder with a random model."""
    rng = np.random.default_rng(7)
    weights = random_weights(rng, biases=request.param == "qwen2", n_vocab=N_VOCAB, head_dim=64)
    for name, weight in weights.items():
        if "norm" in name:
            weight[:] = rng.uniform(0.5, 1.5, weight.shape)
        elif weight.ndim == 2:
            weight *= 0.1
    return write_checkpoint(tmp_path_factory.mktemp(request.param), MODELS[request.param], weights)


@pytest.fixture(scope="module")
def folded(checkpoint, tmp_path_factory):
    """The model with channels both sorted and balanced."""
    path = tmp_path_factory.mktemp("folded") / "model.gguf"
    return convert(checkpoint, path, outtype="f16", plan="ksort,balanced", block_size=16).path


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, N_VOCAB, (600,), generator=torch.Generator().manual_seed(3)).tolist()


def gpu_model(path, device: str, use_graph: bool = True) -> TorchModel:
    with open_gguf(path) as source:
        weights, plan = load_weights(source), folded_plan(source)
        use_graph = use_graph and device == "cuda"
        return TorchModel(source.spec, weights, plan, source.rope_factors, 1, device, use_graph)


def gpu_context(path, device: str, use_graph: bool = True, n_ctx: int = N_CTX, **types):
    return gpu_model(path, device, use_graph).start(
        load_model(path, n_threads=1).cache_options(**types, **NO_EXACT_ROWS), n_ctx
    )


def cpu_logits(path, tokens, **types):
    loaded = load_model(path, n_threads=2)
    return loaded.backend.start(loaded.cache_options(**types, **NO_EXACT_ROWS), N_CTX).forward(tokens, len(tokens))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean deviation, in standard deviations of the logits."""
    return float((a - b).abs().mean() / b.std())


def bound(types: dict[str, str]) -> float:
    """Of the distance between two correct ways to compute logits: rounding to f16 flips some of BFP's roundings."""
    return 0.003 if types["k_type"] in ("f32", "f16") else 0.1


@pytest.mark.parametrize("plan", ["none", "ksort,balanced"])
@pytest.mark.parametrize("types", CACHES, ids=lambda types: "-".join(types.values()))
def test_logits_equal_the_cpus(checkpoint, device, tokens, tmp_path, plan, types):
    """Catches a wrong table, address, stride, bias, norm, window or transform: rounding alone is far below that."""
    path = convert(checkpoint, tmp_path / "m.gguf", outtype="f16", plan=plan, block_size=16).path
    logits = gpu_context(path, device, **types).forward(tokens, len(tokens))
    assert distance(logits, cpu_logits(path, tokens, **types)) < bound(types)


@pytest.mark.parametrize("first", [0, 500])
def test_float32_is_the_cpus_but_for_roundings(folded, tokens, first):
    """Catches what rounding to f16 hides in the tests here: torch's blocks and float attention, all in float32.

    From 500 on, decode steps go over the border of a block of slots.
    """
    with open_gguf(folded) as source:
        arguments = source.spec, load_weights(source), folded_plan(source), source.rope_factors
        model = TorchModel(*arguments, 1, "cpu", use_graph=False, arithmetic=Float32())
    context = model.start(load_model(folded).cache_options(**FLOAT), N_CTX)
    parts = [context.forward(tokens[: first + 10], first + 10)]
    parts += [context.forward([token]) for token in tokens[first + 10 : first + 20]]
    on_cpu = cpu_logits(folded, tokens[: first + 20], **FLOAT)
    assert distance(torch.cat(parts), on_cpu) < 1e-5


@pytest.mark.parametrize("types", CACHES, ids=lambda types: "-".join(types.values()))
def test_tokens_one_by_one_equal_all_at_once(folded, device, tokens, types):
    """Catches decode steps whose positions, mask or bound differ from a prompt's, and graphs that do not grow."""
    at_once = gpu_context(folded, device, **types).forward(tokens, 30)
    context = gpu_context(folded, device, **types)
    context.forward(tokens[:-30])
    single = torch.cat([context.forward([token]) for token in tokens[-30:]])
    assert distance(single, at_once) < bound(types)


@pytest.mark.parametrize("types", CACHES, ids=lambda types: "-".join(types.values()))
def test_graph_equals_eager(folded, device, tokens, types):
    """Catches a captured step that keeps a length, a token or an address of the step that it was captured in."""
    if device != "cuda":
        pytest.skip("graphs need a GPU")
    by_graph, eager = (gpu_context(folded, device, use_graph, **types) for use_graph in (True, False))
    for context in (by_graph, eager):
        context.forward(tokens[:480])
    for token in tokens[480:560]:  # over the smallest bound of float caches
        assert distance(by_graph.forward([token]), eager.forward([token])) < bound(types)


@pytest.mark.parametrize("types", [FLOAT, dict(k_type="bfp12")], ids=["f32", "bfp12"])
def test_truncated_tokens_are_forgotten(folded, device, tokens, types):
    """Catches slots behind the cache's end that are seen, and slots that are not written anew."""
    context = gpu_context(folded, device, **types)
    context.forward(tokens[:300])
    context.cache.truncate(70)
    again = context.forward(tokens[400:500], 100)
    fresh = gpu_context(folded, device, **types)
    fresh.forward(tokens[:70])
    assert distance(again, fresh.forward(tokens[400:500], 100)) < bound(types)
    assert context.cache.n_tokens == 170


@pytest.mark.parametrize("n_logits", [70, 600])
def test_logits_do_not_depend_on_the_ubatch(folded, device, tokens, monkeypatch, n_logits):
    """Catches logits of the wrong rows, and positions that begin anew, where a prompt is cut into parts."""
    whole = gpu_context(folded, device, **FLOAT).forward(tokens, n_logits)
    monkeypatch.setattr("ksort_gguf.models.run_torch.N_UBATCH", 64)
    cut = gpu_context(folded, device, **FLOAT).forward(tokens, n_logits)
    assert cut.shape == (n_logits, N_VOCAB) and distance(cut, whole) < 0.003


def test_perplexity_and_divergence_equal_the_cpus(folded, device, tokens):
    """Catches a GPU runner that is close, but not close enough to measure caches with."""
    loaded = load_model(folded, n_threads=2)
    model, measured = gpu_model(folded, device), []
    text = tokens * 4
    for runner in (loaded.backend, model):
        exact, packed = (
            protocol.forward_of(runner.start(loaded.cache_options(**types, **NO_EXACT_ROWS), 400))
            for types in (FLOAT, dict(k_type="bfp12", v_type="bfp12"))
        )
        with Comparison(text, 400, N_VOCAB, bos_id=None) as comparison:
            measured.append((comparison.base(exact).ppl, comparison.against_base(packed).mean_kld().value))
    assert measured[1][0] == pytest.approx(measured[0][0], rel=1e-3)
    assert measured[1][1] == pytest.approx(measured[0][1], rel=0.02)


def test_cache_bytes_are_the_cpus(folded, device, tokens):
    """Catches bytes of the whole context, or of one layer, reported as those in use."""
    loaded = load_model(folded, n_threads=1)
    for types in CACHES:
        options = loaded.cache_options(**types, **NO_EXACT_ROWS)
        on_cpu, on_gpu = (m.start(options, N_CTX) for m in (loaded.backend, gpu_model(folded, device)))
        for context in (on_cpu, on_gpu):
            context.forward(tokens[:100])
        assert on_gpu.cache.k_bytes() == on_cpu.cache.k_bytes()
        assert on_gpu.cache.v_bytes() == on_cpu.cache.v_bytes()


@pytest.mark.parametrize("n_tokens", [1, 5])
def test_what_kernels_find_is_reported(folded, device, tokens, n_tokens):
    """Catches a status that stays on the device, that is reported again later, or failed tokens that count."""
    model = gpu_model(folded, device)
    context = model.start(load_model(folded, n_threads=1).cache_options(k_type="bfp12", **NO_EXACT_ROWS), N_CTX)
    context.forward(tokens[:10])
    norm = model._blocks[1].attention_norm
    kept = norm.clone()
    norm.fill_(float("inf"))
    with pytest.raises(KsortError, match="NaN or infinity in keys, values or queries"):
        context.forward(tokens[10 : 10 + n_tokens])
    assert context.cache.n_tokens == 10
    norm.copy_(kept)
    context.forward(tokens[10 : 10 + n_tokens])
    with pytest.raises(KsortError, match=f"{N_CTX + 10 + n_tokens} tokens do not fit"):
        context.forward(tokens[:1] * N_CTX)


@pytest.mark.parametrize(
    ("options", "head_dim", "words"),
    [
        (("f16", "bfp12", 32, "f32"), 64, "`cache_type_v` bfp12: .* `cache_type_k`"),
        (("f16", "f16", 32, "bfp16"), 64, "`query_type` bfp16"),
        (("bfp12", "f32", 32, "bfp16"), 64, "`cache_type_v` f32: .* f16, bf16"),
        (("bfp12", "f16", 32, "f32"), 64, "`query_type` f32"),
        (("bfp12", "f16", 16, "bfp16"), 32, "have 32"),
    ],
)
def test_caches_that_only_the_cpu_runs(options, head_dim, words):
    """Catches a cache type that the GPU would read as another, and messages that do not name the flag."""
    with pytest.raises(KsortError, match=words):
        check_options(CacheOptions(*options), head_dim)


def test_weights_beyond_f16_are_refused(folded):
    """Catches infinities that only show as a failing first step."""
    with open_gguf(folded) as source:
        weights = load_weights(source)
        weights.embedding.data = weights.embedding.float() * 1e6
        with pytest.raises(KsortError, match="65504"):
            TorchModel(source.spec, weights, folded_plan(source), source.rope_factors, 1, "cpu", False)


def test_layouts_are_ksort_hs():
    """Catches tiles that the allocation has fewer bytes for than the library writes."""
    for type_name in {*cuda.K_TYPES, *cuda.V_TYPES}:
        for head_dim in cuda.HEAD_DIMS:
            layout = cuda.CacheLayout(type_name, head_dim, 32, 3, 5, 2)
            assert layout.head_bytes == native.tile_bytes(type_name, head_dim, 32)
            assert layout.n_bytes == 2 * 5 * 3 * layout.head_bytes and layout.head_bytes % 64 == 0


def test_rope_in_torch_is_the_reference(rng):
    """Catches a wrong sign, partner or frequency, and rotated channels beyond n_rot."""
    order = np.stack([rng.permutation(64) for _ in range(2)])
    tables = folded_tables(stock_tables(64, 32, "half"), order)
    theta = 10000.0 ** (-np.arange(16) / 16)
    x = rng.standard_normal((3, 6, 64)).astype(np.float32)
    plan = LayerPlan(HeadShape(4, 2, 64, 0.3, 0), tables, RopeTable(theta))
    rope = TorchRope(plan, 10, torch.device("cpu"))
    rope.begin(torch.tensor([2, 9, 0]))
    cos, sin = (part[[2, 9, 0]] for part in cos_sin(theta, 10))
    for head, kv_head in enumerate([0, 0, 1, 1, 0, 1]):
        partner, sign, frequency = (table[kv_head] for table in (tables.partner, tables.sign, tables.frequency))
        turned = x[:, head] * cos[:, frequency] + sign * x[:, head, partner] * sin[:, frequency]
        expected = np.where(sign == 0, x[:, head], turned) * (0.3 if head < 4 else 1)
        np.testing.assert_allclose(rope.turn(torch.from_numpy(x))[:, head], expected, rtol=1e-6, atol=1e-6)
