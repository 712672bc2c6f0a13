# ruff: noqa: RUF001 - ranges of scripts begin and end at look-alikes of ASCII characters
"""How byte-level BPE text is cut into words before merging: the regexes behind `tokenizer.ggml.pre`.

Each name maps to regexes that are applied one after the other, every one to the pieces that the last one left; text
between two matches is a piece too. The regexes are those of llama.cpp (llm_tokenizer_bpe), which in places simplifies
a model's own tokenizer.json; files are measured against llama.cpp, so its cut is the one to meet.
"""

from dataclasses import dataclass

from ksort_gguf.errors import KsortError

_CONTRACTION = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_SEED_CODER = rf"{_CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"

# llama.cpp's stand-ins for upper and lower case letters: letters that are not ASCII lower, and not ASCII upper, case.
_UPPER = r"(?:(?=\p{L})[^a-z])"
_LOWER = r"(?:(?=\p{L})[^A-Z])"
_CASED_HEAD = r"[^\r\n\p{L}\p{N}]?"
_CASED_TAIL = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_TEKKEN = rf"{_CASED_HEAD}{_UPPER}*{_LOWER}+|{_CASED_HEAD}{_UPPER}+{_LOWER}*|\p{{N}}|{_CASED_TAIL}"
_GPT4O = (
    rf"{_CASED_HEAD}{_UPPER}*{_LOWER}+{_CONTRACTION}?|{_CASED_HEAD}{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}|{_CASED_TAIL}"
)

_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
)


@dataclass(frozen=True)
class PreTokenizer:
    """One way of cutting text, and the defaults that llama.cpp ties to its name."""

    regexes: tuple[str, ...]
    ignore_merges: bool = False  # a word that is a token as a whole is taken as it is
    add_bos: bool = False  # default of tokenizer.ggml.add_bos_token


_GROUPS = (
    (PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")), ("default",)),
    (
        PreTokenizer((_GPT2,)),
        ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "gigachat", "mellum", "a.x-4.0"),
    ),
    (
        PreTokenizer((r"\p{N}", _GPT2)),
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
    ),
    (
        PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    ),
    (PreTokenizer((_LLAMA3,)), ("dbrx", "smaug-bpe")),
    (
        PreTokenizer((_QWEN2,)),
        ("qwen2", "deepseek-r1-qwen", "megrez", "kormo", "stablelm2", "hunyuan", "solar-open", "grok-2"),
    ),
    (PreTokenizer((_SEED_CODER,)), ("seed-coder",)),
    (PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True), ("tekken",)),
    (PreTokenizer((_GPT4O,)), ("gpt-4o", "llama4", "kanana2", "minimax-m2")),
    (PreTokenizer(_DEEPSEEK_V3), ("deepseek-v3", "hunyuan-dense")),
    (
        # whitespace is left out of the last range's characters as llama.cpp turns it into ASCII before
        PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿&&\S]+", r"\p{N}")),
        ("deepseek-coder",),
    ),
    (
        PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
        ("falcon",),
    ),
)
PRE_TOKENIZERS = {name: pre for pre, names in _GROUPS for name in names}


def pre_tokenizer(name: str, file: str) -> PreTokenizer:
    """The cut that `tokenizer.ggml.pre` calls `name`. Raises KsortError naming `file` and the known names."""
    if name not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise KsortError(f"{file}: tokenizer.ggml.pre is {name!r}, which is not supported (supported: {known})")
    return PRE_TOKENIZERS[name]
