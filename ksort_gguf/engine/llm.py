"""The public LLM: a loaded model with generate, stream, chat, score and tokenize."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ksort_gguf.cache.protocol import CacheOptions, Context
from ksort_gguf.engine.chat import Chat, ChatTemplate
from ksort_gguf.engine.load import LoadedModel
from ksort_gguf.engine.sampling import Sampler
from ksort_gguf.engine.session import Generator
from ksort_gguf.errors import ContextError, KsortError

_SCORED_AT_ONCE = 64  # tokens: their logits are in memory together


class LLM:
    """A model that runs. `load` makes it.

    May be used from several threads: every call has a context of its own, and steps of the model take turns.
    """

    def __init__(self, loaded: LoadedModel, options: CacheOptions, n_ctx: int):
        """n_ctx: tokens that a context of every call may hold. Raises KsortError where the options do not fit."""
        self._loaded, self._options, self.n_ctx = loaded, options, n_ctx
        self._start(1)  # so that wrong options are found now

    @property
    def path(self) -> Path:
        """The model's file."""
        return self._loaded.path

    @property
    def cache_type_k(self) -> str:
        """How keys are stored."""
        return self._options.k_type

    @property
    def cache_type_v(self) -> str:
        """How values are stored."""
        return self._options.v_type

    def tokenize(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids, as llama.cpp's. add_special: with BOS and EOS where the model asks for them."""
        return self._loaded.tokenizer.encode(text, add_special=add_special)

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids; control tokens are left out."""
        return self._loaded.tokenizer.decode(ids, skip_special=True)

    def generate(
        self, prompt: str, n_predict: int = -1, *, temp: float = 0.8, top_k: int = 40, top_p: float = 0.95,
        min_p: float = 0.05, repeat_penalty: float = 1.0, repeat_last_n: int = 64, seed: int = -1,
        ignore_eos: bool = False,
    ) -> str:  # fmt: skip
        """The continuation of `prompt`: up to `n_predict` tokens (-1: until the model ends or the context is full).

        Sampling is llama.cpp's chain; temp 0 is greedy, seed -1 random. ignore_eos: go on after the end of text.
        Raises ContextError for a prompt longer than the context, KsortError naming an argument out of range.
        """
        return "".join(
            self.stream(
                prompt, n_predict, temp=temp, top_k=top_k, top_p=top_p, min_p=min_p, repeat_penalty=repeat_penalty,
                repeat_last_n=repeat_last_n, seed=seed, ignore_eos=ignore_eos,
            )
        )  # fmt: skip

    def stream(
        self, prompt: str, n_predict: int = -1, *, temp: float = 0.8, top_k: int = 40, top_p: float = 0.95,
        min_p: float = 0.05, repeat_penalty: float = 1.0, repeat_last_n: int = 64, seed: int = -1,
        ignore_eos: bool = False,
    ) -> Iterator[str]:  # fmt: skip
        """As generate, in pieces as they come. Arguments are checked at once, before the first piece is asked for."""
        sampler = Sampler(temp, top_k, top_p, min_p, repeat_penalty, repeat_last_n, seed)
        return self._stream(self._loaded.tokenizer.encode(prompt), n_predict, sampler, ignore_eos)

    def chat(
        self, messages: Sequence[Mapping[str, object]], n_predict: int = -1, *, temp: float = 0.8, top_k: int = 40,
        top_p: float = 0.95, min_p: float = 0.05, repeat_penalty: float = 1.0, repeat_last_n: int = 64, seed: int = -1,
    ) -> str:  # fmt: skip
        """The model's answer to `messages`, each with "role" and "content", in its own chat template.

        Raises KsortError where the model has no template, or its template refuses the messages.
        """
        tokenizer = self._loaded.tokenizer
        template = ChatTemplate.from_metadata(self._loaded.metadata, tokenizer, str(self.path))
        sampler = Sampler(temp, top_k, top_p, min_p, repeat_penalty, repeat_last_n, seed)
        chat = Chat(template, tokenizer)
        for message in messages:
            chat.add(*_role_and_content(message))
        return "".join(self._stream(chat.prompt_ids(), n_predict, sampler, ignore_eos=False))

    def score(self, text: str) -> np.ndarray:
        """Log-probabilities, float32 [n_tokens - 1]: each token of tokenize(text) but the first, given those before.

        Raises ContextError for a text longer than the context, KsortError for one of fewer than two tokens.
        """
        ids = self._loaded.tokenizer.encode(text)
        if len(ids) < 2:
            raise KsortError("the text has fewer than two tokens: there is nothing to score")
        context, found = self._start(len(ids)), []
        for start in range(0, len(ids) - 1, _SCORED_AT_ONCE):
            targets = np.array(ids[start + 1 : start + 1 + _SCORED_AT_ONCE])
            logits = context.forward(ids[start : start + len(targets)], n_logits=len(targets))
            found.append(logits.log_softmax(dim=1).numpy()[np.arange(len(targets)), targets])
        return np.concatenate(found)

    def _start(self, n_tokens: int) -> Context:
        if n_tokens > self.n_ctx:
            raise ContextError(
                f"{n_tokens} tokens do not fit the context of {self.n_ctx}: raise it with `n_ctx`", field="n_ctx"
            )
        return self._loaded.backend.start(self._options, self.n_ctx)

    def _stream(self, ids: list[int], n_predict: int, sampler: Sampler, ignore_eos: bool) -> Iterator[str]:
        if n_predict < -1:
            raise KsortError(f"`n_predict` {n_predict} is not a count: pass one, or -1 for no limit", field="n_predict")
        generator = Generator(self._start(len(ids)), sampler)
        generator.set_prompt(ids)
        stop_ids = frozenset() if ignore_eos else frozenset(self._loaded.tokenizer.eog_ids)
        return self._pieces(generator, n_predict, stop_ids)

    def _pieces(self, generator: Generator, n_predict: int, stop_ids: frozenset[int]) -> Iterator[str]:
        stream = self._loaded.tokenizer.stream()
        for token in generator.generate(n_predict, stop_ids):
            if piece := stream.feed(token):
                yield piece
        if piece := stream.flush():
            yield piece


def _role_and_content(message: Mapping[str, object]) -> tuple[str, str]:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise KsortError(f"message {dict(message)!r} needs a role and a content, both text", field="messages")
    return role, content
