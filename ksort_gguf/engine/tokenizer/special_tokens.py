# ruff: noqa: RUF001 - tokens are spelled with look-alikes of ASCII characters
"""What llama.cpp takes a token to be: its kind, and which tokens begin a text or end an answer.

Converters mark tokens incompletely, so llama.cpp (llama_vocab::impl::load) also goes by a token's text; the lists of
texts here are its lists.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from ksort_gguf.container.typed import typed
from ksort_gguf.errors import KsortError


class Kind(IntEnum):
    """Values of tokenizer.ggml.token_type."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Tokens that end an answer whatever the metadata says.
_END_TEXTS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
)  # fmt: skip

# Fill-in-the-middle tokens: metadata key, or the first of these texts in the vocabulary. They are control tokens.
_FIM_TEXTS = {
    "fim_pre": ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>",
                "<|code_prefix|>", "<|prefix|>"),
    "fim_suf": ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>",
                "<|code_suffix|>", "<|suffix|>"),
    "fim_mid": ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>",
                "<|code_middle|>", "<|middle|>"),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}  # fmt: skip
_FIM_ENDS = ("fim_pad", "fim_rep", "fim_sep")  # seen outside of fill-in-the-middle, these end an answer

# gpt-oss: parts of the visible answer, whatever the metadata says.
_ALWAYS_VISIBLE = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")

# (tokens that must all be there, token that then ends nothing and is of this kind instead)
_NOT_ENDS = (
    (("<|return|>", "<|call|>"), "<|end|>", Kind.USER_DEFINED),
    (("<|return|>", "<|calls|>"), "<|end|>", Kind.USER_DEFINED),
    (("<|flush|>", "<|call|>"), "<|end|>", Kind.USER_DEFINED),
    (("<|flush|>", "<|calls|>"), "<|end|>", Kind.USER_DEFINED),
    (("<|tool_response>",), "</s>", Kind.NORMAL),
)


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of a vocabulary; ids are None where the model has none."""

    kinds: list[Kind]  # one a token
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    eog_ids: frozenset[int]  # each of them ends an answer (llama.cpp's is_eog)


def special_tokens(
    metadata: Mapping[str, object],
    tokens: Sequence[str],
    ids: Mapping[str, int],
    defaults: Mapping[str, int],
    file: str,
) -> SpecialTokens:
    """Read the special tokens of `tokens` (`ids` is its inverse).

    `defaults` are the ids of "bos", "eos" and "unknown" that hold where the file has no key for them. Raises KsortError
    naming `file` when a key has another type, or tokenizer.ggml.token_type is shorter than the vocabulary.
    """

    def id_of(name: str) -> int | None:
        value = typed(metadata, f"tokenizer.ggml.{name}_token_id", "an integer", file)
        if value is None or not 0 <= value < len(tokens):
            value = defaults.get(name)
        return int(value) if value is not None and value < len(tokens) else None

    kinds = _kinds(metadata, tokens, file)
    ends = {id_of("eos"), id_of("eot"), id_of("eom")}
    for name, texts in _FIM_TEXTS.items():
        token = id_of(name)
        if token is None:
            token = next((ids[text] for text in texts if text in ids), None)
            if token is not None:
                kinds[token] = Kind.CONTROL
        if name in _FIM_ENDS:
            ends.add(token)
    for text in _END_TEXTS:
        if text in ids:
            ends.add(ids[text])
            kinds[ids[text]] = Kind.CONTROL
    for text in _ALWAYS_VISIBLE:
        if text in ids:
            kinds[ids[text]] = Kind.USER_DEFINED
    for present, text, kind in _NOT_ENDS:
        if text in ids and all(other in ids for other in present):
            ends.discard(ids[text])
            kinds[ids[text]] = kind
    return SpecialTokens(
        kinds, id_of("bos"), id_of("eos"), id_of("unknown"), frozenset(token for token in ends if token is not None)
    )


def _kinds(metadata: Mapping[str, object], tokens: Sequence[str], file: str) -> list[Kind]:
    stored = typed(metadata, "tokenizer.ggml.token_type", "an array of numbers", file)
    if stored is None:
        return [Kind.NORMAL] * len(tokens)
    if len(stored) < len(tokens):
        raise KsortError(
            f"{file}: tokenizer.ggml.token_type has {len(stored)} entries for {len(tokens)} tokens: convert it again"
        )
    by_value = {int(kind): kind for kind in Kind}
    return [by_value.get(int(value), Kind.UNDEFINED) for value in stored[: len(tokens)]]
