"""Text for plans: as windows of a model's own tokens."""

from collections.abc import Sequence
from pathlib import Path

from ksort_gguf.engine.tokenizer.tokenizer import Tokenizer, read_text
from ksort_gguf.errors import PlanError
from ksort_gguf.models.source import Source
from ksort_gguf.names import CALIBRATE_TOKENS
from ksort_gguf.plan.make import Calibration


def default_text() -> str:
    """English text that every CPython carries: the prose of its own documentation, about 110,000 tokens."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def calibration(text_file: str | Path | None = None, n_tokens: int = CALIBRATE_TOKENS) -> Calibration:
    """A plan from a UTF-8 text file, or from default_text. Raises KsortError where the file cannot be read."""
    text = default_text() if text_file is None else read_text(text_file)

    def tokenize(source: Source, n_tokens: int, window: int) -> Sequence[Sequence[int]]:
        return calibration_windows(Tokenizer.from_metadata(source.metadata, str(source.path)), text, n_tokens, window)

    return Calibration(tokenize, n_tokens)


def calibration_windows(tokenizer: Tokenizer, text: str, n_tokens: int, window: int) -> list[list[int]]:
    """`text` as token ids in windows of `window` tokens, at most `n_tokens` in all; what is left over is dropped.

    Where the tokenizer adds BOS, BOS takes the place of each window's first token, as in eval/perplexity.py. Raises
    PlanError if the tokens do not fill one window, KsortError as Tokenizer does.
    """
    if n_tokens < window:
        raise PlanError(
            f"`calibrate_tokens` {n_tokens} is less than one window of {window} tokens: raise it",
            field="calibrate_tokens",
        )
    bos = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    tokens = bos + tokenizer.encode(text, add_special=False, parse_special=False)
    if len(tokens) < window:
        raise PlanError(
            f"`calibrate`: the text has {len(tokens)} tokens, less than one window of {window}: give a longer text, "
            "or a smaller `calibrate_tokens`",
            field="calibrate",
        )
    n_windows = min(len(tokens), n_tokens) // window
    return [bos + tokens[i * window + len(bos) : (i + 1) * window] for i in range(n_windows)]
