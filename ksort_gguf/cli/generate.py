"""`ksort-gguf generate`: continue a prompt."""

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

if TYPE_CHECKING:
    from ksort_gguf.cli.arguments import Subparsers


def configure_parser(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "generate", help="continue a prompt", description="Continue a prompt; text streams as it comes."
    )
    add_model_arguments(parser, default_ctx=0)
    add_sampling_arguments(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("-p", "--prompt", metavar="TEXT")
    prompt.add_argument("-f", "--file", metavar="FILE", help="read the prompt from FILE")
    parser.add_argument("--no-display-prompt", action="store_true", help="print only what is generated")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ksort_gguf.engine.session import Generator
    from ksort_gguf.engine.tokenizer.tokenizer import read_text

    prompt = args.prompt if args.file is None else read_text(args.file)
    sampler = make_sampler(args)
    loaded = load(args)
    context = loaded.backend.start(cache_options(args, loaded), loaded.context(args.ctx_size))
    generator = Generator(context, sampler)
    generator.set_prompt(loaded.tokenizer.encode(prompt))
    if not args.no_display_prompt:
        print(prompt, end="", flush=True)
    stream = loaded.tokenizer.stream()
    stop_ids = frozenset() if args.ignore_eos else loaded.tokenizer.eog_ids
    try:
        for token in generator.generate(args.predict, stop_ids):
            print(stream.feed(token), end="", flush=True)
    except KeyboardInterrupt:
        pass
    print(stream.flush(), flush=True)
    print(generator.report(), file=sys.stderr)
