"""The forward pass of calibration, against transformers on tiny random checkpoints."""

import tempfile
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from checkpoint_support import (
    HEAD_DIM,
    LLAMA,
    N_EMBD,
    N_HEADS,
    N_KV_HEADS,
    N_LAYERS,
    N_VOCAB,
    QWEN2,
    random_weights,
    write_checkpoint,
)
from text_support import CONTROL, byte_tokenizer
from transformers.masking_utils import sdpa_mask

from ksort_gguf.engine.calibration import calibration_windows, default_text
from ksort_gguf.errors import KsortError
from ksort_gguf.models import weights
from ksort_gguf.models.open import open_model
from ksort_gguf.models.rope import row_map
from ksort_gguf.models.spec import Block
from ksort_gguf.models.weights import WeightReader
from ksort_gguf.plan import calibrate
from ksort_gguf.plan.calibrate import observe_layers
from ksort_gguf.plan.convert import convert

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
CONFIGS = {
    "llama": LLAMA,
    "llama-rope-freqs": {**LLAMA, "rope_parameters": LLAMA3_ROPE},
    "llama-linear-rope": {**LLAMA, "rope_parameters": LINEAR_ROPE},
    "llama-biases": {**LLAMA, "attention_bias": True},
    "mistral-window": {**LLAMA, "architectures": ["MistralForCausalLM"], "sliding_window": 20},
    "qwen2": QWEN2,
}
WINDOWS = [np.random.default_rng(n).integers(0, N_VOCAB, n).tolist() for n in (75, 33)]


def write_model(directory, name: str, rng):
    """The checkpoint `name` of CONFIGS, with weights small enough that softmax is not just an argmax."""
    config = CONFIGS[name]
    tensors = random_weights(rng, biases=name in ("llama-biases", "qwen2"))
    if config.get("attention_bias"):
        for layer, bias in enumerate(rng.standard_normal((N_LAYERS, N_EMBD)).astype(np.float32)):
            tensors[f"model.layers.{layer}.self_attn.o_proj.bias"] = bias
    tensors = {key: value * np.float32(0.1 if value.ndim == 2 else 1) for key, value in tensors.items()}
    return write_checkpoint(directory, config, tensors)


@pytest.fixture
def llama(tmp_path, rng):
    return write_model(tmp_path / "llama", "llama", rng)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunk borders inside the windows, as large models and long windows have them."""
    monkeypatch.setattr(calibrate, "_TOKENS_AT_ONCE", 16)
    monkeypatch.setattr(weights, "_ROWS_AT_ONCE", 48)


def observed(path, windows=WINDOWS) -> dict[tuple[int, int], tuple[torch.Tensor, ...]]:
    """(q, k, v) by (layer, window)."""
    found = {}
    with open_model(path, "auto" if path.suffix == ".gguf" else "f32") as source:
        observe_layers(source, windows, lambda layer, window, *qkv: found.update({(layer, window): qkv}), lambda: None)
    return found


def transformers_qkv(directory, architecture: str, tokens) -> list[tuple[torch.Tensor, ...]]:
    """(q, k, v) [n, heads, head_dim] of each layer as they enter transformers' attention, in its own row order."""
    found = []

    def attention(module, q, k, v, mask, **options):
        found.append(tuple(x[0].transpose(0, 1) for x in (q, k, v)))
        return transformers.integrations.sdpa_attention.sdpa_attention_forward(module, q, k, v, mask, **options)

    transformers.AttentionInterface.register("observed", attention)
    transformers.AttentionMaskInterface.register("observed", sdpa_mask)
    model = getattr(transformers, architecture).from_pretrained(
        directory, attn_implementation="observed", dtype=torch.float32
    )
    with torch.inference_mode():
        model(torch.tensor([tokens]), use_cache=False)
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_queries_keys_and_values_equal_transformers(name, tmp_path, rng, small_chunks):
    """Would catch a wrong row order, angle, head grouping, mask, bias, norm or FFN, and windows that see each other."""
    directory = write_model(tmp_path / name, name, rng)
    found = observed(directory)
    assert list(found) == [(layer, window) for layer in range(N_LAYERS) for window in range(len(WINDOWS))]
    place = row_map(HEAD_DIM, HEAD_DIM, "half", "half" if name == "qwen2" else "interleaved")
    for window, tokens in enumerate(WINDOWS):
        for layer, (q, k, v) in enumerate(transformers_qkv(directory, CONFIGS[name]["architectures"][0], tokens)):
            expected = (q[..., place], k[..., place], v)
            for ours, theirs in zip(found[layer, window], expected, strict=True):
                torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


def test_directory_and_gguf_give_the_same_bits(llama, tmp_path):
    """Would catch statistics that depend on which of its two forms a model is calibrated in, or on the run."""
    stock = tmp_path / "stock.gguf"
    convert(llama, stock, outtype="f32", plan="none")
    first, second, of_gguf = observed(llama), observed(llama), observed(stock)
    for key, tensors in first.items():
        for a, b, c in zip(tensors, second[key], of_gguf[key], strict=True):
            assert a.shape[1:] in ((N_HEADS, HEAD_DIM), (N_KV_HEADS, HEAD_DIM))
            assert torch.equal(a, b) and torch.equal(a, c)


def with_n_rot(block: Block, n_rot: int) -> Block:
    attention = block.attention
    return replace(block, attention=replace(attention, rope=replace(attention.rope, n_rot=n_rot)))


def test_channels_beyond_n_rot_rest(llama):
    """Would catch partial RoPE over all channels, or with the frequencies of a full head. Equal tokens have equal keys
    before RoPE, so key t is key 0 turned t times."""
    n_rot, n = 16, 30
    found = []
    with open_model(llama, "f32") as source:
        source.spec = replace(source.spec, blocks=tuple(with_n_rot(block, n_rot) for block in source.spec.blocks))
        observe_layers(source, [[7] * n], lambda layer, window, q, k, v: found.append(k), lambda: None)
    k = found[0].double()
    torch.testing.assert_close(k[..., n_rot:], k[:1, :, n_rot:].expand(n, -1, -1))
    pairs = torch.view_as_complex(k[..., :n_rot].reshape(n, N_KV_HEADS, n_rot // 2, 2))
    turn = torch.outer(torch.arange(n), 10000.0 ** -(torch.arange(0, n_rot, 2).double() / n_rot))[:, None]
    torch.testing.assert_close(pairs, pairs[:1] * torch.polar(torch.ones_like(turn), turn), atol=1e-5, rtol=1e-5)


def test_one_layer_in_memory_and_no_whole_embedding(llama, monkeypatch):
    """Would catch a layer's weights kept while the next layer's are read, a layer read again for each window, and an
    embedding expanded whole (2 GB for 128k tokens of 4096 channels)."""
    alive, peaks, names = weakref.WeakSet(), [], []
    block, tensor = WeightReader.block, WeightReader.tensor

    def counted_block(self, spec):
        weights = block(self, spec)
        alive.add(weights)
        peaks.append(len(alive))
        return weights

    def counted_tensor(self, name):
        names.append(name)
        return tensor(self, name)

    monkeypatch.setattr(WeightReader, "block", counted_block)
    monkeypatch.setattr(WeightReader, "tensor", counted_tensor)
    observed(llama)
    assert peaks == [1] * N_LAYERS
    assert all(name.startswith("blk.") for name in names) and len(set(names)) == len(names)


def test_hidden_states_above_the_bound_move_to_a_file(llama, monkeypatch, tmp_path):
    """Would catch a file that loses states, and a bound that is not kept: without a place for it the run must fail."""
    in_memory = observed(llama)
    monkeypatch.setattr(calibrate, "MAX_HIDDEN_BYTES", 10_000)
    in_file = observed(llama)
    assert all(torch.equal(a, b) for key in in_memory for a, b in zip(in_memory[key], in_file[key], strict=True))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(KsortError, match=r"missing: .*`calibrate_tokens`.*TMPDIR"):
        observed(llama)


def test_progress_counts_layers_and_windows(llama):
    """Would catch a bar that stops short of its total or runs over it."""
    calls = []
    with open_model(llama, "f32") as source:
        observe_layers(source, WINDOWS, lambda *_: None, lambda: calls.append(1))
    assert len(calls) == N_LAYERS * len(WINDOWS)


def test_unusable_models_are_refused(llama, tmp_path, rng):
    """Would catch keys in folded order taken for stock ones, a read past the embedding, and NaN in statistics."""
    folded = tmp_path / "folded.gguf"
    convert(llama, folded, outtype="f32", plan="ksort")
    with pytest.raises(KsortError, match=r"folded\.gguf: is folded already"):
        observed(folded)
    with pytest.raises(KsortError, match=rf"token {N_VOCAB} has no row in the embedding of {N_VOCAB}"):
        observed(llama, [[3, N_VOCAB]])
    huge = random_weights(rng)
    huge["model.layers.0.self_attn.k_proj.weight"] *= np.float32(5e37)
    with pytest.raises(KsortError, match=r"huge: layer 0: activations overflow"):
        observed(write_checkpoint(tmp_path / "huge", LLAMA, huge))


def test_windows_without_bos_are_the_text():
    """Would catch overlapping or shifted windows, a part window, more tokens than asked for, and parsed specials."""
    tokenizer = byte_tokenizer(merges=(), special=(("<s>", CONTROL),), bos_token_id=256)
    text = "abc<s>" * 10
    tokens = list(text.encode())
    windows = calibration_windows(tokenizer, text, n_tokens=47, window=16)
    assert windows == [tokens[:16], tokens[16:32]]
    assert calibration_windows(tokenizer, text, n_tokens=1000, window=60) == [tokens]


def test_bos_takes_each_windows_first_place():
    """Would catch BOS pushed in front (windows then drift against perplexity's chunks), and EOS in the middle."""
    ends = dict(bos_token_id=256, eos_token_id=256, add_bos_token=True, add_eos_token=True)
    tokenizer, letters = byte_tokenizer(merges=(), special=(("<s>", CONTROL),), **ends), list(b"abcdefg")
    windows = calibration_windows(tokenizer, "abcdefg", n_tokens=8, window=4)
    assert windows == [[256, *letters[:3]], [256, *letters[4:]]]


def test_too_little_text_is_an_error_that_names_the_argument():
    """Would catch a plan made of nothing."""
    with pytest.raises(KsortError, match=r"`calibrate`: the text has 3 tokens, less than one window of 4"):
        calibration_windows(byte_tokenizer(merges=()), "abc", n_tokens=100, window=4)
    with pytest.raises(KsortError, match=r"`calibrate_tokens` 3 is less than one window of 4"):
        calibration_windows(byte_tokenizer(merges=()), "abcdef", n_tokens=3, window=4)


def test_default_text_fills_the_longest_default_window():
    """Would catch a default text that runs out: 4096 tokens a window even at 20 characters a token."""
    assert len(default_text()) > 4096 * 20
