"""What packing costs in a prompt and in a decode step, with the run-time steps of a K plan and without them.

    python tools/bench_pack.py -m model.gguf --plan-file plan.gguf

Measured where it happens: in the model's forward pass, on its own keys, after a layer's matrices have driven the plan's
tables out of the processor's caches. Each layer's native call is made as three, timed one by one: pack keys, pack
values, attend; what a call takes that does nothing is measured beside them and taken off. "Whole" is the runner as it
is, in one call a layer. Without the steps means the same folded weights and cache types, and nearest rounding.

The three ways to run (whole, in parts with the steps, in parts without) take turns, so that noise meets all of them. A
turn of decoding is -n steps, and its time their median. Prints a Markdown table of medians over -r turns, shares with
their lowest and highest turn, and one JSON line. Without --plan-file a folded file's own plan is taken, and for a stock
file the `balanced` plan is made from its weights.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from command_line import counts, run_tool
from model_variants import ModelVariants

from ksort_gguf import native, native_pool
from ksort_gguf.cache_types import (
    CACHE_TYPES,
    DEFAULT_QUERY_TYPE,
    DEFAULT_V_TYPE,
    K_TYPES,
    V_TYPES,
    default_block_size,
)
from ksort_gguf.errors import KsortError
from ksort_gguf.runtime.kv_cache import CacheOptions
from ksort_gguf.runtime.model import N_UBATCH, Model, Sequence

WITH, WITHOUT = "with", "without"  # the plan's run-time steps


class TimedStep:
    """A native_pool.LayerStep in three calls, and one that does nothing.

    `ns`: the nanoseconds of each part since the last `clear`, less those of the call that does nothing.
    """

    def __init__(self, step: native_pool.LayerStep):
        self._step = step
        self.clear()

    def clear(self) -> None:
        self.ns = dict.fromkeys(native_pool.PARTS, 0)

    def run(self, *step: int) -> None:
        """As native_pool.LayerStep.run."""
        self._step.prepare(*step)
        ns = {}
        for part in (native_pool.NO_PART, *native_pool.PARTS):
            start = time.perf_counter_ns()
            self._step.run_part(part)
            ns[part] = time.perf_counter_ns() - start
        for part in native_pool.PARTS:
            self.ns[part] += ns[part] - ns[native_pool.NO_PART]


class Text:
    """A sequence whose first tokens stay and whose next tokens are fed again and again, whole or in timed parts.

    `feeds` are the next tokens as they are fed: all at once for a prompt, or one by one.
    """

    def __init__(self, model: Model, options: CacheOptions, before: list[int], n_next: int):
        self._model, self._depth = model, len(before)
        self._sequence: Sequence = model.start(options, self._depth + n_next)
        self._timed = [TimedStep(step) for step in model.layer_steps(self._sequence.cache)]
        if before:
            self._sequence.forward(before)

    def whole_ns(self, feeds: list[list[int]]) -> float:
        """The runner's nanoseconds, the median of `feeds`."""
        self._sequence.cache.truncate(self._depth)
        times = []
        for tokens in feeds:
            start = time.perf_counter_ns()
            self._sequence.forward(tokens)
            times.append(time.perf_counter_ns() - start)
        return statistics.median(times)

    def part_ns(self, feeds: list[list[int]]) -> dict[str, float]:
        """The same work with every layer's call in parts: nanoseconds of each of PARTS, all layers together."""
        times, slot = [], self._depth
        for tokens in feeds:
            times.append(self._feed_in_parts(tokens, slot))
            slot += len(tokens)
        return {part: statistics.median(ns[part] for ns in times) for part in native_pool.PARTS}

    @torch.inference_mode()
    def _feed_in_parts(self, tokens: list[int], first_slot: int) -> dict[str, int]:
        for step in self._timed:
            step.clear()
        for start in range(0, len(tokens), N_UBATCH):
            ids = torch.tensor(tokens[start : start + N_UBATCH])
            self._model.logits(self._model.run_layers(ids, self._timed, first_slot + start)[-1:])
        return {part: sum(step.ns[part] for step in self._timed) for part in native_pool.PARTS}


@dataclass(frozen=True)
class Result:
    """One test's turns, in milliseconds a prompt or a decode step."""

    name: str  # as ksort-gguf bench calls it
    whole_ms: list[float]
    part_ms: dict[str, dict[str, list[float]]]  # by WITH or WITHOUT, then by native_pool.PARTS

    def pack_ms(self, steps: str) -> list[float]:
        """Keys and values together."""
        return [k + v for k, v in zip(self.part_ms[steps]["k"], self.part_ms[steps]["v"], strict=True)]

    @property
    def pack_share(self) -> list[float]:
        """Packing with the steps, over the whole."""
        return _ratios(self.pack_ms(WITH), self.whole_ms)

    @property
    def attend_ratio(self) -> list[float]:
        """Attending with the steps undone, over attending without."""
        return _ratios(self.part_ms[WITH]["attend"], self.part_ms[WITHOUT]["attend"])


def _ratios(above: list[float], below: list[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def measure(texts: dict[str, Text], feeds: list[list[int]], name: str, repetitions: int) -> Result:
    """`repetitions` turns of `feeds` to the texts WITH and WITHOUT the steps, after one that doesn't count."""
    result = Result(name, [], {steps: {part: [] for part in native_pool.PARTS} for steps in texts})
    for turn in range(repetitions + 1):
        whole_ns = texts[WITH].whole_ns(feeds)
        order = (WITH, WITHOUT) if turn % 2 else (WITHOUT, WITH)
        parts = {steps: texts[steps].part_ns(feeds) for steps in order}
        if turn == 0:
            continue
        result.whole_ms.append(whole_ns / 1e6)
        for steps, by_part in parts.items():
            for part, ns in by_part.items():
                result.part_ms[steps][part].append(ns / 1e6)
    return result


def run(args: argparse.Namespace) -> None:
    """Measure and print. Raises KsortError for arguments that measure nothing, and as the rooms it uses do."""
    depths = counts("--n-depth", args.n_depth, lowest=0)
    _check_counts(args)
    plan_files = [args.plan_file] if args.plan_file else []
    variants = ModelVariants(args.model, plan_files, args.threads or os.cpu_count() or 1)
    plan = Path(args.plan_file).stem if args.plan_file else None if variants.is_folded else "balanced"
    _check_steps(args, variants, plan)
    options = _cache_options(args.cache_type_k, args.cache_type_v, variants.geometry.head_dim)
    models = {WITH: variants.model(plan), WITHOUT: variants.model(plan, run_time_steps=False)}
    generator = torch.Generator().manual_seed(0)
    n_next = max(args.n_prompt, args.n_gen)
    tokens = torch.randint(variants.n_vocab, (max(depths) + n_next,), generator=generator).tolist()
    print(_head(args, models[WITH].n_threads), flush=True)
    results = []
    for depth in depths:
        texts = {steps: Text(model, options, tokens[:depth], n_next) for steps, model in models.items()}
        prompt, decoded = tokens[depth : depth + args.n_prompt], tokens[depth : depth + args.n_gen]
        tests = {f"pp{args.n_prompt}": [prompt], f"tg{args.n_gen}": [[token] for token in decoded]}
        for name, feeds in tests.items():
            results.append(measure(texts, feeds, f"{name} @ d{depth}", args.repetitions))
            print(_row(results[-1]), flush=True)
    print(json.dumps(_summary(args, variants.plan_of(plan).name, models[WITH].n_threads, results)))


def _check_counts(args: argparse.Namespace) -> None:
    for flag, count in (("--n-prompt", args.n_prompt), ("--n-gen", args.n_gen), ("--repetitions", args.repetitions)):
        if count < 1:
            raise KsortError(f"{flag} {count} measures nothing: use at least 1")
    if args.threads < 0:
        raise KsortError(f"--threads {args.threads} is negative: pass a count, or leave it out for all CPUs")


def _check_steps(args: argparse.Namespace, variants: ModelVariants, plan: str | None) -> None:
    """Raise KsortError where with and without the plan's run-time steps is the same."""
    k_plan = variants.plan_of(plan)
    used = (args.cache_type_k, k_plan.keys), (args.cache_type_v, k_plan.values)
    if not any(CACHE_TYPES[name].is_bfp and transforms for name, transforms in used):
        raise KsortError(
            f"{args.plan_file or args.model}: the plan ({k_plan.name}) does nothing at run time to {args.cache_type_k} "
            f"keys and {args.cache_type_v} values: use a BFP -ctk, and a plan with shift, scale, rotate or feedback"
        )


def _cache_options(k_type: str, v_type: str, head_dim: int) -> CacheOptions:
    query_type = DEFAULT_QUERY_TYPE if CACHE_TYPES[k_type].is_bfp else "f32"
    return CacheOptions(k_type, v_type, default_block_size(head_dim), query_type)


def _head(args: argparse.Namespace, n_threads: int) -> str:
    return "\n".join(
        (
            f"{Path(args.model).name}, {args.cache_type_k} keys, {args.cache_type_v} values, {n_threads} threads; "
            f"ms a prompt or decode step, all layers, with / without the plan's run-time steps; [lowest - highest]\n",
            "| test | whole | pack keys | pack values | attend | pack / whole | attend, with / without |",
            "|---|---:|---:|---:|---:|---:|---:|",
        )
    )


def _row(result: Result) -> str:
    """A line of the table."""
    times = [
        " / ".join(f"{statistics.median(result.part_ms[steps][part]):.3f}" for steps in (WITH, WITHOUT))
        for part in native_pool.PARTS
    ]
    share = _spread(result.pack_share, lambda share: f"{100 * share:.2f}%")
    ratio = _spread(result.attend_ratio, lambda ratio: f"{ratio:.3f}")
    cells = [result.name, f"{statistics.median(result.whole_ms):.3f}", *times, share, ratio]
    return f"| {' | '.join(cells)} |"


def _spread(values: list[float], text: Callable[[float], str]) -> str:
    """Median [lowest - highest]."""
    return f"{text(statistics.median(values))} [{text(min(values))} - {text(max(values))}]"


def _summary(args: argparse.Namespace, plan_name: str, n_threads: int, results: list[Result]) -> dict:
    """The JSON line: every turn's times in milliseconds, and medians of the shares."""
    rows = [
        {
            "test": result.name,
            "whole_ms": result.whole_ms,
            "part_ms": result.part_ms,
            "pack_share": statistics.median(result.pack_share),
            "attend_ratio": statistics.median(result.attend_ratio),
        }
        for result in results
    ]
    return {
        "model": Path(args.model).name,
        "plan": plan_name,
        "type_k": args.cache_type_k,
        "type_v": args.cache_type_v,
        "n_threads": n_threads,
        "kernels": native.kernels(),
        "rows": rows,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench_pack.py", description="What packing costs, with a K plan and without.")
    parser.add_argument("-m", "--model", required=True, metavar="FILE", help="GGUF file, stock or folded")
    parser.add_argument("--plan-file", metavar="FILE", help="K plan for a stock file (default: balanced, made here)")
    parser.add_argument("-p", "--n-prompt", type=int, default=512, metavar="N", help="default: %(default)s")
    parser.add_argument("-n", "--n-gen", type=int, default=32, metavar="N", help="decode steps (default: %(default)s)")
    parser.add_argument("-d", "--n-depth", default="0,4096", metavar="N,..", help="tokens fed before (%(default)s)")
    parser.add_argument("-ctk", "--cache-type-k", choices=K_TYPES, default="bfp12", help="default: %(default)s")
    parser.add_argument("-ctv", "--cache-type-v", choices=V_TYPES, default=DEFAULT_V_TYPE, help="default: %(default)s")
    parser.add_argument("-t", "--threads", type=int, default=0, metavar="N", help="CPU threads (default: all)")
    parser.add_argument("-r", "--repetitions", type=int, default=5, metavar="N", help="turns (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 1 for an error."""
    return run_tool(run, _parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
