"""Feeding prompts and drawing tokens, with the time and memory they took."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from ksort_gguf.cache.protocol import Cache, Context
from ksort_gguf.engine.sampling import Sampler
from ksort_gguf.errors import KsortError
from ksort_gguf.models.context import does_not_fit


@dataclass
class Timings:
    """Tokens and seconds of prompts fed and of tokens drawn since the start."""

    n_prompt: int = 0
    prompt_s: float = 0.0
    n_generated: int = 0
    generation_s: float = 0.0

    def prompt_speed(self) -> float:
        """Tokens a second, 0 where there were none."""
        return self.n_prompt / self.prompt_s if self.prompt_s else 0.0

    def generation_speed(self) -> float:
        """Tokens a second, 0 where there were none. The first token of an answer counts as its prompt's time."""
        return self.n_generated / self.generation_s if self.generation_s else 0.0


class Generator:
    """One context that is fed and continued in turns; what it holds is never computed again.

    `ids` are the tokens drawn or fed so far; the last one drawn may not be in the cache yet.
    """

    def __init__(self, context: Context, sampler: Sampler):
        self._context, self._sampler = context, sampler
        self.ids: list[int] = []
        self.timings = Timings()
        self._prompt_waits = False

    @property
    def cache(self) -> Cache:
        """The context's."""
        return self._context.cache

    def set_prompt(self, ids: list[int]) -> None:
        """Make `ids` the whole text so far: the longest common beginning stays, what follows it is dropped.

        Raises KsortError if there are no ids, or more than the context holds.
        """
        n_ctx = self.cache.n_ctx
        if not ids:
            raise KsortError("the prompt has no tokens: pass some text with `prompt`", field="prompt")
        if len(ids) > n_ctx:
            raise does_not_fit(len(ids), n_ctx)
        n_same = 0
        for old, new in zip(self.ids, ids, strict=False):
            if old != new:
                break
            n_same += 1
        self.cache.truncate(min(n_same, self.cache.n_tokens, len(ids) - 1))
        self.ids = list(ids)
        self._prompt_waits = True

    def generate(self, n_predict: int, stop_ids: frozenset[int] | set[int] = frozenset()) -> Iterator[int]:
        """Draw up to `n_predict` tokens (-1: no limit), until a stop token (drawn, not yielded) or a full context."""
        while n_predict != 0 and not self.is_full():
            token = self._next()
            self.ids.append(token)
            if token in stop_ids:
                return
            n_predict -= 1
            yield token

    def is_full(self) -> bool:
        """Whether the last token drawn has no place left in the context, so that nothing can follow it."""
        return len(self.ids) > self.cache.n_ctx

    def _next(self) -> int:
        pending = self.ids[self.cache.n_tokens :]
        start = time.perf_counter()
        logits = self._context.forward(pending)[0]
        token = self._sampler.sample(logits.numpy(), self.ids)
        elapsed = time.perf_counter() - start
        if self._prompt_waits:
            self._prompt_waits = False
            self.timings.n_prompt += len(pending)
            self.timings.prompt_s += elapsed
        else:
            self.timings.n_generated += 1
            self.timings.generation_s += elapsed
        return token

    def report(self) -> str:
        """What was measured so far, in three lines: prompt, generation, cache."""
        cache, t = self.cache, self.timings
        return (
            f"prompt:     {t.n_prompt} tokens, {t.prompt_speed():.2f} tokens/s\n"
            f"generation: {t.n_generated} tokens, {t.generation_speed():.2f} tokens/s\n"
            f"cache:      {cache.n_tokens} tokens, K {cache.options.k_type} {cache.k_bytes():,} bytes, "
            f"V {cache.options.v_type} {cache.v_bytes():,} bytes"
        )
