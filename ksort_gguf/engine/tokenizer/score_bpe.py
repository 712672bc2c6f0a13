"""SentencePiece BPE by scores (tokenizer.ggml.model = "llama"), merged in llama.cpp's order.

Neighbouring symbols are merged wherever their joined text is a token: highest token score first, leftmost first among
equals. This cannot be said exactly as a list of ranked merges (two tokens may share a score), hence this file.
"""

import heapq
from collections.abc import Mapping, Sequence

from ksort_gguf.errors import KsortError

_SPACE = "▁"  # U+2581 stands for a space inside tokens
_MAX_CACHED_WORDS = 1 << 18


class ScoreBpe:
    """Encoder of a vocabulary with scores; the cache makes it fast, not thread-safe."""

    def __init__(self, ids: Mapping[str, int], scores: Sequence[float] | None, unk_id: int | None, file: str):
        """`ids` maps token text to id, `scores` has one score a token id (None: all are 0).

        Raises KsortError naming `file` if there are too few scores.
        """
        n_vocab = max(ids.values(), default=-1) + 1
        self._ids = ids
        self._scores = [0.0] * n_vocab if scores is None else [float(score) for score in scores]
        if len(self._scores) < n_vocab:
            raise KsortError(
                f"{file}: tokenizer.ggml.scores has {len(self._scores)} entries for {n_vocab} tokens: convert it again"
            )
        self._unk_id = unk_id
        self._file = file
        self._words: dict[str, list[int]] = {}
        # Two characters that no token holds side by side can never be merged across: text may be cut between them,
        # which leaves short words that repeat.
        self._joinable = {text[i : i + 2] for text in ids for i in range(len(text) - 1)}

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Raises KsortError for a character that has no token, if there is no unknown token."""
        text = text.replace(" ", _SPACE)
        output: list[int] = []
        joinable = self._joinable
        start = 0
        for end in range(1, len(text) + 1):
            if end < len(text) and text[end - 1 : end + 1] in joinable:
                continue
            output += self._encode_word(text[start:end])
            start = end
        return output

    @staticmethod
    def token_bytes(token_text: str) -> bytes:
        """The bytes that a token's text spells."""
        return token_text.replace(_SPACE, " ").encode()

    def _encode_word(self, word: str) -> list[int]:
        found = self._words.get(word)
        if found is None:
            found = [token for symbol in self._merge(word) for token in self._symbol_ids(symbol)]
            if len(self._words) >= _MAX_CACHED_WORDS:
                self._words.clear()
            self._words[word] = found
        return found

    def _merge(self, word: str) -> list[str]:
        """Merge the characters of `word`; returns the symbols that are left, in order."""
        symbols: list[str] = list(word)  # "" once merged into its left neighbour
        before = list(range(-1, len(word) - 1))
        after = [*range(1, len(word)), -1]
        queue: list[tuple[float, int, int, str]] = []  # -score, left, right, joined text

        def offer(left: int, right: int) -> None:
            if left >= 0 and right >= 0:
                joined = symbols[left] + symbols[right]
                token = self._ids.get(joined)
                if token is not None:
                    heapq.heappush(queue, (-self._scores[token], left, right, joined))

        for right in range(1, len(symbols)):
            offer(right - 1, right)
        while queue:
            _, left, right, joined = heapq.heappop(queue)
            if not symbols[left] or not symbols[right] or len(symbols[left]) + len(symbols[right]) != len(joined):
                continue  # one of the two was merged since this was offered
            symbols[left], symbols[right] = joined, ""
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            offer(before[left], left)
            offer(left, after[left])
        return [symbol for symbol in symbols if symbol]

    def _symbol_ids(self, symbol: str) -> list[int]:
        """The token of `symbol`, else its bytes' tokens, else the unknown token."""
        if symbol in self._ids:
            return [self._ids[symbol]]
        names = [f"<0x{byte:02X}>" for byte in symbol.encode()]
        if all(name in self._ids for name in names):
            return [self._ids[name] for name in names]
        if self._unk_id is None:
            raise KsortError(f"{self._file}: the vocabulary has no token for {symbol!r}: leave it out of the text")
        return [self._unk_id]
