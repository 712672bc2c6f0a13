"""`ksort-gguf bench`: speed of prompts and generation, in llama-bench's rows."""

import argparse
import csv
import json
import os
import sys
from collections.abc import Callable
from itertools import product
from typing import TYPE_CHECKING

from ksort_gguf.cli.arguments import add_device_arguments, add_exact_arguments, load
from ksort_gguf.errors import KsortError
from ksort_gguf.names import BLOCK_SIZES, K_TYPES, V_TYPES

if TYPE_CHECKING:
    from ksort_gguf.cache.protocol import CacheOptions
    from ksort_gguf.cli.arguments import Subparsers
    from ksort_gguf.engine.load import LoadedModel
    from ksort_gguf.eval.bench import Measurement

_FORMATS = ("md", "json", "jsonl", "csv")


def configure_parser(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "bench",
        help="measure speed",
        description="Tokens a second of prompts (pp) and generation (tg), mean +/- standard deviation, as llama-bench "
        "prints them. Lists are separated by commas.",
    )
    parser.add_argument("-m", "--model", required=True, metavar="FILE", help="GGUF file, stock or folded")
    parser.add_argument("--plan-file", metavar="FILE", help="KV plan for a stock GGUF")
    parser.add_argument("-p", "--n-prompt", default="512", metavar="N,..", help="prompt lengths, 0 for none")
    parser.add_argument("-n", "--n-gen", default="128", metavar="N,..", help="generation lengths, 0 for none")
    parser.add_argument("-d", "--n-depth", default="0", metavar="N,..", help="tokens in the cache before the test")
    parser.add_argument("-ctk", "--cache-type-k", metavar="TYPE,..", help=f"of {', '.join(K_TYPES)}")
    parser.add_argument("-ctv", "--cache-type-v", metavar="TYPE,..", help=f"of {', '.join(V_TYPES)}")
    parser.add_argument("--block-size", type=int, choices=BLOCK_SIZES, help="channels that share an exponent")
    parser.add_argument("-t", "--threads", type=int, default=0, metavar="N", help="CPU threads (default: all)")
    add_exact_arguments(parser)
    add_device_arguments(parser)
    parser.add_argument("-r", "--repetitions", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("-o", "--output", choices=_FORMATS, default="md", help="default: %(default)s")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    n_prompts, n_gens = _counts("--n-prompt", args.n_prompt), _counts("--n-gen", args.n_gen)
    depths = _counts("--n-depth", args.n_depth)
    k_types = _names("--cache-type-k", args.cache_type_k, K_TYPES)
    v_types = _names("--cache-type-v", args.cache_type_v, V_TYPES)
    if not any(n_prompts + n_gens):
        raise KsortError("--n-prompt and --n-gen are both 0: there is nothing to measure")
    if args.repetitions < 1:
        raise KsortError(f"--repetitions {args.repetitions} measures nothing: use at least 1")
    loaded = load(args)
    from ksort_gguf.eval.bench import measure

    rows: list[dict[str, object]] = []
    writers: dict[str, Callable[[dict[str, object]], None]] = {"md": _MarkdownTable(), "jsonl": _json_line}
    write = writers.get(args.output, rows.append)
    for k_type, v_type in product(k_types, v_types):
        options = loaded.cache_options(
            k_type, v_type, args.block_size, exact_tail=args.cache_exact_tail, exact_sinks=args.cache_exact_sinks
        )
        for result in measure(loaded.backend, options, n_prompts, n_gens, depths, args.repetitions):
            write(_row(args, loaded, options, result))
    if args.output == "json":
        print(json.dumps(rows, indent=2))
    elif args.output == "csv":
        table = csv.DictWriter(sys.stdout, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def _counts(flag: str, text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [-1]
    if min(counts) < 0:
        raise KsortError(f"{flag} {text} is not a list of counts: write for example 512 or 0,4096")
    return counts


def _names(flag: str, text: str | None, known: tuple[str, ...]) -> list[str | None]:
    names: list[str | None] = [None] if text is None else [*text.split(",")]
    for name in names:
        if name is not None and name not in known:
            raise KsortError(f"{flag} {name} is not one of {', '.join(known)}")
    return names


def _row(
    args: argparse.Namespace, loaded: "LoadedModel", options: "CacheOptions", result: "Measurement"
) -> dict[str, object]:
    """One result under llama-bench's field names."""
    return {
        "model_filename": args.model,
        "n_threads": loaded.backend.n_threads,
        "type_k": options.k_type,
        "type_v": options.v_type,
        "exact_tail": options.exact_tail,
        "exact_sinks": options.exact_sinks,
        "n_prompt": result.n_prompt,
        "n_gen": result.n_gen,
        "n_depth": result.n_depth,
        "test": result.name,
        "avg_ts": result.avg_ts,
        "stddev_ts": result.stddev_ts,
        "samples_ns": result.samples_ns,
        "samples_ts": result.samples_ts,
    }


def _json_line(row: dict[str, object]) -> None:
    print(json.dumps(row), flush=True)


class _MarkdownTable:
    """Prints rows as they come, the header before the first."""

    _columns = ("model_filename", "n_threads", "type_k", "type_v", "test")

    def __init__(self) -> None:
        self._begun = False

    def __call__(self, row: dict[str, object]) -> None:
        cells = [str(row[name]) for name in self._columns]
        cells[0] = os.path.basename(cells[0])
        if not self._begun:
            self._widths = [len(cells[0]), 7, 6, 6, 16]
            self._print(["model", "threads", "type_k", "type_v", "test"], "t/s")
            print("| " + " | ".join("-" * width for width in self._widths) + " | " + "-" * 19 + ": |")
            self._begun = True
        self._print(cells, f"{row['avg_ts']:.2f} ± {row['stddev_ts']:.2f}")

    def _print(self, cells: list[str], speed: str) -> None:
        padded = [cell.ljust(width) for cell, width in zip(cells, self._widths, strict=True)]
        print("| " + " | ".join(padded) + f" | {speed:>20} |", flush=True)
