"""Sources: GGUF files and Hugging Face checkpoints as metadata and lazy tensors."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoint_support import HEAD_DIM, LLAMA, N_HEADS, N_KV_HEADS, QWEN2, random_weights, write_checkpoint

from ksort_gguf.convert import convert
from ksort_gguf.errors import KsortError
from ksort_gguf.families.rope import row_map, stock_tables
from ksort_gguf.gguf_output import GgufOutput
from ksort_gguf.sources.gguf_file import open_gguf
from ksort_gguf.sources.gguf_values import decode_at, encode, string, uint32
from ksort_gguf.sources.hf import open_hf
from ksort_gguf.sources.open_model import open_model

_Value = gguf.GGUFValueType


@pytest.fixture
def llama_dir(tmp_path: Path, rng) -> Path:
    return write_checkpoint(tmp_path / "llama", LLAMA, random_weights(rng))


@pytest.fixture
def stock_gguf(tmp_path: Path, llama_dir: Path) -> Path:
    convert(llama_dir, tmp_path / "stock.gguf", plan="none", outtype="f32", block_size=16)
    return tmp_path / "stock.gguf"


@pytest.mark.parametrize(
    ("value", "kind", "element"),
    [
        ("", _Value.STRING, None),
        ([], _Value.ARRAY, _Value.STRING),
        ([], _Value.ARRAY, _Value.INT32),
        (["a", "", "\u00e9"], _Value.ARRAY, _Value.STRING),
        ([-1, 2**31 - 1], _Value.ARRAY, _Value.INT32),
        (2**64 - 1, _Value.UINT64, None),
        (True, _Value.BOOL, None),
    ],
)
def test_values_survive(value, kind, element):
    """Catches dropped empty strings and arrays, and wrong widths."""
    encoded = encode(value, kind, element)
    assert encoded.decode() == value
    assert decode_at(encoded.raw, 0, kind)[1] == len(encoded.raw)


def test_nested_array_is_decoded():
    """Catches a parser that takes the inner arrays' headers for values and loses its place in the file."""
    inner = encode([7, 8], _Value.ARRAY, _Value.UINT8).raw
    raw = struct.pack("<IQ", _Value.ARRAY, 2) + inner + inner
    assert decode_at(raw, 0, _Value.ARRAY) == ([[7, 8], [7, 8]], len(raw))


def test_gguf_package_reads_the_same(stock_gguf: Path):
    """Catches headers that only our own reader understands, and tensors read from the wrong offset."""
    theirs = gguf.GGUFReader(stock_gguf)
    with open_gguf(stock_gguf) as ours:
        assert [t.name for t in theirs.tensors] == list(ours.tensors)
        for tensor in theirs.tensors:
            assert np.array_equal(ours.tensors[tensor.name].read_f32().ravel(), tensor.data.ravel())
        for key, value in ours.metadata.items():
            assert theirs.fields[key].contents() == value


def test_chunks_are_the_tensor(stock_gguf: Path, monkeypatch):
    """Catches chunked copies that skip or repeat rows at the seams."""
    with open_gguf(stock_gguf) as source:
        tensor = source.tensors["token_embd.weight"]
        monkeypatch.setattr("ksort_gguf.sources.base.CHUNK_BYTES", 13 * tensor.row_bytes)
        chunks = list(tensor.chunks())
        assert [chunk.nbytes // tensor.row_bytes for chunk in chunks] == [13, 13, 13, 1]
        assert np.array_equal(np.concatenate(chunks), tensor.read())


@pytest.mark.parametrize("keep", [3, 40, 5000, -1])
def test_truncated_gguf_is_one_line(stock_gguf: Path, tmp_path: Path, keep: int):
    """Catches struct errors or short reads where a download was cut off, in the header or in a tensor."""
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(stock_gguf.read_bytes()[:keep])
    with pytest.raises(KsortError, match=r"^[^\n]*cut\.gguf[^\n]*$"):
        open_gguf(cut)


def test_newer_gguf_version_names_both_numbers(stock_gguf: Path):
    """Catches a reader that goes on parsing a layout it does not know."""
    data = bytearray(stock_gguf.read_bytes())
    struct.pack_into("<I", data, 4, 4)
    stock_gguf.write_bytes(data)
    with pytest.raises(KsortError, match=r"version 4 .* 3"):
        open_gguf(stock_gguf)


def test_newer_ksort_version_names_both_numbers(stock_gguf: Path):
    """Catches a reader that runs files of a later format as if they were today's."""
    data = stock_gguf.read_bytes()
    key = b"ksort.format_version" + struct.pack("<I", _Value.UINT32)
    stock_gguf.write_bytes(data.replace(key + struct.pack("<I", 1), key + struct.pack("<I", 9)))
    with pytest.raises(KsortError, match=r"format_version is 9, newer than 1"):
        open_gguf(stock_gguf)


def test_unknown_tensor_type_names_the_tensor(stock_gguf: Path):
    """Catches a bare ValueError for weight types from the future."""
    data = bytearray(stock_gguf.read_bytes())
    name = b"token_embd.weight"
    struct.pack_into("<I", data, data.index(name) + len(name) + 4 + 2 * 8, 9999)
    stock_gguf.write_bytes(data)
    with pytest.raises(KsortError, match=r"token_embd\.weight has type 9999"):
        open_gguf(stock_gguf)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"general.architecture": string("gpt2")}, "'gpt2' is not supported"),
        ({"general.type": string("kplan")}, "plan file, not a model"),
        ({"general.type": string("adapter")}, "'adapter'"),
        ({"split.count": uint32(2)}, "one part of a split model"),
        ({"llama.expert_count": uint32(8)}, "mixture of experts"),
        ({"llama.rope.scaling.type": string("yarn")}, "'yarn' is not supported"),
        ({"llama.attention.layer_norm_rms_epsilon": string("x")}, "rms_epsilon is 'x'"),
        ({"general.architecture": string("ksort-llama")}, r"missing key ksort-llama\."),
        ({"llama.block_count": uint32(2**32 - 1)}, "at most 1024"),
        ({"llama.rope.freq_base": encode(0.0, _Value.FLOAT32)}, r"rope\.freq_base is 0"),
        ({"llama.attention.sliding_window": encode(float("nan"), _Value.FLOAT32)}, "sliding_window is nan"),
        ({"ksort.format_version": string("1")}, "format_version is '1', expected an integer"),
    ],
)
def test_models_that_cannot_run_are_refused(stock_gguf: Path, tmp_path: Path, values: dict, message: str):
    """Catches files that open without complaint and fail, or answer nonsense, much later."""
    with open_gguf(stock_gguf) as source, GgufOutput(tmp_path / "o.gguf", {**source.values, **values}, []):
        pass
    with pytest.raises(KsortError, match=rf"o\.gguf: .*{message}"):
        open_gguf(tmp_path / "o.gguf")


@pytest.mark.parametrize("n_rot", [HEAD_DIM, HEAD_DIM // 2])
def test_row_map_keeps_each_channels_part_in_rope(n_rot: int):
    """Catches a permutation that pairs channels of different frequencies, or swaps the sides of pairs."""
    half, interleaved = (stock_tables(HEAD_DIM, n_rot, order) for order in ("half", "interleaved"))
    head_map = row_map(HEAD_DIM, n_rot, "half", "interleaved")
    assert np.array_equal(half.sign[head_map], interleaved.sign)
    assert np.array_equal(half.frequency[head_map], interleaved.frequency)
    assert np.array_equal(head_map[row_map(HEAD_DIM, n_rot, "interleaved", "half")], np.arange(HEAD_DIM))


def test_llama_rows_are_interleaved_per_head(tmp_path: Path, rng):
    """Catches reordering K with the query head count, and biases left in the other order."""
    weights = random_weights(rng, biases=True)
    source = open_hf(write_checkpoint(tmp_path / "m", LLAMA, weights), "f32")
    for part, n_heads in (("q", N_HEADS), ("k", N_KV_HEADS)):
        for kind in ("weight", "bias"):
            original = weights[f"model.layers.1.self_attn.{part}_proj.{kind}"]
            # llama.cpp's converter: [heads, 2, d/2, ...] -> [heads, d/2, 2, ...]
            halves = original.reshape(n_heads, 2, HEAD_DIM // 2, *original.shape[1:])
            expected = halves.swapaxes(1, 2).reshape(original.shape)
            assert np.array_equal(source.tensors[f"blk.1.attn_{part}.{kind}"].read_f32(), expected)


def test_partial_rows_of_reordered_tensor(llama_dir: Path):
    """Catches row ranges that start inside a head and are cut before the permutation instead of after it."""
    tensor = open_hf(llama_dir, "f32").tensors["blk.0.attn_q.weight"]
    whole = tensor.read().reshape(tensor.shape[0], -1)
    assert np.array_equal(tensor.read_rows(5, 75).reshape(70, -1), whole[5:75])


def test_shards_give_what_one_file_gives(tmp_path: Path, rng):
    """Catches tensors lost or mixed up between shards."""
    weights = random_weights(rng, biases=True)
    one = open_hf(write_checkpoint(tmp_path / "one", QWEN2, weights), "f32")
    many = open_hf(write_checkpoint(tmp_path / "many", QWEN2, weights, n_shards=3), "f32")
    assert set(one.tensors) == set(many.tensors)
    for name, tensor in one.tensors.items():
        assert np.array_equal(tensor.read(), many.tensors[name].read())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.* not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"vocab_size": 41}, "vocab_size is 41"),
        ({"num_key_value_heads": 4}, "k_proj.*64 rows"),
        ({"num_hidden_layers": 3}, r"blk\.2\.attn_norm\.weight is missing"),
        ({"num_hidden_layers": 1}, r"model\.layers\.1\..* no place"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"num_hidden_layers": 10**9}, "at most 1024"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings"),
        ({"intermediate_size": 49}, r"ffn_gate\.weight has shape \[48, 128\].* \[49, 128\]"),
        ({"head_dim": 33}, "head dimension 33 is odd"),
        ({"rope_parameters": "linear"}, "RoPE parameters 'linear'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one set for all layers"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.0}}, "factor is 0.0"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": -3}, "sliding_window is -3"),
        ({"sliding_window": 32, "layer_types": ["full_attention", "sliding_attention"]}, "1 of 2 layers"),
    ],
)
def test_config_that_does_not_fit_is_one_line(tmp_path: Path, rng, change: dict, message: str):
    """Catches models that convert without complaint and then compute something else."""
    directory = write_checkpoint(tmp_path / "m", {**LLAMA, **change}, random_weights(rng))
    with pytest.raises(KsortError, match=message):
        open_hf(directory)


def test_damaged_shards_are_one_line(tmp_path: Path, rng):
    """Catches tracebacks, and silently short tensors, from interrupted downloads."""
    directory = write_checkpoint(tmp_path / "m", LLAMA, random_weights(rng), n_shards=2)
    shard = directory / "model-00002-of-00002.safetensors"
    data = shard.read_bytes()
    for keep, message in ((len(data) - 1, "ends at byte"), (100, "ends inside its header"), (4, "not a safetensors")):
        shard.write_bytes(data[:keep])
        with pytest.raises(KsortError, match=rf"{shard.name}.*{message}"):
            open_hf(directory)
    shard.unlink()
    with pytest.raises(KsortError, match=rf"{shard.name}: cannot be read"):
        open_hf(directory)


def test_tensor_without_a_place_is_refused_by_name(tmp_path: Path, rng):
    """Catches dropping weights that the GGUF architecture cannot hold, such as MLP biases."""
    weights = random_weights(rng)
    weights["model.layers.0.mlp.up_proj.bias"] = np.zeros(48, np.float32)
    with pytest.raises(KsortError, match=r"mlp\.up_proj\.bias has no place"):
        open_hf(write_checkpoint(tmp_path / "m", LLAMA, weights))


def test_misshapen_tensor_is_refused_by_name(tmp_path: Path, rng):
    """Catches converting weights of another shape than config.json says, which only loading the result would notice."""
    weights = random_weights(rng)
    weights["model.layers.1.mlp.up_proj.weight"] = np.zeros((48, 127), np.float32)
    with pytest.raises(KsortError, match=r"blk\.1\.ffn_up\.weight has shape \[48, 127\].* \[48, 128\]"):
        open_hf(write_checkpoint(tmp_path / "m", LLAMA, weights))


def test_index_of_other_things_than_names_is_one_line(tmp_path: Path, rng):
    """Catches a traceback for a weight_map whose values are no file names."""
    directory = write_checkpoint(tmp_path / "m", LLAMA, random_weights(rng), n_shards=2)
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}')
    with pytest.raises(KsortError, match=r"/3: cannot be read"):
        open_hf(directory)


def test_partial_rotary_factor_is_ignored(tmp_path: Path, rng):
    """Catches rotating half of a head where transformers' Llama, which ignores the key, rotates all of it."""
    rope = {**LLAMA["rope_parameters"], "partial_rotary_factor": 0.5}
    weights = random_weights(rng)
    partial = open_hf(write_checkpoint(tmp_path / "m", {**LLAMA, "rope_parameters": rope}, weights))
    assert partial.geometry.n_rot == HEAD_DIM
    assert "llama.rope.dimension_count" in partial.metadata


def test_missing_output_is_an_error_unless_tied(tmp_path: Path, rng):
    """Catches an untied model that quietly gets its embedding as output projection."""
    weights = random_weights(rng)
    del weights["lm_head.weight"]
    with pytest.raises(KsortError, match=r"output\.weight is missing"):
        open_hf(write_checkpoint(tmp_path / "untied", LLAMA, weights))
    tied = open_hf(write_checkpoint(tmp_path / "tied", {**LLAMA, "tie_word_embeddings": True}, weights))
    assert "output.weight" not in tied.tensors


def test_outtype_rules(llama_dir: Path):
    """Catches norms below F32, and Q8_0 rows that end inside a block (48 values) not falling back to F16."""
    types = {name: tensor.type.name for name, tensor in open_hf(llama_dir, "q8_0").tensors.items()}
    assert types["blk.0.attn_norm.weight"] == "F32"
    assert types["blk.0.ffn_down.weight"] == "F16"  # rows of 48
    assert types["blk.0.attn_q.weight"] == "Q8_0"  # rows of 128


def test_transformers_4_config_means_the_same(tmp_path: Path, rng):
    """Catches rope_theta and scaling read in only one of the two spellings of config.json."""
    weights = random_weights(rng)
    new = {**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}}
    old = {key: value for key, value in LLAMA.items() if key != "rope_parameters"}
    old |= {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "float32"}
    expected = open_hf(write_checkpoint(tmp_path / "m", new, weights)).metadata
    assert open_hf(write_checkpoint(tmp_path / "m", old, weights)).metadata == expected
    assert (expected["llama.rope.freq_base"], expected["llama.rope.scaling.factor"]) == (5000.0, 2.0)


def test_llama3_factors(tmp_path: Path, rng):
    """Catches the smooth band between kept and slowed frequencies being computed the wrong way round."""
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    source = open_hf(write_checkpoint(tmp_path / "m", {**LLAMA, "rope_parameters": rope}, random_weights(rng)))
    factors = source.tensors["rope_freqs.weight"].read_f32()
    wavelength = 2 * np.pi * 500000.0 ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    assert (factors[:2] == 1.0).all() and wavelength[1] < 16  # below 64 / 4: kept
    smooth = (64 / wavelength[2] - 1) / 3
    assert factors[2] == pytest.approx(1 / ((1 - smooth) / 8 + smooth), rel=1e-5) and 16 < wavelength[2] < 64
    assert (factors[3:] == 8.0).all()


def test_quantized_gguf_is_never_requantized(tmp_path: Path, llama_dir: Path):
    """Catches --outtype expanding or re-rounding quantized weights."""
    convert(llama_dir, tmp_path / "q.gguf", plan="none", outtype="q8_0")
    with pytest.raises(KsortError, match=r"--outtype f16: .* never re-quantized"):
        open_model(tmp_path / "q.gguf", "f16")
