"""Token ids against llama.cpp itself: run with -m peers."""

import random
from pathlib import Path

import pytest
from text_support import (
    BYTE_CHARS,
    CONTROL,
    MERGES,
    NASTY,
    NORMAL,
    SPECIAL,
    byte_metadata,
    score_metadata,
    write_vocabulary,
)

from ksort_gguf.engine.tokenizer.pretokenizers import PRE_TOKENIZERS
from ksort_gguf.engine.tokenizer.tokenizer import Tokenizer


def random_texts(n: int) -> list[str]:
    pool = [
        *"aBz1 \n\r\t'sS!?/_-$+<>é中の한🙂٣²ßǅʰ¼…。",
        "  ",
        "e\u0301",
        "\u00a0",
        "\u3000",
        "\x85",
        "<s>",
        "<tool>",
        "'LL",
        "12",
    ]
    rng = random.Random(7)
    return ["".join(rng.choices(pool, k=rng.randint(1, 40))) for _ in range(n)]


def assert_equals_llama_cpp(metadata: dict, path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    write_vocabulary(metadata, path)
    ours = Tokenizer.from_metadata(metadata, str(path))
    theirs = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    vocabulary = llama_cpp.llama_model_get_vocab(theirs.model)
    for text in (*NASTY, *random_texts(300)):
        for special in (True, False):
            expected = theirs.tokenize(text.encode(), add_bos=special, special=special)
            assert ours.encode(text, add_special=special, parse_special=special) == expected, text
    eog = {token for token in range(ours.n_vocab) if llama_cpp.llama_vocab_is_eog(vocabulary, token)}
    assert ours.eog_ids == eog


GEOMETRY = {
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.attention.head_count": 1,
    "llama.feed_forward_length": 32,
}


@pytest.mark.peers
@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_byte_level_equals_llama_cpp(pre, tmp_path):
    """Any difference from llama.cpp in cutting, merging or special tokens."""
    special = (*SPECIAL, ("<|im_end|>", CONTROL), ("abab", NORMAL))
    metadata = byte_metadata(pre, special=special, bos_token_id=len(BYTE_CHARS) + len(MERGES), eos_token_id=97)
    assert_equals_llama_cpp(GEOMETRY | metadata, tmp_path / "vocabulary.gguf")


@pytest.mark.peers
@pytest.mark.parametrize("levels", [1, 4, 1000])
def test_scores_equal_llama_cpp(levels, tmp_path):
    """Merges by score that differ from llama.cpp's, above all where scores are equal (few levels)."""
    rng = random.Random(levels)
    pieces = {char: 0.0 for char in "▁aBz1e.\n'"}
    while len(pieces) < 300:
        pieces.setdefault("".join(rng.choices("▁aBz1e.'", k=rng.randint(2, 4))), -float(rng.randrange(levels)))
    metadata = score_metadata(pieces, special=SPECIAL[1:])
    assert_equals_llama_cpp(GEOMETRY | metadata, tmp_path / "vocabulary.gguf")
