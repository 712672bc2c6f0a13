"""Hugging Face checkpoints as metadata and lazy tensors of a stock GGUF."""

from pathlib import Path

import numpy as np
import pytest
from checkpoint_support import HEAD_DIM, LLAMA, N_HEADS, N_KV_HEADS, QWEN2, random_weights, write_checkpoint

from ksort_gguf.errors import KsortError
from ksort_gguf.models.hf_source import open_hf


@pytest.fixture
def llama_dir(tmp_path: Path, rng) -> Path:
    return write_checkpoint(tmp_path / "llama", LLAMA, random_weights(rng))


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
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.*gptq.*not supported"),
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
    for keep in (len(data) - 1, 100, 4, 0):
        shard.write_bytes(data[:keep])
        with pytest.raises(KsortError, match=rf"{shard.name}: is not a whole safetensors file"):
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
    with pytest.raises(KsortError, match=r"index\.json: is not a safetensors index"):
        open_hf(directory)


def test_partial_rotary_factor_of_a_whole_head_alone_passes(tmp_path: Path, rng):
    """Catches a key of another family that is taken for one of Llama's, which turns whole heads."""
    weights = random_weights(rng)
    for factor in (1.0, 0.5):
        rope = {**LLAMA["rope_parameters"], "partial_rotary_factor": factor}
        directory = write_checkpoint(tmp_path / "m", {**LLAMA, "rope_parameters": rope}, weights)
        if factor == 1:
            with open_hf(directory) as whole:
                assert all(attention.rope.n_rot == HEAD_DIM for attention in whole.spec.attentions)
                assert "llama.rope.dimension_count" in whole.metadata
        else:
            with pytest.raises(KsortError, match=r"partial_rotary_factor 0\.5 is not supported"):
                open_hf(directory)


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
