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

from ksort_gguf import native, native_cuda, native_files
from ksort_gguf.convert import convert
from ksort_gguf.errors import KsortError
from ksort_gguf.families.rope import cos_sin, folded_tables, stock_tables
from ksort_gguf.runtime import cuda_device
from ksort_gguf.runtime import perplexity as protocol
from ksort_gguf.runtime.cuda_attention import TorchRope, Waves
from ksort_gguf.runtime.cuda_cache import check_options
from ksort_gguf.runtime.cuda_model import CudaModel
from ksort_gguf.runtime.kld import Base, BaseWriter
from ksort_gguf.runtime.kv_cache import CacheOptions
from ksort_gguf.runtime.load import load_model
from ksort_gguf.runtime.weights import load_weights
from ksort_gguf.sources.gguf_file import open_gguf

STAND_IN = Path(__file__).parent / "native" / "cuda_stand_in.c"
HEADERS = Path(__file__).parents[1] / "native" / "include"
HAS_GPU = cuda_device.missing() is None
N_CTX = 700  # more than the smallest bound of a float cache's steps

N_VOCAB = 97
CONFIG = {**LLAMA, "head_dim": 64, "vocab_size": N_VOCAB, "max_position_embeddings": 1024}
MODELS = {
    "qwen2": {**CONFIG, "architectures": ["Qwen2ForCausalLM"]},  # with biases
    "mistral-window": {**CONFIG, "architectures": ["MistralForCausalLM"], "sliding_window": 24},
}
FLOAT = dict(k_type="f32", v_type="f32")
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
    library, libksort = tmp_path_factory.mktemp("stand-in") / "libksort_cuda.so", native_files.library_path()
    sources = [f"-I{HEADERS}", STAND_IN, libksort, f"-Wl,-rpath,{libksort.parent}"]
    subprocess.run(["cc", "-std=c11", "-shared", "-fPIC", "-Wall", "-Werror", *sources, "-o", library], check=True)
    loaded = native.loaded  # its cache stays: other tests have kept libksort's binding
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(native_files.CUDA_LIBRARY_VARIABLE, str(library))
        stand_in = native._Binding("ksort_cuda")
        patch.setattr(native, "loaded", lambda *name: stand_in if name == ("ksort_cuda",) else loaded(*name))
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


def gpu_model(path, device: str, use_graph: bool = True) -> CudaModel:
    with open_gguf(path) as source:
        weights = load_weights(source, None, progress=False)
        use_graph = use_graph and device == "cuda"
        return CudaModel(weights, source.family, source.geometry, source.plan, 1, device, use_graph)


def gpu_sequence(path, device: str, use_graph: bool = True, n_ctx: int = N_CTX, **types):
    return gpu_model(path, device, use_graph).start(load_model(path).cache_options(**types), n_ctx)


def cpu_logits(path, tokens, **types):
    loaded = load_model(path, n_threads=2)
    return loaded.model.start(loaded.cache_options(**types), N_CTX).forward(tokens, len(tokens))


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
    logits = gpu_sequence(path, device, **types).forward(tokens, len(tokens))
    assert distance(logits, cpu_logits(path, tokens, **types)) < bound(types)


@pytest.mark.parametrize("types", CACHES, ids=lambda types: "-".join(types.values()))
def test_tokens_one_by_one_equal_all_at_once(folded, device, tokens, types):
    """Catches decode steps whose positions, mask or bound differ from a prompt's, and graphs that do not grow."""
    at_once = gpu_sequence(folded, device, **types).forward(tokens, 100)
    sequence = gpu_sequence(folded, device, **types)
    sequence.forward(tokens[:-100])
    single = torch.cat([sequence.forward([token]) for token in tokens[-100:]])
    assert distance(single, at_once) < bound(types)


@pytest.mark.parametrize("types", CACHES, ids=lambda types: "-".join(types.values()))
def test_graph_equals_eager(folded, device, tokens, types):
    """Catches a captured step that keeps a length, a token or an address of the step that it was captured in."""
    if device != "cuda":
        pytest.skip("graphs need a GPU")
    by_graph, eager = (gpu_sequence(folded, device, use_graph, **types) for use_graph in (True, False))
    for sequence in (by_graph, eager):
        sequence.forward(tokens[:480])
    for token in tokens[480:560]:  # over the smallest bound of float caches
        assert distance(by_graph.forward([token]), eager.forward([token])) < bound(types)


@pytest.mark.parametrize("types", [FLOAT, dict(k_type="bfp12")], ids=["f32", "bfp12"])
def test_truncated_tokens_are_forgotten(folded, device, tokens, types):
    """Catches slots behind the cache's end that are seen, and slots that are not written anew."""
    sequence = gpu_sequence(folded, device, **types)
    sequence.forward(tokens[:300])
    sequence.cache.truncate(70)
    again = sequence.forward(tokens[400:500], 100)
    fresh = gpu_sequence(folded, device, **types)
    fresh.forward(tokens[:70])
    assert distance(again, fresh.forward(tokens[400:500], 100)) < bound(types)
    assert sequence.cache.n_tokens == 170


@pytest.mark.parametrize("n_logits", [1, 70, 600])
def test_logits_do_not_depend_on_the_ubatch(folded, device, tokens, monkeypatch, n_logits):
    """Catches logits of the wrong rows, and positions that begin anew, where a prompt is cut into parts."""
    whole = gpu_sequence(folded, device, **FLOAT).forward(tokens, n_logits)
    monkeypatch.setattr("ksort_gguf.runtime.cuda_model.N_UBATCH", 64)
    cut = gpu_sequence(folded, device, **FLOAT).forward(tokens, n_logits)
    assert cut.shape == (n_logits, N_VOCAB) and distance(cut, whole) < 0.003


def test_perplexity_and_divergence_equal_the_cpus(folded, device, tokens, tmp_path):
    """Catches a GPU runner that is close, but not close enough to measure caches with."""
    loaded = load_model(folded, n_threads=2)
    model, measured = gpu_model(folded, device), []
    text = tokens * 4
    for runner, name in ((loaded.model, "cpu"), (model, "gpu")):
        exact, packed = (
            protocol.forward_of(runner.start(loaded.cache_options(**types), 400))
            for types in (FLOAT, dict(k_type="bfp12", v_type="bfp12"))
        )
        with BaseWriter(tmp_path / name, 400, N_VOCAB, text) as writer:
            ppl = protocol.perplexity(exact, text, 400, base_writer=writer).ppl
        with Base(tmp_path / name, N_VOCAB) as base:
            measured.append((ppl, protocol.kl_divergence(packed, base).mean_kld().value))
    assert measured[1][0] == pytest.approx(measured[0][0], rel=1e-3)
    assert measured[1][1] == pytest.approx(measured[0][1], rel=0.02)


def test_cache_bytes_are_the_cpus(folded, device, tokens):
    """Catches bytes of the whole context, or of one layer, reported as those in use."""
    loaded = load_model(folded)
    for types in CACHES:
        options = loaded.cache_options(**types)
        on_cpu, on_gpu = (m.start(options, N_CTX) for m in (loaded.model, gpu_model(folded, device)))
        for sequence in (on_cpu, on_gpu):
            sequence.forward(tokens[:100])
        assert on_gpu.cache.k_bytes() == on_cpu.cache.k_bytes()
        assert on_gpu.cache.v_bytes() == on_cpu.cache.v_bytes()


@pytest.mark.parametrize("n_tokens", [1, 5])
def test_what_kernels_find_is_told(folded, device, tokens, n_tokens):
    """Catches a status that stays on the device, that is told again later, or failed tokens that count."""
    model = gpu_model(folded, device)
    sequence = model.start(load_model(folded).cache_options(k_type="bfp12"), N_CTX)
    sequence.forward(tokens[:10])
    norm = model._layers[1].attn_norm
    kept = norm.clone()
    norm.fill_(float("inf"))
    with pytest.raises(KsortError, match="NaN or infinity in keys, values or queries"):
        sequence.forward(tokens[10 : 10 + n_tokens])
    assert sequence.cache.n_tokens == 10
    norm.copy_(kept)
    sequence.forward(tokens[10 : 10 + n_tokens])
    with pytest.raises(KsortError, match=f"{N_CTX + 10 + n_tokens} tokens do not fit"):
        sequence.forward(tokens[:1] * N_CTX)


@pytest.mark.parametrize(
    ("options", "head_dim", "words"),
    [
        (("f16", "bfp12", 32, "f32"), 64, "--cache-type-v bfp12: .* --cache-type-k"),
        (("f16", "f16", 32, "bfp16"), 64, "--query-type bfp16"),
        (("bfp12", "f32", 32, "bfp16"), 64, "--cache-type-v f32: .* f16, bf16"),
        (("bfp12", "f16", 32, "f32"), 64, "--query-type f32"),
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
        weights = load_weights(source, None, progress=False)
        weights.embedding.data = weights.embedding.float() * 1e6
        with pytest.raises(KsortError, match="65504"):
            CudaModel(weights, source.family, source.geometry, source.plan, 1, "cpu", False)


def test_layouts_are_ksort_hs():
    """Catches tiles that the allocation has fewer bytes for than the library writes."""
    for type_name in {*native_cuda.K_TYPES, *native_cuda.V_TYPES}:
        for head_dim in native_cuda.HEAD_DIMS:
            layout = native_cuda.CacheLayout(type_name, head_dim, 32, 3, 5, 2)
            assert layout.head_bytes == native.tile_bytes(type_name, head_dim, 32)
            assert layout.n_bytes == 2 * 5 * 3 * layout.head_bytes and layout.head_bytes % 64 == 0


def test_rope_in_torch_is_the_reference(rng):
    """Catches a wrong sign, partner or frequency, and rotated channels beyond n_rot."""
    order = np.stack([rng.permutation(64) for _ in range(2)])
    tables = folded_tables(stock_tables(64, 32, "half"), order)
    theta = 10000.0 ** (-np.arange(16) / 16)
    x = rng.standard_normal((3, 6, 64)).astype(np.float32)
    rope = TorchRope(tables, 4, Waves(theta, 10, torch.device("cpu")), q_scale=0.3)
    rope.begin(torch.tensor([2, 9, 0]))
    cos, sin = (wave[[2, 9, 0]] for wave in cos_sin(theta, 10))
    for head, kv_head in enumerate([0, 0, 1, 1, 0, 1]):
        partner, sign, frequency = (table[kv_head] for table in (tables.partner, tables.sign, tables.frequency))
        turned = x[:, head] * cos[:, frequency] + sign * x[:, head, partner] * sin[:, frequency]
        expected = np.where(sign == 0, x[:, head], turned) * (0.3 if head < 4 else 1)
        np.testing.assert_allclose(rope.turn(torch.from_numpy(x))[:, head], expected, rtol=1e-6, atol=1e-6)
