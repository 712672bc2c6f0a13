"""What running contexts check on every device."""

import numpy as np
import torch

from ksort_gguf.cache.protocol import Cache
from ksort_gguf.errors import ContextError, KsortError


def check_fits(cache: Cache, tokens: list[int]) -> int:
    """The first free slot. Raises ContextError unless `tokens` fit behind it, ValueError for none."""
    if cache.n_tokens + len(tokens) > cache.n_ctx:
        raise does_not_fit(cache.n_tokens + len(tokens), cache.n_ctx)
    if not tokens:
        raise ValueError("no tokens")
    return cache.n_tokens


def does_not_fit(n_tokens: int, n_ctx: int) -> ContextError:
    """The error for more tokens than the context holds."""
    return ContextError(
        f"{n_tokens} tokens do not fit the context of {n_ctx}: raise it with `n_ctx` or shorten the prompt",
        field="n_ctx",
    )


def check_finite(logits: torch.Tensor) -> None:
    """Raise KsortError if a logit is NaN or infinite."""
    if not np.isfinite(logits.numpy().sum()):  # one thread: torch would wake all of them
        raise KsortError("the model's logits are not finite: its arithmetic overflows, or its weights are damaged")
