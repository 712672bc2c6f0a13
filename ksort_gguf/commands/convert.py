"""`ksort-gguf convert`: a Hugging Face model or a GGUF file to a GGUF whose keys are sorted for a BFP cache."""

import argparse

from ksort_gguf.cache_types import (
    BLOCK_SIZES,
    DEFAULT_QUERY_TYPE,
    K_TYPES,
    QUERY_TYPES,
)


def configure_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "convert",
        help="convert a model to GGUF with sorted keys",
        description="Convert a Hugging Face directory or a GGUF file to a GGUF whose keys are sorted (K-sort) and that "
        "declares how the key cache is stored.",
    )
    parser.add_argument("model", metavar="SOURCE", help="Hugging Face directory (safetensors), or GGUF file")
    parser.add_argument(
        "--outfile", required=True, metavar="OUT", help="file to write; {ftype} becomes the weight type"
    )
    parser.add_argument(
        "--outtype",
        choices=("auto", "f32", "f16", "bf16", "q8_0"),
        default="auto",
        help="weight type; auto: the checkpoint's 16-bit type, or a GGUF's types as they are (default: %(default)s)",
    )
    parser.add_argument(
        "--plan", choices=("ksort", "none"), default="ksort", help="none: a stock file that only declares the cache"
    )
    add_rank_argument(parser)
    parser.add_argument("--cache-type-k", choices=K_TYPES, help="declared K-cache type (default: bfp12)")
    parser.add_argument(
        "--block-size",
        type=int,
        metavar="N",
        help=f"channels that share an exponent: {', '.join(map(str, BLOCK_SIZES))} (default: 32)",
    )
    parser.add_argument(
        "--query-type",
        choices=QUERY_TYPES,
        default=DEFAULT_QUERY_TYPE,
        help="declared query type (default: %(default)s)",
    )
    parser.add_argument("--model-name", metavar="NAME", help="general.name of the output")
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    parser.add_argument("--dry-run", action="store_true", help="check everything and say what would be written")
    parser.add_argument("--verbose", action="store_true", help="show notes about metadata and tokenizer")
    parser.set_defaults(run=run)


def add_rank_argument(parser: argparse.ArgumentParser) -> None:
    """--rank, which convert and plan share."""
    parser.add_argument(
        "--rank",
        choices=("weight-norm", "effective-norm"),
        default="weight-norm",
        help="what channels are sorted by: row norms of Wk as in the paper, or with the norm's gain, the bias and RoPE "
        "taken into account (default: %(default)s)",
    )


def set_log_level(verbose: bool) -> None:
    """Notes of the converter (and of the gguf package) to stderr: warnings, or everything."""
    import logging

    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s: %(message)s")


def run(args: argparse.Namespace) -> None:
    set_log_level(args.verbose)
    from ksort_gguf.convert import convert

    result = convert(
        args.model,
        args.outfile,
        outtype=args.outtype,
        plan=args.plan,
        rank=args.rank,
        cache_type_k=args.cache_type_k,
        block_size=args.block_size,
        query_type=args.query_type,
        model_name=args.model_name,
        force=args.force,
        dry_run=args.dry_run,
    )
    verb = "would write" if args.dry_run else "wrote"
    print(
        f"{verb} {result.path}: architecture {result.architecture}, {result.n_tensors} tensors, "
        f"{result.n_bytes / 1e6:.1f} MB, keys {result.cache_type_k} in blocks of {result.block_size}"
    )
