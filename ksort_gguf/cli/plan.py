"""`ksort-gguf plan`: the KV plan of a model alone, for use beside an unchanged GGUF."""

import argparse
from typing import TYPE_CHECKING

from ksort_gguf.cli.convert import add_plan_arguments, calibration, print_notes

if TYPE_CHECKING:
    from ksort_gguf.cli.arguments import Subparsers


def configure_parser(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "plan",
        help="write the KV plan of a model as a file of its own",
        description="Write the KV plan of a stock GGUF, or of the GGUF that a Hugging Face directory would become. "
        "A plan fits only the weights it was made for: make it from the file you run.",
    )
    parser.add_argument("model", metavar="MODEL", help="stock GGUF file, or Hugging Face directory")
    parser.add_argument("--outfile", required=True, metavar="PLAN", help="plan file to write")
    add_plan_arguments(parser)
    parser.add_argument("--force", action="store_true", help="overwrite PLAN")
    parser.add_argument("--verbose", action="store_true", help="show notes about metadata and tokenizer")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from ksort_gguf.container.gguf_writer import check_output
    from ksort_gguf.errors import KsortError
    from ksort_gguf.kvplan import parse_plan
    from ksort_gguf.models.open import open_model
    from ksort_gguf.plan.file import write_plan
    from ksort_gguf.plan.make import make_plan

    if not parse_plan(args.plan)[1]:
        raise KsortError(f"--plan {args.plan}: there is nothing to write: name a plan or some steps")
    path = Path(args.outfile)
    with open_model(args.model) as source:
        check_output(path, args.force, source.files())
        made = calibration(args)
        plan, notes = make_plan(source, args.plan, rank=args.rank, calibration=made, block_size=args.block_size)
    print_notes(notes)
    if not plan.steps:
        raise KsortError(f"{args.model}: no step of --plan {args.plan} lowers the expected error: nothing was written")
    write_plan(path, plan, args.force)
    print(
        f"wrote {path}: {plan.name} for {plan.base_architecture}, steps {' '.join(plan.steps)}, "
        f"made from {plan.statistics}, {plan.weights_hash}"
    )
