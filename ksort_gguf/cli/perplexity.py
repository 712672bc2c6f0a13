"""`ksort-gguf perplexity`: llama-perplexity's measurement, and KL divergence against a base file."""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from ksort_gguf.cli.arguments import add_model_arguments, cache_options, load
from ksort_gguf.errors import KsortError

if TYPE_CHECKING:
    from ksort_gguf.cache.protocol import Cache
    from ksort_gguf.cli.arguments import Subparsers
    from ksort_gguf.engine.load import LoadedModel


def configure_parser(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "perplexity",
        help="measure perplexity and KL divergence on a text",
        description="Perplexity by llama-perplexity's protocol; with --kl-divergence, a comparison with a base file.",
    )
    add_model_arguments(parser, default_ctx=512)
    parser.add_argument("-f", "--file", metavar="FILE", help="text to score (UTF-8)")
    parser.add_argument("--chunks", type=int, default=-1, metavar="N", help="score the first N chunks (default: all)")
    parser.add_argument(
        "--kl-divergence-base",
        metavar="FILE",
        help="file of log-probabilities in llama.cpp's format: written, or with --kl-divergence read",
    )
    parser.add_argument(
        "--kl-divergence", action="store_true", help="compare with the file that --kl-divergence-base names"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if args.kl_divergence and args.kl_divergence_base is None:
        raise KsortError("--kl-divergence needs a base file: name it with --kl-divergence-base")
    if not args.kl_divergence and args.file is None:
        raise KsortError("there is no text to score: name a file with -f")
    if args.kl_divergence_base is not None and not args.kl_divergence:
        _check_base_is_no_input(args)
    loaded = load(args)
    bos_id = loaded.tokenizer.bos_id if loaded.tokenizer.add_bos else None
    if args.kl_divergence:
        _compare(args, loaded, bos_id)
    else:
        _score(args, loaded, bos_id)


def _check_base_is_no_input(args: argparse.Namespace) -> None:
    """Raise KsortError if the base file to write is a file to read: it would be overwritten."""
    base = Path(args.kl_divergence_base)
    for flag, path in (("-m", args.model), ("-f", args.file), ("--plan-file", args.plan_file)):
        if path is not None and base.exists() and Path(path).exists() and base.samefile(path):
            raise KsortError(f"--kl-divergence-base {base}: is the file that {flag} names: choose another name")


def _score(args: argparse.Namespace, loaded: "LoadedModel", bos_id: int | None) -> None:
    from ksort_gguf.eval import perplexity as protocol
    from ksort_gguf.eval.kld import BaseWriter

    n_ctx = loaded.context(args.ctx_size)
    tokens = protocol.tokenize_file(args.file, loaded.tokenizer)
    n_chunks = protocol.count_chunks(len(tokens), n_ctx, args.chunks)
    context = loaded.backend.start(cache_options(args, loaded), n_ctx)
    _announce(context.cache, n_chunks)
    writer: BaseWriter | nullcontext[None] = nullcontext()
    if args.kl_divergence_base is not None:
        writer = BaseWriter(args.kl_divergence_base, n_ctx, loaded.backend.n_vocab, tokens[: n_chunks * n_ctx])
    with writer as base_writer:
        result = protocol.perplexity(
            protocol.forward_of(context),
            tokens,
            n_ctx,
            n_chunks,
            bos_id,
            on_chunk=lambda result: print(result.running(), end="", flush=True),
            base_writer=base_writer,
        )
    print("\n" + result.final())


def _compare(args: argparse.Namespace, loaded: "LoadedModel", bos_id: int | None) -> None:
    from ksort_gguf.eval import perplexity as protocol
    from ksort_gguf.eval.kld import Base
    from ksort_gguf.eval.kld_statistics import HEADER

    with Base(args.kl_divergence_base, loaded.backend.n_vocab) as base:
        context = loaded.backend.start(cache_options(args, loaded), base.n_ctx)
        _announce(context.cache, base.n_chunks)
        print(HEADER)
        statistics = protocol.kl_divergence(
            protocol.forward_of(context),
            base,
            bos_id,
            on_chunk=lambda n, statistics: print(statistics.chunk_line(n), flush=True),
        )
    print("\n" + statistics.report())


def _announce(cache: "Cache", n_chunks: int) -> None:
    o = cache.options
    blocks = f", blocks of {o.block_size}" if o.has_blocks else ""
    exact = f", {o.exact_tail} newest and {o.exact_sinks} first tokens exact" if o.exact_tail or o.exact_sinks else ""
    types = f"K {o.k_type}, V {o.v_type}{blocks}, queries {o.query_type}{exact}"
    print(f"{n_chunks} chunks of {cache.n_ctx} tokens, {types}", file=sys.stderr)
