"""`ksort-gguf convert`: a Hugging Face model or a GGUF file to a GGUF whose keys suit a BFP cache."""

import argparse
import sys
from typing import TYPE_CHECKING

from ksort_gguf.cli.flags import with_flags
from ksort_gguf.errors import KsortError
from ksort_gguf.names import (
    BLOCK_SIZES,
    CALIBRATE_TOKENS,
    DEFAULT_QUERY_TYPE,
    DEFAULT_RANK,
    K_TYPES,
    QUERY_TYPES,
    RANKS,
    STEPS,
)

if TYPE_CHECKING:
    from ksort_gguf.cli.arguments import Subparsers
    from ksort_gguf.plan.make import Calibration


def configure_parser(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "convert",
        help="convert a model to GGUF with a KV plan",
        description="Convert a Hugging Face directory or a GGUF file to a GGUF with a KV plan (by default balanced, "
        "made from the weights alone) that declares how the key cache is stored.",
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
    add_plan_arguments(parser)
    parser.add_argument("--cache-type-k", choices=K_TYPES, help="declared K-cache type (default: sbfp12)")
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


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """What convert and plan share: which plan, and what it is made from."""
    parser.add_argument(
        "--plan",
        default="balanced",
        metavar="PLAN",
        help="balanced; ksort: the paper's sorting alone; none; or steps joined by commas: "
        f"{', '.join(STEPS)} (default: %(default)s)",
    )
    parser.add_argument(
        "--rank",
        choices=RANKS,
        help="what the step order sorts by: row norms of Wk as in the paper; with the norm's gain, the bias and RoPE "
        f"taken into account; or the keys' own size (default: {DEFAULT_RANK})",
    )
    parser.add_argument(
        "--calibrate",
        nargs="?",
        const="",
        metavar="TEXT",
        help="make the plan from this text file run through the model, without a file from Python's own documentation "
        "(default: from the weights alone)",
    )
    parser.add_argument(
        "--calibrate-tokens",
        type=int,
        metavar="N",
        help=f"tokens of the text to use, in windows of the model's context up to 4096 (default: {CALIBRATE_TOKENS})",
    )
    parser.add_argument(
        "--block-size",
        type=int,
        metavar="N",
        help=f"channels that share an exponent: {', '.join(map(str, BLOCK_SIZES))} (default: 32)",
    )


def calibration(args: argparse.Namespace) -> "Calibration | None":
    """The plan.make.Calibration that --calibrate and --calibrate-tokens ask for, or None. Raises KsortError."""
    if args.calibrate is None:
        if args.calibrate_tokens is not None:
            raise KsortError("--calibrate-tokens needs --calibrate: add it, with a text file or without")
        return None
    from ksort_gguf.engine import calibration as texts

    n_tokens = CALIBRATE_TOKENS if args.calibrate_tokens is None else args.calibrate_tokens
    return texts.calibration(args.calibrate or None, n_tokens)


def print_notes(notes: list[str]) -> None:
    """Say on stderr which steps a plan was made without, and why."""
    for note in notes:
        print(f"note: {with_flags(note)}", file=sys.stderr)


def run(args: argparse.Namespace) -> None:
    from ksort_gguf.plan.convert import convert

    result = convert(
        args.model,
        args.outfile,
        outtype=args.outtype,
        plan=args.plan,
        rank=args.rank,
        calibration=calibration(args),
        cache_type_k=args.cache_type_k,
        block_size=args.block_size,
        query_type=args.query_type,
        model_name=args.model_name,
        force=args.force,
        dry_run=args.dry_run,
    )
    print_notes(result.notes)
    verb = "would write" if args.dry_run else "wrote"
    print(
        f"{verb} {result.path}: architecture {result.architecture}, {result.n_tensors} tensors, "
        f"{result.n_bytes / 1e6:.1f} MB, plan {result.plan.name if result.plan else 'none'}, "
        f"keys {result.cache_type_k} in blocks of {result.block_size}"
    )
