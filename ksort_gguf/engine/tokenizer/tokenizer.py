"""Text to token ids and back, from the tokenizer.* metadata of a GGUF; the ids equal llama.cpp's."""

import codecs
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ksort_gguf.container.typed import typed
from ksort_gguf.engine.tokenizer.byte_bpe import ByteBpe
from ksort_gguf.engine.tokenizer.pretokenizers import pre_tokenizer
from ksort_gguf.engine.tokenizer.score_bpe import ScoreBpe
from ksort_gguf.engine.tokenizer.special_tokens import Kind, special_tokens
from ksort_gguf.errors import KsortError

MODELS = ("gpt2", "llama", "none")  # tokenizer.ggml.model
_DEFAULT_IDS = {"gpt2": {"bos": 11, "eos": 11}, "llama": {"bos": 1, "eos": 2, "unknown": 0}, "none": {}}
_HIDDEN = (Kind.CONTROL, Kind.UNKNOWN)  # matched in text only with parse_special, left out by skip_special


class Tokenizer:
    """Tokenizer of one model. Build it with `from_metadata`.

    Attributes: bos_id and eos_id (None if there is none), eog_ids (each ends an answer), add_bos and add_eos (whether
    `encode` puts them around a text).
    """

    def __init__(self, metadata: Mapping[str, object], file: str):
        self._file = file
        model = _required(metadata, "tokenizer.ggml.model", "a string", file)
        if model not in MODELS:
            known = ", ".join(MODELS)
            raise KsortError(f"{file}: tokenizer.ggml.model is {model!r}, which is not supported (supported: {known})")
        tokens = _required(metadata, "tokenizer.ggml.tokens", "an array of strings", file) if model != "none" else ()
        self._tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(tokens)]
        ids = {text: i for i, text in enumerate(self._tokens)}
        special = special_tokens(metadata, self._tokens, ids, _DEFAULT_IDS[model], file)
        self._kinds = special.kinds
        self.bos_id, self.eos_id, self.eog_ids = special.bos_id, special.eos_id, special.eog_ids

        self._encoder: ByteBpe | ScoreBpe | None = None
        add_bos = self._space_prefix = False
        if model == "gpt2":
            pre = pre_tokenizer(typed(metadata, "tokenizer.ggml.pre", "a string", file) or "default", file)
            add_bos = pre.add_bos
            merges = _required(metadata, "tokenizer.ggml.merges", "an array of strings", file)
            self._encoder = ByteBpe(ids, merges, pre, file)
        elif model == "llama":
            add_bos = True
            self._space_prefix = typed(metadata, "tokenizer.ggml.add_space_prefix", "true or false", file, True)
            scores = typed(metadata, "tokenizer.ggml.scores", "an array of numbers", file)
            self._encoder = ScoreBpe(ids, scores, special.unk_id, file)
        self.add_bos = typed(metadata, "tokenizer.ggml.add_bos_token", "true or false", file, add_bos)
        self.add_eos = typed(metadata, "tokenizer.ggml.add_eos_token", "true or false", file, False)
        for wanted, token, name in ((self.add_bos, self.bos_id, "bos"), (self.add_eos, self.eos_id, "eos")):
            if wanted and token is None and self._encoder is not None:
                raise KsortError(f"{file}: tokenizer.ggml.add_{name}_token is set but {name}_token_id is missing")
        # llama.cpp looks for the longest special tokens (in bytes) first, all over the text.
        marked = filter(self.is_special, range(len(self._tokens)))
        self._special_ids = sorted(marked, key=lambda i: -len(self._tokens[i].encode()))

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object], file: str) -> "Tokenizer":
        """Build from plain metadata values (arrays as lists or NumPy arrays).

        Raises KsortError naming `file` and the key for a missing, broken or unsupported tokenizer.
        """
        return cls(metadata, file)

    @property
    def n_vocab(self) -> int:
        """Tokens in the vocabulary; 0 if the file has none."""
        return len(self._tokens)

    def token_text(self, token: int) -> str:
        """The text of `token` as the vocabulary writes it (byte-level or SentencePiece spelling)."""
        return self._tokens[token]

    def is_special(self, token: int) -> bool:
        """Whether `token` is a control, unknown or user-defined token: one that is found in text before all others."""
        return self._kinds[token] in (*_HIDDEN, Kind.USER_DEFINED)

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of `text`.

        add_special: put BOS in front and EOS behind where the model asks for them.
        parse_special: take the text of control tokens for the tokens; user-defined tokens always are.
        Raises KsortError if the file has no vocabulary or `text` holds what UTF-8 cannot write.
        """
        if self._encoder is None:
            raise KsortError(f"{self._file}: has no vocabulary (tokenizer.ggml.model is 'none'): use token ids")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise KsortError(f"the text is not valid Unicode at character {error.start}: pass UTF-8") from None
        output = [self.bos_id] if add_special and self.add_bos and self.bos_id is not None else []
        after_special = True  # SentencePiece puts a space in front of the text and behind special tokens
        for part in self._split_special(text, parse_special):
            if isinstance(part, int):
                output.append(part)
            else:
                space = " " if after_special and self._space_prefix else ""
                output += self._encoder.encode(space + part)
            after_special = isinstance(part, int)
        if add_special and self.add_eos and self.eos_id is not None:
            output.append(self.eos_id)
        return output

    def _split_special(self, text: str, parse_special: bool) -> list[str | int]:
        """Cut special tokens out of `text`: a list of non-empty texts and token ids."""
        parts: list[str | int] = [text] if text else []
        for token in self._special_ids:
            mark = self._tokens[token]
            if mark not in text or (self._kinds[token] in _HIDDEN and not parse_special):
                continue
            cut: list[str | int] = []
            for part in parts:
                if isinstance(part, int):
                    cut.append(part)
                    continue
                for i, piece in enumerate(part.split(mark)):
                    cut += ([token] if i else []) + ([piece] if piece else [])
            parts = cut
        return parts

    def token_bytes(self, token: int, skip_special: bool = False) -> bytes:
        """The bytes that `token` stands for; may be part of a UTF-8 character.

        Control and unknown tokens give their own text, or nothing with `skip_special`; unused tokens give nothing.
        """
        text, kind = self._tokens[token], self._kinds[token]
        if kind in _HIDDEN and skip_special:
            return b""
        if self.is_special(token):
            return text.encode()
        if kind == Kind.BYTE:
            return bytes([int(text[3:5], 16)])  # "<0x0A>"
        return self._encoder.token_bytes(text) if kind == Kind.NORMAL and self._encoder is not None else b""

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of `ids`, without the space that `encode` puts in front; bytes that are not UTF-8 become U+FFFD."""
        data = b"".join(self.token_bytes(token, skip_special) for token in ids)
        text = data.decode("utf-8", "replace")
        return text.removeprefix(" ") if self._space_prefix else text

    def stream(self, skip_special: bool = True) -> "Stream":
        """A detokenizer for tokens that come one by one."""
        return Stream(self, skip_special)


class Stream:
    """Turns tokens into text as they come, holding back the bytes of a character that is not complete yet."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The text that `token` completes, perhaps ""."""
        return self._utf8.decode(self._tokenizer.token_bytes(token, self._skip_special))

    def flush(self) -> str:
        """What is left of an unfinished character, as U+FFFD; the stream can then be used again."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def read_text(path: str | Path) -> str:
    """The UTF-8 text in the file `path`, line ends untouched. Raises KsortError naming the file and the byte offset."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise KsortError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise KsortError(f"{path}: not UTF-8 at byte {error.start}: convert the file to UTF-8") from None


def _required(metadata: Mapping[str, object], key: str, kind: str, file: str) -> Any:
    if key not in metadata:
        raise KsortError(f"{file}: missing key {key}: the file's tokenizer is incomplete, convert it again")
    return typed(metadata, key, kind, file)
