"""`ksort-gguf plan`: the K plan of a model alone, for use beside an unchanged GGUF."""

import argparse

from ksort_gguf.commands.convert import add_rank_argument, set_log_level


def configure_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="write the K plan of a model as a file of its own",
        description="Write the K plan of a stock GGUF, or of the GGUF that a Hugging Face directory would become. "
        "A plan fits only the weights it was made for: make it from the file you run.",
    )
    parser.add_argument("model", metavar="MODEL", help="stock GGUF file, or Hugging Face directory")
    parser.add_argument("--outfile", required=True, metavar="PLAN", help="plan file to write")
    add_rank_argument(parser)
    parser.add_argument("--force", action="store_true", help="overwrite PLAN")
    parser.add_argument("--verbose", action="store_true", help="show notes about metadata and tokenizer")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    set_log_level(args.verbose)
    from pathlib import Path

    from tqdm import tqdm

    from ksort_gguf.errors import KsortError
    from ksort_gguf.gguf_output import check_output
    from ksort_gguf.plan.plan_file import write_plan
    from ksort_gguf.plan.rank import make_plan
    from ksort_gguf.sources.open_model import open_model

    path = Path(args.outfile)
    with open_model(args.model) as source:
        check_output(path, args.force, source.files())
        if source.plan is not None:
            raise KsortError(f"{args.model}: is folded already: make a plan from the stock model")
        with tqdm(total=source.geometry.n_layers, desc="ranking", unit="layer", disable=None) as bar:
            plan = make_plan(source, args.rank, bar.update)
    write_plan(path, plan, args.force)
    print(f"wrote {path}: {plan.name} for {plan.base_architecture}, ranked by {plan.rank}, {plan.weights_hash}")
