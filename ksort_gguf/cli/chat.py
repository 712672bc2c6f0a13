"""`ksort-gguf chat`: a conversation in the terminal, with the model's own chat template."""

import argparse
import sys
from typing import TYPE_CHECKING

from ksort_gguf.cli.arguments import (
    add_model_arguments,
    add_sampling_arguments,
    cache_options,
    load,
    make_sampler,
)
from ksort_gguf.errors import KsortError

if TYPE_CHECKING:
    from ksort_gguf.cli.arguments import Subparsers
    from ksort_gguf.engine.chat import Chat, ChatTemplate
    from ksort_gguf.engine.load import LoadedModel
    from ksort_gguf.engine.session import Generator
    from ksort_gguf.engine.tokenizer.tokenizer import Tokenizer


def configure_parser(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "chat",
        help="talk with a model",
        description="Talk with a model in its own chat template. Ctrl-C stops an answer; Ctrl-D ends the chat.",
    )
    add_model_arguments(parser, default_ctx=0)
    add_sampling_arguments(parser)
    parser.add_argument("-sys", "--system-prompt", metavar="TEXT", help="what the model is told first")
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="the first message, instead of asking for it")
    parser.add_argument("-st", "--single-turn", action="store_true", help="end after the first answer")
    template = parser.add_mutually_exclusive_group()
    template.add_argument("--chat-template", metavar="JINJA", help="Jinja template to use instead of the model's own")
    template.add_argument("--chat-template-file", metavar="FILE", help="file with such a template")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ksort_gguf.engine.chat import Chat
    from ksort_gguf.engine.session import Generator

    sampler = make_sampler(args)
    loaded = load(args)
    chat = Chat(_template(args, loaded), loaded.tokenizer, args.system_prompt)
    generator = Generator(loaded.backend.start(cache_options(args, loaded), loaded.context(args.ctx_size)), sampler)
    message = args.prompt
    while True:
        if message is None:
            message = _ask()
        if message is None:
            break
        if message.strip():
            _answer(chat, generator, loaded.tokenizer, message, args)
            if args.single_turn:
                break
        message = None
    print(generator.report(), file=sys.stderr)


def _template(args: argparse.Namespace, loaded: "LoadedModel") -> "ChatTemplate":
    from ksort_gguf.engine.chat import ChatTemplate
    from ksort_gguf.engine.tokenizer.tokenizer import read_text

    if args.chat_template is not None:
        return ChatTemplate(args.chat_template, loaded.tokenizer, "--chat-template")
    if args.chat_template_file is not None:
        return ChatTemplate(read_text(args.chat_template_file), loaded.tokenizer, args.chat_template_file)
    return ChatTemplate.from_metadata(loaded.metadata, loaded.tokenizer, str(loaded.path))


def _ask() -> str | None:
    """The user's next message, or None at the end of input."""
    try:
        return input("\n> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _answer(
    chat: "Chat", generator: "Generator", tokenizer: "Tokenizer", message: str, args: argparse.Namespace
) -> None:
    """Add the message, stream the answer and add it too; Ctrl-C keeps what was said so far.

    A message that does not fit the context is taken back, so that the chat can go on with a shorter one.
    """
    chat.add("user", message)
    stop_ids = frozenset() if args.ignore_eos else tokenizer.eog_ids
    stream = tokenizer.stream()
    said: list[str] = []
    try:
        generator.set_prompt(chat.prompt_ids(generator.ids))
        for token in generator.generate(args.predict, stop_ids):
            said.append(stream.feed(token))
            print(said[-1], end="", flush=True)
    except KsortError as error:
        chat.messages.pop()
        if args.single_turn or not sys.stdin.isatty():
            raise
        print(f"error: {error}", file=sys.stderr)
        return
    except KeyboardInterrupt:
        print(" [stopped]", end="", file=sys.stderr)
    said.append(stream.flush())
    print(said[-1], flush=True)
    chat.add("assistant", "".join(said))
    if generator.is_full():
        print(f"note: the context of {generator.cache.n_ctx} tokens is full: raise it with -c", file=sys.stderr)
