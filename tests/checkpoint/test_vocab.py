"""Tokenizers of checkpoints as GGUF metadata."""

import json
from pathlib import Path

import pytest
from checkpoint_support import LLAMA, N_VOCAB, random_weights, write_checkpoint, write_sentencepiece

from ksort_gguf.checkpoint.pretokenizers import pre_tokenizer_name
from ksort_gguf.errors import KsortError
from ksort_gguf.models.hf_source import open_hf


def test_unknown_pre_tokenizer_is_named():
    """Catches a guess: a wrong tokenizer.ggml.pre makes a model that seems to work and is worse."""
    split = {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": False}
    with pytest.raises(KsortError, match=r"t\.json: unknown pre-tokenizer .*x\+"):
        pre_tokenizer_name({"pre_tokenizer": split}, "t.json")


def test_byte_level_vocabulary(tmp_path: Path, rng):
    """Catches token types lost, ids out of order, unfilled ids, merges given as pairs, BOS that no one asked for."""
    directory = write_checkpoint(tmp_path / "m", LLAMA, random_weights(rng))
    digits = {"type": "Digits", "individual_digits": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "model": {"type": "BPE", "vocab": {"b": 1, "a": 0, "ab": 2}, "merges": [["a", "b"]]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "added_tokens": [{"id": 3, "content": "<s>", "special": True}, {"id": 4, "content": "<tab>", "special": False}],
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "chat_template": "{{ x }}"}))
    metadata = open_hf(directory).metadata
    assert metadata["tokenizer.ggml.model"] == "gpt2"
    assert metadata["tokenizer.ggml.pre"] == "smollm"
    assert metadata["tokenizer.ggml.tokens"][:6] == ["a", "b", "ab", "<s>", "<tab>", "[PAD5]"]
    assert metadata["tokenizer.ggml.token_type"][:6] == [1, 1, 1, 3, 4, 5]
    assert len(metadata["tokenizer.ggml.tokens"]) == N_VOCAB
    assert metadata["tokenizer.ggml.merges"] == ["a b"]
    assert metadata["tokenizer.ggml.bos_token_id"] == 3
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert metadata["tokenizer.chat_template"] == "{{ x }}"


def test_byte_fallback_json_is_what_sentencepiece_says(tmp_path: Path, rng):
    """Catches scores that merge in another order than the model the tokenizer came from, and bytes typed as text."""
    config = {**LLAMA, "vocab_size": 320}
    model = write_sentencepiece(tmp_path / "sp" / "tokenizer.model", n_vocab=310)
    pieces = [model.IdToPiece(token) for token in range(310)]
    tokenizer = {
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "vocab": {text: i for i, text in enumerate(pieces)},
            "merges": [],
        },
        "added_tokens": [{"id": i, "content": pieces[i], "special": True} for i in range(3)],
    }
    weights = random_weights(rng, n_vocab=320)
    write_checkpoint(tmp_path / "sp", config, weights)
    write_checkpoint(tmp_path / "json", config, weights)
    (tmp_path / "json" / "tokenizer.json").write_text(json.dumps(tokenizer))
    from_model, from_json = (open_hf(tmp_path / name).metadata for name in ("sp", "json"))
    assert from_model["tokenizer.ggml.model"] == from_json["tokenizer.ggml.model"] == "llama"
    assert from_model["tokenizer.ggml.tokens"] == from_json["tokenizer.ggml.tokens"]
    assert from_model["tokenizer.ggml.tokens"][310:312] == ["[PAD310]", "[PAD311]"]
    assert from_model["tokenizer.ggml.token_type"][3:] == from_json["tokenizer.ggml.token_type"][3:]
    assert from_model["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]  # <unk>, <s>, </s>, <0x00>
    normal = slice(3 + 256, 310)
    for metadata in (from_model, from_json):
        scores = metadata["tokenizer.ggml.scores"][normal]
        assert scores == sorted(scores, reverse=True) and len(set(scores)) == len(scores)


def test_no_tokenizer_is_said(tmp_path: Path, rng, caplog):
    """Catches a silent conversion without a vocabulary, and one that refuses models for tests."""
    metadata = open_hf(write_checkpoint(tmp_path / "m", LLAMA, random_weights(rng))).metadata
    assert metadata["tokenizer.ggml.model"] == "none"
    assert metadata["llama.vocab_size"] == N_VOCAB
    assert "no tokenizer files" in caplog.text


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json: is not JSON"),
        ("tokenizer.json", '{"model": {"type": "Unigram"}}', "'Unigram' is not supported"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": 99}}}', "'a' has id 99, but vocab_size"),
        ("tekken.json", "{}", r"tekken\.json: this form of tokenizer is not supported"),
        ("tokenizer.model", "nothing", r"tokenizer\.model: is not a SentencePiece model"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": null}}', "tokenizer.json: is damaged"),
        ("tokenizer.json", '{"model": "BPE"}', "tokenizer.json: is damaged"),
        (
            "tokenizer.json",
            '{"model": {"type": "BPE"}, "added_tokens": [{"content": "x"}]}',
            "tokenizer.json: is damaged",
        ),
    ],
)
def test_damaged_tokenizer_is_one_line(tmp_path: Path, rng, file: str, text: str, message: str):
    """Catches tracebacks from tokenizer files, and vocabularies larger than the embedding."""
    directory = write_checkpoint(tmp_path / "m", LLAMA, random_weights(rng))
    (directory / file).write_text(text)
    with pytest.raises(KsortError, match=message):
        open_hf(directory)
