"""Tiny tokenizers for tests of the runner's text side, as GGUF metadata."""

from pathlib import Path

import gguf

from ksort_gguf.engine.tokenizer.byte_bpe import CHAR_BYTES
from ksort_gguf.engine.tokenizer.tokenizer import Tokenizer

BYTE_CHARS = sorted(CHAR_BYTES, key=CHAR_BYTES.get)  # token i of a byte vocabulary spells byte i
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6

# Merges that show where text was cut: they run over digits, spaces, letters, newlines and apostrophes.
MERGES = (
    "1 2", "12 3", "123 4", "Ġ Ġ", "ĠĠ Ġ", "Ġ a", "a b", "Ġa b", "a B", "' s", "' S", "! Ċ", "Ċ Ċ", "č Ċ", "! !", "Ġ !",
    "Ġ 1", "Ċ Ġ", "Ġ Ċ", "Ã ©", "a Ì", "â Ģ", "âĢ Ģ",
)  # fmt: skip

SPECIAL = (("<s>", CONTROL), ("<tool>", USER_DEFINED), ("<tool><s", CONTROL))

NASTY = (  # texts that tokenizers get wrong
    "", " ", "\n", "a\r\nb\r\n\r\n", "  a   b    ", "\t\tx\n\n\n y", "1234 12341234 1 2", "it's IT'S 's' don't 'tis",
    "def f(x):\n    return x ** 2  # ok\n", "日本語テキスト、中文。 한국어", "e\u0301 n\u0303 \u0301x",
    "👩‍👩‍👧 🏳️‍🌈 🇩🇪!!",
    "\x00\x1c\x1f\x7f\x85\xa0\u2000\u2028\u3000\ufeff\u200b", "\U0010ffff\ufffd\ue000", "ab" * 300, " " * 300,
    "1" * 300, "CamelCase HTTPServer snake_case a/b//c", "٣٤٥ ¼ ² ⅷ", "<s>a</s> <tool>b<tool><s",
    "!!\n!!\r\n ! ab!", "éa\u0301b",
)  # fmt: skip


def byte_metadata(pre: str = "gpt-2", merges=MERGES, special=(), **keys) -> dict[str, object]:
    """A byte-level BPE tokenizer: 256 bytes, the results of `merges`, then `special`: (text, kind) pairs.

    `keys` are further keys without their "tokenizer.ggml." prefix.
    """
    tokens = [*BYTE_CHARS, *dict.fromkeys(merge.replace(" ", "") for merge in merges)]
    kinds = [NORMAL] * len(tokens) + [kind for _, kind in special]
    values = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens + [text for text, _ in special],
        "token_type": kinds,
        "merges": list(merges),
        **keys,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def byte_tokenizer(*args, **keys) -> Tokenizer:
    """The tokenizer of `byte_metadata`."""
    return Tokenizer.from_metadata(byte_metadata(*args, **keys), "tiny.gguf")


def score_metadata(pieces: dict[str, float], special=(), with_bytes: bool = True, **keys) -> dict[str, object]:
    """A SentencePiece tokenizer: <unk>, <s>, </s>, the byte tokens, `pieces` with their scores, then `special`."""
    entries = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    if with_bytes:
        entries += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    entries += [(text, score, NORMAL) for text, score in pieces.items()]
    entries += [(text, 0.0, kind) for text, kind in special]
    tokens, scores, kinds = (list(column) for column in zip(*entries, strict=True))
    values = {"model": "llama", "tokens": tokens, "scores": scores, "token_type": kinds, **keys}
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def write_vocabulary(metadata: dict[str, object], path: Path) -> None:
    """A GGUF file of `metadata` alone, as llama.cpp loads it with vocab_only."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
