"""What packing costs in a prompt and in a decode step, with the run-time steps of a KV plan and without them.

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
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from command_line import counts, n_threads, run_tool
from model_variants import ModelVariants

from ksort_gguf.binding.levels import kernels
from ksort_gguf.binding.rows import FloatRows
from ksort_gguf.binding.run import NO_PART, PARTS
from ksort_gguf.cache.cpu import CpuAttention
from ksort_gguf.cache.protocol import CacheOptions
from ksort_gguf.errors import KsortError
from ksort_gguf.kvplan import KVPlan
from ksort_gguf.models.run_native import NativeModel
from ksort_gguf.names import CACHE_TYPES, DEFAULT_QUERY_TYPE, DEFAULT_V_TYPE, K_TYPES, V_TYPES, default_block_size

WITH, WITHOUT = "with", "without"  # the plan's run-time steps


class TimedAttention:
    """A CpuAttention that makes each layer's call as three, and one that does nothing.

    `ns`: the nanoseconds of each part since the last `clear`, less those of the call that does nothing.
    """

    def __init__(self, attention: CpuAttention):
        self._attention = attention
        self.clear()

    def clear(self) -> None:
        self.ns = dict.fromkeys(PARTS, 0)

    def bound(self, n_tokens: int) -> int:
        """See Attention."""
        return self._attention.bound(n_tokens)

    def begin(self, n_tokens: int, n_slots: int) -> None:
        """See Attention."""
        self._attention.begin(n_tokens, n_slots)

    def run(self, layer: int, qkv: FloatRows, out: FloatRows) -> None:
        """See Attention."""
        step = self._attention.steps[layer]
        step.prepare(qkv, *self._attention.place(layer), out)
        ns = {}
        for part in (NO_PART, *PARTS):
            start = time.perf_counter_ns()
            step.run_part(part)
            ns[part] = time.perf_counter_ns() - start
        for part in PARTS:
            self.ns[part] += ns[part] - ns[NO_PART]


class Text:
    """A context whose first tokens stay and whose next tokens are fed again and again, whole or in timed parts.

    `feeds` are the next tokens as they are fed: all at once for a prompt, or one by one.
    """

    def __init__(self, model: NativeModel, options: CacheOptions, before: list[int], n_next: int):
        self._depth = len(before)
        self._whole = model.start(options, self._depth + n_next)
        self.cache, self._timed = self._whole.cache, TimedAttention(cast(CpuAttention, self._whole.attention))
        self._in_parts = model.start_with(self.cache, self._timed)
        if before:
            self._whole.forward(before)

    def whole_ns(self, feeds: list[list[int]]) -> float:
        """The runner's nanoseconds, the median of `feeds`."""
        self.cache.truncate(self._depth)
        times = []
        for tokens in feeds:
            start = time.perf_counter_ns()
            self._whole.forward(tokens)
            times.append(time.perf_counter_ns() - start)
        return statistics.median(times)

    def part_ns(self, feeds: list[list[int]]) -> dict[str, float]:
        """The same work with every layer's call in parts: nanoseconds of each of PARTS, all layers together."""
        self.cache.truncate(self._depth)
        times = []
        for tokens in feeds:
            self._timed.clear()
            self._in_parts.forward(tokens)
            times.append(self._timed.ns)
        return {part: statistics.median(ns[part] for ns in times) for part in PARTS}


@dataclass(frozen=True)
class Result:
    """One test's turns, in milliseconds a prompt or a decode step."""

    name: str  # as ksort-gguf bench calls it
    whole_ms: list[float]
    part_ms: dict[str, dict[str, list[float]]]  # by WITH or WITHOUT, then by PARTS

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
    result = Result(name, [], {steps: {part: [] for part in PARTS} for steps in texts})
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
    variants = ModelVariants(args.model, plan_files, n_threads(args.threads))
    plan = Path(args.plan_file).stem if args.plan_file else None if variants.is_folded else "balanced"
    kv_plan = variants.plan_of(plan)
    assert kv_plan is not None
    _check_steps(args, kv_plan)
    options = _cache_options(args.cache_type_k, args.cache_type_v, variants.spec.min_head_dim)
    models = {WITH: variants.model(plan), WITHOUT: variants.model(plan, run_time_steps=False)}
    generator = torch.Generator().manual_seed(0)
    n_next = max(args.n_prompt, args.n_gen)
    tokens = torch.randint(variants.spec.n_vocab, (max(depths) + n_next,), generator=generator).tolist()
    print(_head(args, models[WITH].n_threads), flush=True)
    results = []
    for depth in depths:
        texts = {steps: Text(model, options, tokens[:depth], n_next) for steps, model in models.items()}
        prompt, decoded = tokens[depth : depth + args.n_prompt], tokens[depth : depth + args.n_gen]
        tests = {f"pp{args.n_prompt}": [prompt], f"tg{args.n_gen}": [[token] for token in decoded]}
        for name, feeds in tests.items():
            results.append(measure(texts, feeds, f"{name} @ d{depth}", args.repetitions))
            print(_row(results[-1]), flush=True)
    print(json.dumps(_summary(args, kv_plan.name, models[WITH].n_threads, results)))


def _check_counts(args: argparse.Namespace) -> None:
    for flag, count in (("--n-prompt", args.n_prompt), ("--n-gen", args.n_gen), ("--repetitions", args.repetitions)):
        if count < 1:
            raise KsortError(f"{flag} {count} measures nothing: use at least 1")
    n_threads(args.threads)


def _check_steps(args: argparse.Namespace, plan: KVPlan) -> None:
    """Raise KsortError where with and without the plan's run-time steps is the same."""
    used = (args.cache_type_k, plan.keys), (args.cache_type_v, plan.values)
    if not any(CACHE_TYPES[name].is_bfp and transforms for name, transforms in used):
        raise KsortError(
            f"{args.plan_file or args.model}: the plan ({plan.name}) does nothing at run time to {args.cache_type_k} "
            f"keys and {args.cache_type_v} values: use a BFP -ctk, and a plan with shift, scale, rotate or feedback"
        )


def _cache_options(k_type: str, v_type: str, head_dim: int) -> CacheOptions:
    query_type = DEFAULT_QUERY_TYPE if CACHE_TYPES[k_type].is_bfp else "f32"
    return CacheOptions(k_type, v_type, default_block_size(head_dim), query_type)


def _head(args: argparse.Namespace, threads: int) -> str:
    return "\n".join(
        (
            f"{Path(args.model).name}, {args.cache_type_k} keys, {args.cache_type_v} values, {threads} threads; "
            f"ms a prompt or decode step, all layers, with / without the plan's run-time steps; [lowest - highest]\n",
            "| test | whole | pack keys | pack values | attend | pack / whole | attend, with / without |",
            "|---|---:|---:|---:|---:|---:|---:|",
        )
    )


def _row(result: Result) -> str:
    """A line of the table."""
    times = [
        " / ".join(f"{statistics.median(result.part_ms[steps][part]):.3f}" for steps in (WITH, WITHOUT))
        for part in PARTS
    ]
    share = _spread(result.pack_share, lambda share: f"{100 * share:.2f}%")
    ratio = _spread(result.attend_ratio, lambda ratio: f"{ratio:.3f}")
    cells = [result.name, f"{statistics.median(result.whole_ms):.3f}", *times, share, ratio]
    return f"| {' | '.join(cells)} |"


def _spread(values: list[float], text: Callable[[float], str]) -> str:
    """Median [lowest - highest]."""
    return f"{text(statistics.median(values))} [{text(min(values))} - {text(max(values))}]"


def _summary(args: argparse.Namespace, plan_name: str, threads: int, results: list[Result]) -> dict:
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
        "n_threads": threads,
        "kernels": kernels(),
        "rows": rows,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench_pack.py", description="What packing costs, with a plan and without.")
    parser.add_argument("-m", "--model", required=True, metavar="FILE", help="GGUF file, stock or folded")
    parser.add_argument("--plan-file", metavar="FILE", help="KV plan for a stock file (default: balanced, made here)")
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
