"""Chats as text: rendering a model's Jinja template, and feeding a growing chat without recomputing its beginning."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import accumulate, takewhile

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from ksort_gguf.container.typed import typed
from ksort_gguf.engine.tokenizer.tokenizer import Tokenizer
from ksort_gguf.errors import KsortError

_KEY = "tokenizer.chat_template"  # the default template; others are under tokenizer.chat_template.{name}


class ChatTemplate:
    """A Jinja chat template, rendered in a sandbox with the names that transformers gives templates."""

    def __init__(self, source: str, tokenizer: Tokenizer, origin: str):
        """Compile `source`. Raises KsortError naming `origin` (where it came from) and the line of a syntax error."""
        self._origin = origin
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise KsortError(f"{origin}: chat template, line {error.lineno}: {_one_line(error.message)}") from None
        self._variables: dict[str, object] = {"tools": None, "documents": None}
        for name, token in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)):
            if token is not None:
                self._variables[name] = tokenizer.token_text(token)

    @classmethod
    def from_metadata(
        cls, metadata: Mapping[str, object], tokenizer: Tokenizer, file: str, name: str | None = None
    ) -> "ChatTemplate":
        """The template in a GGUF's metadata: the default one, or the one called `name`.

        Raises KsortError naming `file` if it is not there.
        """
        key = _KEY if name is None else f"{_KEY}.{name}"
        if key not in metadata:
            raise KsortError(f"{file}: has no {key}: pass one with `chat_template` or `chat_template_file`")
        return cls(typed(metadata, key, "a string", file), tokenizer, file)

    def render(self, messages: Sequence[Mapping[str, object]], add_generation_prompt: bool = True) -> str:
        """The text of `messages` (each with "role" and "content"), and with add_generation_prompt the answer's opening.

        Raises KsortError with the template's own words if it refuses the messages.
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except Exception as error:  # whatever the template's own code raises is the template's fault
            raise KsortError(f"{self._origin}: chat template: {_one_line(error)}") from None


class Chat:
    """The messages of a chat, and the token ids that continue it."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer, system: str | None = None):
        self._template, self._tokenizer = template, tokenizer
        self.messages: list[dict[str, str]] = []
        if system is not None:
            self.add("system", system)

    def add(self, role: str, content: str) -> None:
        """Append a message; role is "system", "user" or "assistant"."""
        self.messages.append({"role": role, "content": content})

    def prompt_ids(self, past: Sequence[int] = ()) -> list[int]:
        """The ids of the whole chat and the answer's opening, beginning with as much of `past` as says the same.

        `past` are the ids fed and drawn so far. A model may spell an answer in other tokens than the tokenizer would;
        its own stay, so that a cache that holds them needs only what is new. Where the template rewrites what was said
        (trims an answer, drops its reasoning), the ids follow the template from there on.
        """
        tokenizer = self._tokenizer
        text = self._template.render(self.messages)
        bos: list[int] = []
        if tokenizer.add_bos and tokenizer.bos_id is not None:
            bos = [tokenizer.bos_id]
            # llama.cpp's rule: a template that writes BOS itself does not make it two
            text = text.removeprefix(tokenizer.token_text(tokenizer.bos_id))
        return splice(past, bos + tokenizer.encode(text, add_special=False), tokenizer)


def splice(past: Sequence[int], wanted: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """Ids that say what `wanted` says, beginning with as many of `past` as possible.

    They change over where both have ended a token after the same bytes. A special token equals itself, not its text.
    """

    def spelled(token: int) -> bytes:
        text = b"" if tokenizer.is_special(token) else tokenizer.token_bytes(token)
        return text or b"\xff%d\xff" % token  # no UTF-8 text has such bytes

    sides = [[spelled(token) for token in ids] for ids in (past, wanted)]
    said = zip(*(b"".join(side) for side in sides), strict=False)
    n_common = sum(1 for _ in takewhile(lambda both: both[0] == both[1], said))
    past_tokens, wanted_tokens = (
        {offset: n_tokens for n_tokens, offset in enumerate(accumulate(map(len, side), initial=0))} for side in sides
    )
    joint = max(offset for offset in past_tokens if offset <= n_common and offset in wanted_tokens)
    return [*past[: past_tokens[joint]], *wanted[wanted_tokens[joint] :]]


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: marks an answer for training; here only its content counts."""

    def __init__(self, environment: jinja2.Environment):
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up for chat templates; a template is untrusted code, hence the sandbox."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _one_line(message: object) -> str:
    return " ".join(str(message).split()) or type(message).__name__
