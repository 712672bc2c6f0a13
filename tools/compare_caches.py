"""Compares key and value caches on one model and text: bits per value, perplexity, KL divergence against an f16 cache.

    python tools/compare_caches.py -m model.gguf -f wiki.test.raw -c 512,4096

Prints a Markdown table for each context, then one JSON line. Numbers are those of `ksort-gguf perplexity` and its
--kl-divergence, by llama-perplexity's protocol; the base is the same model with f16 keys and values. Spellings of
--types: see cache_rows.py.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from cache_rows import Row, Runner, known_names, parse_row
from command_line import counts, n_threads, run_tool
from model_variants import ModelVariants

from ksort_gguf.errors import KsortError
from ksort_gguf.eval.compare import Comparison
from ksort_gguf.eval.kld_statistics import KldStatistics
from ksort_gguf.eval.perplexity import tokenize_file

OUR_DEFAULTS = ("bfp16", "bfp14", "bfp12", "sbfp12", "sbfp11")
PLAN_DEFAULTS = (
    "bfp12@ksort", "bfp12@balanced", "bfp12@balanced:text", "bfp12/bfp12@balanced", "bfp12/bfp12@balanced:text",
    "sbfp12@balanced", "sbfp12@balanced:text", "sbfp12/sbfp12@balanced", "sbfp12/sbfp12@balanced:text",
    "sbfp11@balanced", "sbfp11@balanced:text", "sbfp11/sbfp11@balanced:text",
)  # fmt: skip
PEER_DEFAULTS = (
    "q8_0", "q5_0", "q5_0+hadamard", "q4_0", "q4_0+hadamard", "mxint8", "mxfp4", "nvfp4", "nvint4", "nvint4+hadamard",
    "kivi-4", "kivi-2", "kvquant-4", "kvquant-3", "gear-4", "qaq", "os+-4",
    "turboquant-4", "turboquant-3", "turboquant-vllm-4", "turboquant-vllm-3", "saw-int4", "kvarn-4",
    "ik_q4_0+hadamard", "exl3-4", "oscar-4", "squat-4",
    "q4_0+hadamard/q4_0+hadamard", "kivi-4/kivi-4", "kvquant-4/kvquant-4",
    "turboquant-4/turboquant-4", "turboquant-3/turboquant-3", "turboquant-vllm-4/turboquant-vllm-4",
    "turboquant-vllm-3/turboquant-vllm-3", "saw-int4/saw-int4", "kvarn-4/kvarn-4", "kvarn-2/kvarn-2",
    "ik_q4_0+hadamard/ik_q4_0+hadamard", "exl3-4/exl3-4", "oscar-4/oscar-4", "squat-4/squat-4",
)  # fmt: skip
BASE = "f16"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 1 for an error."""
    return run_tool(run, _parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compare_caches.py", description="Compare key and value caches on a model and a text."
    )
    parser.add_argument("-m", "--model", required=True, metavar="FILE", help="GGUF file; peers need a stock one")
    parser.add_argument("-f", "--file", required=True, metavar="FILE", help="text to score (UTF-8)")
    parser.add_argument("-c", "--ctx-size", default="512", metavar="N,...", help="context sizes (default: %(default)s)")
    parser.add_argument("--chunks", type=int, default=8, metavar="N", help="chunks scored (default: %(default)s)")
    parser.add_argument("--types", metavar="A,B/C,...", help=f"K or K/V of: {known_names()} (default: a full list)")
    parser.add_argument(
        "--plan-file", nargs="+", default=[], metavar="FILE", help="KV plan files, for rows as bfp12@NAME"
    )
    parser.add_argument(
        "--tail", type=int, default=0, metavar="N",
        help="newest tokens that each query finds in f16, in rows without ~tail=N (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--sink", type=int, default=0, metavar="N",
        help="first tokens that each query finds in f16, in rows without ~sink=N (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("-t", "--threads", type=int, default=0, metavar="N", help="CPU threads (default: all)")
    return parser


def run(args: argparse.Namespace) -> None:
    """Measure every row at every context. Raises KsortError as the rooms it uses do."""
    threads = n_threads(args.threads)
    contexts = counts("-c", args.ctx_size, lowest=1)
    for flag, n_tokens in (("--tail", args.tail), ("--sink", args.sink)):
        if n_tokens < 0:
            raise KsortError(f"{flag} {n_tokens} is negative: pass a number of tokens, or leave it out for none")
    spellings = None if args.types is None else [name for name in args.types.split(",") if name]
    for spelling in spellings or []:  # misspellings are reported before the model is read
        parse_row(spelling, {Path(file).stem: file for file in args.plan_file})
    variants = ModelVariants(args.model, args.plan_file, threads)
    rows = [parse_row(s, variants.plans) for s in spellings or _default_spellings(variants.plans)]
    rows = [row.with_defaults(args.tail, args.sink) for row in rows if row.spelling != BASE]
    tokens = tokenize_file(args.file, variants.tokenizer)
    n_vocab, bos_id = variants.spec.n_vocab, variants.bos_id
    comparisons = {n_ctx: Comparison(tokens, n_ctx, n_vocab, bos_id, args.chunks) for n_ctx in contexts}
    results = []
    for n_ctx, comparison in comparisons.items():
        runner = Runner(variants, n_ctx)
        kept = [row for row in rows if _fits(runner, row, may_skip=spellings is None)]
        measured = _measure(runner, comparison, n_ctx, kept)
        results.append({"n_ctx": n_ctx, "rows": measured})
        print(_table(n_ctx, args, measured), flush=True)
    summary = {"model": Path(args.model).name, "text": Path(args.file).name, "chunks": args.chunks}
    summary |= {"tail": args.tail, "sink": args.sink, "contexts": results}
    print(json.dumps(summary))


def _default_spellings(plans: dict) -> list[str]:
    ours = [*OUR_DEFAULTS, *PLAN_DEFAULTS, *(f"{name}@{plan}" for plan in plans for name in OUR_DEFAULTS)]
    return [*ours, *PEER_DEFAULTS]


def _fits(runner: Runner, row: Row, may_skip: bool) -> bool:
    """Whether the model can be stored so. If not: a note where `may_skip` (the default list), else KsortError."""
    try:
        runner.check(row)
    except KsortError as error:
        if not may_skip:
            raise
        print(f"note: {row.spelling} is left out: {error}", file=sys.stderr)
        return False
    return True


def _measure(runner: Runner, comparison: Comparison, n_ctx: int, rows: list[Row]) -> list[dict]:
    """Results of the base row and of `rows`, as they go into the JSON line."""
    with comparison:
        forward, bits = runner.prepare(parse_row(BASE, {}))
        base = comparison.base(forward)
        results: list[dict] = [{"type": BASE, "bits": bits(), "ppl": base.ppl, "ppl_error": base.error}]
        for number, row in enumerate(rows, 1):
            start = time.monotonic()
            forward, bits = runner.prepare(row)
            statistics = comparison.against_base(forward)
            results.append({"type": row.spelling, "bits": bits(), **_numbers(statistics)})
            _report(f"[{number}/{len(rows)}] c={n_ctx} {row.spelling}", results[-1], time.monotonic() - start)
    return results


def _report(place: str, result: dict, seconds: float) -> None:
    """One line of progress."""
    print(f"{place}: mean KLD {result['mean_kld']:.5f}, {seconds:.0f} s", file=sys.stderr, flush=True)


def _numbers(statistics: KldStatistics) -> dict:
    """PPL, KLD and agreement of a row."""
    ppl, kld = statistics.ppl(), statistics.mean_kld()
    median, late = np.quantile(np.concatenate(statistics.kld), (0.5, 0.999))
    return {
        "ppl": ppl.value,
        "ppl_error": ppl.error,
        "mean_kld": kld.value,
        "mean_kld_error": kld.error,
        "median_kld": float(median),
        "kld_99.9": float(late),
        "same_top": statistics.same_top_p().value,
    }


def _table(n_ctx: int, args: argparse.Namespace, rows: list[dict]) -> str:
    """Markdown."""
    ends = f"; newest {args.tail} and first {args.sink} tokens in f16" if args.tail or args.sink else ""
    lines = [
        f"\nContext {n_ctx}, {args.chunks} chunks; KLD against f16 keys and values{ends}\n",
        "| K or K/V cache | bits, K | bits, V | PPL | mean KLD | median KLD | 99.9% KLD | same top |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        k_bits, v_bits = row["bits"]
        start = f"| {row['type']} | {k_bits:.2f} | {v_bits:.2f} | {row['ppl']:.3f} ± {row['ppl_error']:.3f} |"
        if "mean_kld" not in row:
            lines.append(f"{start} - | - | - | - |")
            continue
        lines.append(
            f"{start} {row['mean_kld']:.5f} ± {row['mean_kld_error']:.5f} | {row['median_kld']:.5f} "
            f"| {row['kld_99.9']:.4f} | {100 * row['same_top']:.2f}% |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
