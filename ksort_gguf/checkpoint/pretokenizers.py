r"""Naming the pre-tokenizer of a byte-level BPE tokenizer.json as `tokenizer.ggml.pre` does.

llama.cpp's converter recognizes a tokenizer by the tokens it makes of a test text; here the structure itself is
compared: the normalizer, and the steps that cut text into words.
"""

from ksort_gguf.errors import KsortError

_BYTES_ONLY = ("ByteLevel", False)  # maps bytes to characters; other steps have cut already
_GPT2 = ("ByteLevel", True)  # cuts by GPT-2's regex, then maps bytes
_DIGITS = ("Digits", True)  # each digit alone
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# (normalizer steps, pre-tokenizer steps) -> tokenizer.ggml.pre
_KNOWN: dict[tuple[tuple, tuple], str] = {
    ((), (_GPT2,)): "gpt-2",
    ((), (_DIGITS, _GPT2)): "smollm",
    ((), (("Split", _LLAMA3), _BYTES_ONLY)): "llama-bpe",
    ((), (("Split", _TEKKEN), _BYTES_ONLY)): "tekken",
    (("NFC",), (("Split", _QWEN2), _BYTES_ONLY)): "qwen2",
    ((), (("Split", _QWEN2), _BYTES_ONLY)): "qwen2",  # GGUF's qwen2 does without the normalizer anyway
    (
        (),
        (
            ("Split", r"[\r\n]"),
            ("Split", r"\s?\p{L}+"),
            ("Split", r"\s?\p{P}+"),
            ("Split", r"[一-龥ࠀ-一가-퟿]+"),
            _DIGITS,
            _BYTES_ONLY,
        ),
    ): "deepseek-coder",
}


def pre_tokenizer_name(tokenizer: dict, file: str) -> str:
    """The name for a parsed tokenizer.json. Raises KsortError naming `file` and what was found there."""
    normalizers = tuple(node.get("type") for node in _steps(tokenizer.get("normalizer"), "normalizers"))
    cuts = tuple(_signature(node) for node in _steps(tokenizer.get("pre_tokenizer"), "pretokenizers"))
    name = _KNOWN.get((normalizers, cuts))
    if name is None:
        found = " + ".join(str(part) for part in (*normalizers, *cuts)) or "none"
        known = ", ".join(sorted(set(_KNOWN.values())))
        raise KsortError(f"{file}: unknown pre-tokenizer {found}: supported are those that GGUF calls {known}")
    if name == "llama-bpe" and not tokenizer.get("model", {}).get("ignore_merges", False):
        return "smaug-bpe"  # cuts as llama-bpe does, but does not take words that are tokens without merging
    return name


def _steps(node: dict | None, children: str) -> list[dict]:
    """The steps of a normalizer or pre-tokenizer, sequences flattened."""
    if node is None:
        return []
    if node.get("type") == "Sequence":
        return [step for child in node.get(children, []) for step in _steps(child, children)]
    return [node]


def _signature(node: dict) -> tuple:
    """What matters of a pre-tokenizer step. Unknown settings make a signature that is in no table."""
    kind = node.get("type")
    if kind == "ByteLevel" and not node.get("add_prefix_space", False):
        return "ByteLevel", node.get("use_regex", True)
    if kind == "Digits":
        return "Digits", node.get("individual_digits", False)
    # "Removed" of what does not match keeps the matches, which in these regexes cover the whole text.
    if kind == "Split" and (node.get("behavior"), node.get("invert")) in (("Isolated", False), ("Removed", True)):
        return "Split", node.get("pattern", {}).get("Regex")
    return kind, str(node)
