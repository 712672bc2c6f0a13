"""Token ids and text: cuts, merges, special tokens, byte streams."""

import pytest
from text_support import (
    BYTE_CHARS,
    CONTROL,
    MERGES,
    NASTY,
    NORMAL,
    SPECIAL,
    USER_DEFINED,
    byte_metadata,
    byte_tokenizer,
    score_metadata,
)

from ksort_gguf.engine.tokenizer.tokenizer import Tokenizer, read_text
from ksort_gguf.errors import KsortError


def texts_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.decode([token]) for token in ids]


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("gpt-2", "12341234", ["1234", "1234"]),
        ("smollm", "1234", ["1", "2", "3", "4"]),
        ("qwen2", "1234", ["1", "2", "3", "4"]),
        ("llama-bpe", "1234", ["123", "4"]),
        ("gpt-2", "ab'sab'S", ["ab", "'s", "ab", "'", "S"]),
        ("qwen2", "ab'sab'S", ["ab", "'s", "ab", "'S"]),
        ("gpt-2", "ab!\n\nab", ["ab", "!", "\n", "\n", "ab"]),
        ("llama-bpe", "ab!\n\nab", ["ab", "!\n", "\n", "ab"]),
        ("gpt-2", "ab   ab", ["ab", "  ", " ab"]),
        ("smollm", "ab   1", ["ab", "   ", "1"]),
        ("qwen2", "a\r\n ab", ["a", "\r\n", " ab"]),
        ("gpt-2", "é", ["é"]),
    ],
)
def test_cuts(pre, text, expected):
    """A regex taken from another model's family: words are cut elsewhere and every perplexity is a little wrong."""
    tokenizer = byte_tokenizer(pre)
    assert texts_of(tokenizer, tokenizer.encode(text, add_special=False)) == expected


def test_accents_are_not_composed():
    """Unicode normalization, which llama.cpp does not do: a + U+0301 would become one character and other tokens."""
    tokenizer = byte_tokenizer()
    assert texts_of(tokenizer, tokenizer.encode("\u00e9")) == ["\u00e9"]
    assert tokenizer.encode("e\u0301") == list("e\u0301".encode())


def test_ignore_merges_takes_whole_words():
    """llama-bpe words that are tokens but that no merges lead to would fall apart."""
    special = (("abab", NORMAL),)
    whole = byte_tokenizer("llama-bpe", special=special, bos_token_id=0)
    assert texts_of(whole, whole.encode("abab", add_special=False)) == ["abab"]
    merged = byte_tokenizer("qwen2", special=special)
    assert texts_of(merged, merged.encode("abab")) == ["ab", "ab"]


def test_no_merge_across_a_missing_byte():
    """A byte that the vocabulary lacks is dropped before merging: its neighbours melt into one token."""
    metadata = byte_metadata(merges=("a b",))
    metadata["tokenizer.ggml.tokens"][0xF1] = "gone"
    tokenizer = Tokenizer.from_metadata(metadata, "tiny.gguf")
    spelled = [tokenizer.token_text(token) for token in tokenizer.encode("a\U00040000b")]
    assert spelled == ["a", *(BYTE_CHARS[byte] for byte in (0x80, 0x80, 0x80)), "b"]


def test_control_tokens_need_parse_special():
    """A user's text smuggles control tokens in, or user-defined tokens are missed."""
    tokenizer = byte_tokenizer(special=SPECIAL)
    assert texts_of(tokenizer, tokenizer.encode("<s><tool>a", parse_special=True)) == ["<s>", "<tool>", "a"]
    plain = texts_of(tokenizer, tokenizer.encode("<s><tool>a", parse_special=False))
    assert plain == ["<", "s", ">", "<tool>", "a"]


def test_longest_special_token_wins_everywhere():
    """Special tokens searched from left to right: llama.cpp takes the longest ones out first."""
    tokenizer = byte_tokenizer(special=SPECIAL)
    assert texts_of(tokenizer, tokenizer.encode("<tool><s>")) == ["<tool><s", ">"]


def test_bos_and_eos():
    """BOS left out for llama-bpe files without the key, or added against the key."""
    bos = {"special": SPECIAL, "bos_token_id": len(BYTE_CHARS) + len(MERGES), "eos_token_id": 97}
    assert byte_tokenizer("llama-bpe", **bos).encode("a") == [bos["bos_token_id"], 97]
    assert byte_tokenizer("llama-bpe", **bos).encode("a", add_special=False) == [97]
    assert byte_tokenizer("llama-bpe", **bos, add_bos_token=False).encode("a") == [97]
    assert byte_tokenizer("qwen2", **bos).encode("a") == [97]
    assert byte_tokenizer("qwen2", **bos, add_eos_token=True).encode("b") == [98, 97]


def test_eog_ids():
    """Chat models whose eos_token_id is <|endoftext|> talk on after <|im_end|>."""
    special = (("<|im_end|>", NORMAL), ("<|endoftext|>", CONTROL), ("<|im_start|>", CONTROL), ("<|fim_pad|>", NORMAL))
    tokenizer = byte_tokenizer(special=special, eos_token_id=5, eot_token_id=6)
    ends = {5, 6} | {tokenizer.encode(text)[0] for text in ("<|im_end|>", "<|endoftext|>", "<|fim_pad|>")}
    assert tokenizer.eog_ids == ends
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>"), skip_special=True) == "a"  # its marked kind is overruled


def test_end_is_not_the_end_in_gpt_oss():
    """gpt-oss answers cut off after the analysis channel, whose <|end|> other models use to end."""
    marks = ("<|end|>", "<|return|>", "<|call|>")
    tokenizer = byte_tokenizer(special=[(mark, CONTROL) for mark in marks])
    end, *others = (tokenizer.encode(mark)[0] for mark in marks)
    assert end not in tokenizer.eog_ids
    assert set(others) <= tokenizer.eog_ids


def test_stream_holds_back_unfinished_characters():
    """Replacement characters in streamed text where a character is split over tokens."""
    stream = byte_tokenizer(merges=()).stream()
    assert [stream.feed(byte) for byte in "é🙂a".encode()] == ["", "é", "", "", "", "🙂", "a"]
    assert stream.flush() == ""
    assert stream.feed(0xF0) == ""
    assert stream.flush() == "\ufffd"
    assert stream.feed(97) == "a"


@pytest.mark.parametrize("text", NASTY)
def test_decode_inverts_encode(text):
    """Text that changes on its way through the tokenizer: line ends, spaces, controls."""
    for tokenizer in (
        byte_tokenizer("qwen2"),
        byte_tokenizer("llama-bpe", add_bos_token=False),
        Tokenizer.from_metadata(score_metadata(LETTERS, add_bos_token=False), "tiny.gguf"),
    ):
        assert tokenizer.decode(tokenizer.encode(text, parse_special=False)) == text


def scored(pieces, special=(), **keys) -> Tokenizer:
    keys = {"add_bos_token": False, **keys}
    return Tokenizer.from_metadata(score_metadata(pieces, special, **keys), "tiny.gguf")


def spell(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.token_text(token) for token in tokenizer.encode(text)]


LETTERS = {"▁": 0.0, "a": 0.0, "b": 0.0, "c": 0.0}


@pytest.mark.parametrize(
    ("pieces", "text", "expected"),
    [
        ({"ab": -2.0, "bc": -1.0}, "abc", ["▁", "a", "bc"]),  # the better score first
        ({"ab": -1.0, "bc": -1.0}, "abc", ["▁", "ab", "c"]),  # leftmost among equals
        ({"aa": -1.0}, "aaaaa", ["▁", "aa", "aa", "a"]),
        ({"▁a": -1.0, "a▁b": -2.0}, "a b", ["▁a", "▁", "b"]),
        ({"a▁": -1.0, "a▁b": -2.0, "▁b": -3.0}, "a bc", ["▁", "a▁b", "c"]),  # across a word's end
        ({}, "é", ["▁", "<0xC3>", "<0xA9>"]),
    ],
)
def test_score_merges(pieces, text, expected):
    """SentencePiece merges in the wrong order, or words cut where a token would span the cut."""
    assert spell(scored(LETTERS | pieces), text) == expected


def test_space_prefix_after_special_tokens():
    """Prompts of Llama 2 chats: a space is put in front of the text and behind each special token, unless the file
    says no."""
    special = (("[X]", USER_DEFINED),)
    assert spell(scored(LETTERS, special), "a[X]b") == ["▁", "a", "[X]", "▁", "b"]
    assert spell(scored(LETTERS, special, add_space_prefix=False), "a[X]b") == ["a", "[X]", "b"]


def test_unknown_characters_without_byte_tokens():
    """A vocabulary without byte fallback crashes on characters that it lacks."""
    tokenizer = Tokenizer.from_metadata(score_metadata(LETTERS, with_bytes=False), "tiny.gguf")
    assert spell(tokenizer, "aé") == ["<s>", "▁", "a", "<unk>"]


def drop(metadata: dict, key: str) -> dict:
    return {name: value for name, value in metadata.items() if name != f"tokenizer.ggml.{key}"}


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        (byte_metadata("martian"), "'martian', which is not supported .supported: .*qwen2"),
        (byte_metadata() | {"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model is 'bert'"),
        (drop(byte_metadata(), "model"), "missing key tokenizer.ggml.model"),
        (drop(byte_metadata(), "tokens"), "missing key tokenizer.ggml.tokens"),
        (drop(byte_metadata(), "merges"), "missing key tokenizer.ggml.merges"),
        (byte_metadata() | {"tokenizer.ggml.merges": ["a x"]}, "'a x', which the vocabulary lacks"),
        (byte_metadata() | {"tokenizer.ggml.token_type": [1]}, "token_type has 1 entries"),
        (score_metadata(LETTERS) | {"tokenizer.ggml.scores": [0.0]}, "scores has 1 entries"),
        (byte_metadata(bos_token_id="x"), "bos_token_id is 'x', expected an integer"),
        (byte_metadata(add_bos_token="false"), "add_bos_token is 'false', expected true or false"),
        (byte_metadata(token_type="x"), "token_type is 'x', expected an array of numbers"),
        (byte_metadata() | {"tokenizer.ggml.merges": [1]}, "merges is list, expected an array of strings"),
    ],
)
def test_broken_metadata_is_one_clear_line(metadata, said):
    """A traceback, or a tokenizer that is silently wrong, for a file we cannot read."""
    with pytest.raises(KsortError, match=said) as caught:
        Tokenizer.from_metadata(metadata, "tiny.gguf")
    assert str(caught.value).startswith("tiny.gguf: ")
    assert "\n" not in str(caught.value)


def test_no_vocabulary():
    """Files without a vocabulary refuse to load instead of refusing text."""
    tokenizer = Tokenizer.from_metadata({"tokenizer.ggml.model": "none"}, "tiny.gguf")
    assert tokenizer.n_vocab == 0
    with pytest.raises(KsortError, match=r"tiny\.gguf: has no vocabulary"):
        tokenizer.encode("a")


def test_text_that_is_not_unicode():
    """Undecodable bytes on the command line arrive as lone surrogates: a traceback from the tokenizer's library."""
    with pytest.raises(KsortError, match="not valid Unicode at character 1"):
        byte_tokenizer().encode("a\udcff")


def test_read_text(tmp_path):
    """Universal newlines change the tokens of CRLF files; bad bytes are replaced without a word."""
    path = tmp_path / "text"
    path.write_bytes(b"a\r\nb\rc\n")
    assert read_text(path) == "a\r\nb\rc\n"
    path.write_bytes("é".encode() + b"\xff")
    with pytest.raises(KsortError, match="text: not UTF-8 at byte 2"):
        read_text(path)
    with pytest.raises(KsortError, match="cannot be read: No such file"):
        read_text(tmp_path / "nothing")
