"""The tokenizer of a Hugging Face directory as GGUF metadata, as llama.cpp's converter writes it."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import gguf

from ksort_gguf.checkpoint.config import read_json
from ksort_gguf.checkpoint.pretokenizers import pre_tokenizer_name
from ksort_gguf.errors import KsortError

_LOG = logging.getLogger(__name__)
_ADDED_SCORE = -1000.0
_UNUSED_SCORE = -10000.0
_SPACE = "\u2581"  # SentencePiece's spelling of a space


@dataclass
class _Vocab:
    """Text, score and type of each token; places without a token are unused."""

    texts: list[str]
    scores: list[float]
    types: list[int]

    @classmethod
    def unused(cls, n_vocab: int) -> "_Vocab":
        """A vocabulary of padding tokens."""
        types = [int(gguf.TokenType.UNUSED)] * n_vocab
        return cls([f"[PAD{i}]" for i in range(n_vocab)], [_UNUSED_SCORE] * n_vocab, types)

    def set(self, token: int, text: str, score: float, kind: gguf.TokenType) -> None:
        self.texts[token], self.scores[token], self.types[token] = text, score, int(kind)


def add_vocabulary(writer: gguf.GGUFWriter, directory: Path, n_vocab: int, is_llama: bool) -> None:
    """Add all tokenizer.* keys to `writer`.

    n_vocab: rows of the embedding; tokens that the tokenizer lacks become unused "[PAD<id>]".
    is_llama: add what llama.cpp adds for that family.
    Without any tokenizer file, tokenizer.ggml.model is "none" and a warning is logged. Raises KsortError.
    """
    tokenizer_json = directory / "tokenizer.json"
    if (directory / "tokenizer.model").is_file():
        _add_score_bpe(writer, _sentencepiece_vocab(directory, n_vocab))
        _special_vocab(directory, load_merges=False, n_vocab=n_vocab).add_to_gguf(writer, quiet=True)
    elif tokenizer_json.is_file():
        tokenizer = read_json(tokenizer_json)
        try:
            _add_tokenizer_json(writer, directory, tokenizer, n_vocab)
        except (KeyError, TypeError, AttributeError) as error:  # a node of another kind than its place asks for
            raise KsortError(f"{tokenizer_json}: is damaged ({error}): get it again") from None
    else:
        _refuse_other_tokenizers(directory)
        _LOG.warning("%s: no tokenizer files: the output has no vocabulary and takes token ids only", directory)
        writer.add_tokenizer_model("none")
        if gguf.Keys.LLM.VOCAB_SIZE.format(arch=writer.arch) not in writer.kv_data[0]:
            writer.add_vocab_size(n_vocab)
        return
    if is_llama:
        _add_llama_keys(writer, directory, n_vocab)


def _add_tokenizer_json(writer: gguf.GGUFWriter, directory: Path, tokenizer: dict, n_vocab: int) -> None:
    """The tokenizer that a parsed tokenizer.json describes. Raises what dict access does if it is malformed."""
    file = directory / "tokenizer.json"
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE":
        raise KsortError(f"{file}: tokenizer model {model.get('type')!r} is not supported (BPE is)")
    if model.get("byte_fallback"):
        _add_score_bpe(writer, _byte_fallback_vocab(tokenizer, file, n_vocab))
        _add_special_vocab(writer, _special_vocab(directory, load_merges=False, n_vocab=n_vocab))
    else:
        _add_byte_level_bpe(writer, directory, tokenizer, n_vocab)


def _refuse_other_tokenizers(directory: Path) -> None:
    """Raise KsortError if there is a tokenizer after all, in a form that is not read."""
    for name in ("tekken.json", "vocab.json", "vocab.txt"):
        if (directory / name).is_file():
            raise KsortError(f"{directory / name}: this form of tokenizer is not supported: save it as tokenizer.json")


def _add_byte_level_bpe(writer: gguf.GGUFWriter, directory: Path, tokenizer: dict, n_vocab: int) -> None:
    """tokenizer.ggml.model "gpt2"."""
    file = directory / "tokenizer.json"
    vocab = _Vocab.unused(n_vocab)
    for text, token in tokenizer["model"].get("vocab", {}).items():
        _check_id(token, text, n_vocab, file)
        vocab.set(token, text, 0.0, gguf.TokenType.NORMAL)
    _set_added(vocab, tokenizer, n_vocab, file)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(tokenizer, str(file)))
    writer.add_token_list(vocab.texts)
    writer.add_token_types(vocab.types)
    _add_special_vocab(writer, _special_vocab(directory, load_merges=True))


def _add_score_bpe(writer: gguf.GGUFWriter, vocab: _Vocab) -> None:
    """tokenizer.ggml.model "llama": SentencePiece's BPE, which merges by score."""
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocab.texts)
    writer.add_token_scores(vocab.scores)
    writer.add_token_types(vocab.types)


def _special_vocab(directory: Path, load_merges: bool, n_vocab: int | None = None) -> gguf.SpecialVocab:
    """Special token ids, add_bos/add_eos, chat templates and merges, by the gguf package."""
    try:
        return gguf.SpecialVocab(directory, load_merges=load_merges, n_vocab=n_vocab)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise KsortError(f"{directory}: the tokenizer's files are damaged ({error}): get them again") from None


def _add_special_vocab(writer: gguf.GGUFWriter, special: gguf.SpecialVocab) -> None:
    """Add special tokens, templates and merges that go with a tokenizer.json.

    If nothing in the directory asks for BOS, transformers adds none; that is said, since the default of some GGUF
    tokenizers is to add it.
    """
    special.add_special_token.setdefault("bos", False)
    special.add_to_gguf(writer, quiet=True)


def _add_llama_keys(writer: gguf.GGUFWriter, directory: Path, n_vocab: int) -> None:
    config_file = directory / "tokenizer_config.json"
    if config_file.is_file():
        add_prefix_space = read_json(config_file).get("add_prefix_space")
        if isinstance(add_prefix_space, bool):
            writer.add_add_space_prefix(add_prefix_space)
    if n_vocab == 49152:  # Granite and SmolLM, which have never seen a BOS whatever their tokenizer files ask for
        writer.kv_data[0].pop(gguf.Keys.Tokenizer.ADD_BOS, None)
        writer.add_add_bos_token(False)


def _sentencepiece_vocab(directory: Path, n_vocab: int) -> _Vocab:
    """tokenizer.model, and the tokens that added_tokens.json, tokenizer_config.json and tokenizer.json add."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise KsortError(f"{directory}: tokenizer.model needs sentencepiece: pip install sentencepiece") from None
    file = directory / "tokenizer.model"
    try:
        processor = SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError):
        raise KsortError(f"{file}: is not a SentencePiece model: get it again") from None
    vocab = _Vocab.unused(n_vocab)
    for token in range(min(processor.vocab_size(), n_vocab)):
        kind = gguf.TokenType.NORMAL
        if processor.IsUnknown(token):
            kind = gguf.TokenType.UNKNOWN
        elif processor.IsControl(token):
            kind = gguf.TokenType.CONTROL
        elif processor.IsUnused(token):
            kind = gguf.TokenType.UNUSED
        elif processor.IsByte(token):
            kind = gguf.TokenType.BYTE
        vocab.set(token, processor.IdToPiece(token), processor.GetScore(token), kind)
    if (directory / "added_tokens.json").is_file():
        for text, token in read_json(directory / "added_tokens.json").items():
            if token < n_vocab:
                vocab.set(token, text, _ADDED_SCORE, gguf.TokenType.USER_DEFINED)
    if (directory / "tokenizer_config.json").is_file():
        added = read_json(directory / "tokenizer_config.json").get("added_tokens_decoder") or {}
        entries = [{"id": int(token), **entry} for token, entry in added.items() if int(token) < n_vocab]
        _set_added(vocab, {"added_tokens": entries}, n_vocab, directory / "tokenizer_config.json")
    return vocab


def _byte_fallback_vocab(tokenizer: dict, file: Path, n_vocab: int) -> _Vocab:
    """A SentencePiece vocabulary from tokenizer.json, which has merges instead of scores.

    Such files list tokens in the order of their merges, so the score -id makes the same merges first.
    """
    vocab = _Vocab.unused(n_vocab)
    for text, token in tokenizer["model"].get("vocab", {}).items():
        _check_id(token, text, n_vocab, file)
        is_byte = re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", text)
        vocab.set(token, text, -float(token), gguf.TokenType.BYTE if is_byte else gguf.TokenType.NORMAL)
    _set_added(vocab, tokenizer, n_vocab, file)
    return vocab


def _set_added(vocab: _Vocab, tokenizer: dict, n_vocab: int, file: Path) -> None:
    """Mark added tokens: control tokens, or user-defined ones (which are found in the text before anything else)."""
    for entry in tokenizer.get("added_tokens") or []:
        token, text = entry["id"], entry["content"]
        _check_id(token, text, n_vocab, file)
        if entry.get("special") or _looks_special(text):
            vocab.set(token, text, _ADDED_SCORE, gguf.TokenType.CONTROL)
        else:
            vocab.set(token, text.replace(_SPACE, " "), _ADDED_SCORE, gguf.TokenType.USER_DEFINED)


def _check_id(token: int, text: str, n_vocab: int, file: Path) -> None:
    if not 0 <= token < n_vocab:
        raise KsortError(f"{file}: token {text!r} has id {token}, but vocab_size in config.json is {n_vocab}")


def _looks_special(text: str) -> bool:
    """Spellings of control tokens that some models forget to mark as special."""
    if text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]"):
        return True
    pairs = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))  # U+FF5C: DeepSeek's fullwidth bar
    return any(text.startswith(start) and text.endswith(stop) for start, stop in pairs)
