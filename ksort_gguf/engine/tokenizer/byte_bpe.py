"""Byte-level BPE (tokenizer.ggml.model = "gpt2"), merged by the `tokenizers` library."""

from collections.abc import Mapping, Sequence

import tokenizers
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as Steps

from ksort_gguf.engine.tokenizer.pretokenizers import PreTokenizer
from ksort_gguf.errors import KsortError


class ByteBpe:
    """Encoder of text without special tokens: cut into words, spell their bytes as characters, merge."""

    def __init__(self, ids: Mapping[str, int], merges: Sequence[str], pre: PreTokenizer, file: str):
        """`ids` maps token text to id; `merges` are "left right", first merged first.

        Raises KsortError naming `file` for a merge of what is no token.
        """
        # A byte without a token gives none, but its neighbours must not merge across it: it gets an id to be dropped.
        self._n_vocab = max(ids.values(), default=-1) + 1
        self._missing = [char for char in CHAR_BYTES if char not in ids]
        vocab = {**ids, **{char: self._n_vocab + i for i, char in enumerate(self._missing)}}
        pairs = [_pair(merge, ids, file) for merge in merges]
        self._bpe = tokenizers.Tokenizer(
            tokenizers.models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre.ignore_merges)
        )
        cuts = [Split(tokenizers.Regex(regex), "isolated") for regex in pre.regexes]
        self._bpe.pre_tokenizer = Steps([*cuts, ByteLevel(add_prefix_space=False, use_regex=False)])

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""
        found = self._bpe.encode(text, add_special_tokens=False).ids
        return [token for token in found if token < self._n_vocab] if self._missing else found

    @staticmethod
    def token_bytes(token_text: str) -> bytes:
        """The bytes that a token's text spells; characters outside of the spelling stand for themselves."""
        return b"".join(CHAR_BYTES.get(char) or char.encode() for char in token_text)


def _pair(merge: str, ids: Mapping[str, int], file: str) -> tuple[str, str]:
    left, _, right = merge[1:].partition(" ")  # the first character may itself be a space
    left = merge[:1] + left
    if left not in ids or right not in ids or left + right not in ids:
        raise KsortError(f"{file}: tokenizer.ggml.merges has {merge!r}, which the vocabulary lacks: convert it again")
    return left, right


def _char_bytes() -> dict[str, bytes]:
    """The spelling: printable Latin-1 bytes are their own character, the others U+0100 and on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    chars = {chr(byte): bytes([byte]) for byte in printable}
    return chars | {chr(256 + i): bytes([byte]) for i, byte in enumerate(others)}


CHAR_BYTES = _char_bytes()
