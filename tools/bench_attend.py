"""Attention alone: one decode step of one layer, straight from packed keys and values, beside the read bandwidth.

    python tools/bench_attend.py -H 32 -KH 8 -D 128 -ctk bfp12 -ctv bfp12 -d 2048,8192,32768,131072 -t 2

No model: keys, values and queries are random normal. A step is one query token that sees `depth` tokens, in the
runner's own native call, RoPE of the query included. Steps go round over enough copies of the caches to fill the
processor's last cache four times (one copy where that alone does), so that every byte comes from memory, as in a model
of many layers; a turn is eight steps or more. GB/s counts the bytes that must move: the tiles of keys and values that
the token sees, once.

The read bandwidth is that of the fastest of three readers of one large buffer, with as many threads, by their medians:
NumPy's bitwise or of int64, NumPy's maximum of float32 (a piece a thread each), and libksort's linear with one row.
Every row is measured -r times, turn by turn over all rows, after a turn that does not count; the readers run directly
before each row of each turn, and a share is that of the same turn, so that noise meets both alike.

Prints a Markdown table of medians with the lowest and highest share; for three depths or more, a line of time over
depth for each kernel level (least squares of relative deviations); then one JSON line.
"""

import argparse
import json
import os
import statistics
import sys
from dataclasses import asdict, dataclass, field

import numpy as np
from attend_steps import DecodeSteps, Layer, Memory, n_tiles
from command_line import counts, run_tool
from read_bandwidth import Readers, last_cache_bytes

from ksort_gguf.binding.levels import available_levels, kernels, select_kernels
from ksort_gguf.binding.run import Pool
from ksort_gguf.errors import KsortError
from ksort_gguf.names import BLOCK_SIZES, K_TYPES, MAX_HEAD_DIM, TILE_TOKENS, V_TYPES

DEPTHS = "2048,8192,32768,131072"
MAX_THREADS = 65535  # of a pool: ksort_run.h
READ_BYTES = 512 << 20  # of the readers' buffer, at least
LAST_CACHE_TIMES = 4  # what steps and readers go through, at least


@dataclass
class Row:
    """One kernel level at one depth, turn by turn."""

    level: str
    steps: DecodeSteps
    us: list[float] = field(default_factory=list)  # a step
    read_gb_s: list[dict[str, float]] = field(default_factory=list)  # by reader, just before

    def take_turn(self, readers: Readers, counted: bool) -> None:
        speeds = readers.run()
        select_kernels(self.level)
        us = self.steps.run()
        if counted:
            self.us.append(us)
            self.read_gb_s.append(speeds)

    def summary(self, reader: str) -> dict:
        """The row of the table and of the JSON line."""
        shares = [
            self.steps.n_bytes / us / 1e3 / speeds[reader] for us, speeds in zip(self.us, self.read_gb_s, strict=True)
        ]
        us = statistics.median(self.us)
        return {
            "level": self.level,
            "depth": self.steps.depth,
            "bytes": self.steps.n_bytes,
            "us": us,
            "gb_s": self.steps.n_bytes / us / 1e3,
            "share": statistics.median(shares),
            "lowest": min(shares),
            "highest": max(shares),
        }


def reader_speeds(rows: list[Row]) -> dict[str, float]:
    """The readers' medians in GB/s, fastest first."""
    runs = [speeds for row in rows for speeds in row.read_gb_s]
    medians = {name: statistics.median(speeds[name] for speeds in runs) for name in runs[0]}
    return dict(sorted(medians.items(), key=lambda item: -item[1]))


def fit(level: str, depths: list[int], us: list[float]) -> dict:
    """The line of time over depth whose relative deviations have the least squares."""
    slope, intercept = np.polyfit(depths, us, 1, w=1 / np.array(us))
    deviations = [abs(slope * depth + intercept - time_us) / time_us for depth, time_us in zip(depths, us, strict=True)]
    return {
        "level": level,
        "ns_per_token": float(slope) * 1e3,
        "intercept_us": float(intercept),
        "largest_deviation": float(max(deviations)),
    }


def fits(rows: list[dict]) -> list[dict]:
    """A fit for each level; none where fewer than three depths would make every line fit."""
    by_level: dict[str, list[dict]] = {}
    for row in rows:
        by_level.setdefault(row["level"], []).append(row)
    return [
        fit(level, [row["depth"] for row in of_level], [row["us"] for row in of_level])
        for level, of_level in by_level.items()
        if len({row["depth"] for row in of_level}) >= 3
    ]


def run(args: argparse.Namespace) -> None:
    """Measure and print. Raises KsortError."""
    layer, depths, levels = _layer(args), counts("-d", args.n_depth, lowest=1), _levels(args.levels)
    _check("-r", args.repetitions, 1)
    _check("-t", args.threads, 0, MAX_THREADS)
    last_cache = last_cache_bytes()
    copies = {depth: layer.n_copies(depth, LAST_CACHE_TIMES * last_cache) for depth in depths}
    tiles = max(n_tiles(depth) * n_copies for depth, n_copies in copies.items())
    print(f"packing {tiles * TILE_TOKENS} random tokens", file=sys.stderr, flush=True)
    generator = np.random.default_rng(0)
    k, v = (Memory(layer, type_name, tiles, generator) for type_name in (layer.k_type, layer.v_type))
    with Pool(args.threads or os.cpu_count() or 1) as pool:
        readers = Readers(pool, max(READ_BYTES, LAST_CACHE_TIMES * last_cache))
        steps = [
            DecodeSteps(layer, pool, depth, [(k.cache(depth, i), v.cache(depth, i)) for i in range(n_copies)])
            for depth, n_copies in copies.items()
        ]
        rows = [Row(level, at_depth) for level in levels for at_depth in steps]
        take_turns(rows, readers, args.repetitions)
        _report(layer, pool.n_threads, rows)


def take_turns(rows: list[Row], readers: Readers, n_turns: int) -> None:
    """Measure every row `n_turns` times, after a turn that does not count. The level in use stays as it is."""
    in_use = kernels()
    try:
        for turn in range(n_turns + 1):
            for row in rows:
                row.take_turn(readers, counted=turn > 0)
            print(f"turn {turn} of {n_turns}", file=sys.stderr, flush=True)
    finally:
        select_kernels(in_use)


def _report(layer: Layer, n_threads: int, measured: list[Row]) -> None:
    speeds = reader_speeds(measured)
    reader = next(iter(speeds))
    rows = [row.summary(reader) for row in measured]
    lines = fits(rows)
    print(
        f"{layer.n_heads} query heads on {layer.n_kv_heads} KV heads of {layer.head_dim}, {layer.k_type} keys, "
        f"{layer.v_type} values, {n_threads} threads; memory is read at {speeds[reader]:.1f} GB/s ({reader})\n\n"
        "| level | depth | us a step | GB/s | share of reading | lowest, highest turn |\n|---|---:|---:|---:|---:|---:|"
    )
    for row in rows:
        print(
            f"| {row['level']} | {row['depth']} | {row['us']:.0f} | {row['gb_s']:.1f} "
            f"| {row['share']:.0%} | {row['lowest']:.0%}, {row['highest']:.0%} |"
        )
    if lines:
        print("\n| level | ns a token | us at depth 0 | largest deviation |\n|---|---:|---:|---:|")
    for line in lines:
        print(
            f"| {line['level']} | {line['ns_per_token']:.2f} | {line['intercept_us']:.1f} "
            f"| {line['largest_deviation']:.1%} |"
        )
    summary = {**asdict(layer), "n_threads": n_threads, "read_gb_s": speeds, "rows": rows, "fits": lines}
    print(json.dumps(summary))


def _layer(args: argparse.Namespace) -> Layer:
    """Raises KsortError for heads that the library does not take."""
    _check("-KH", args.n_kv_heads, 1)
    _check("-H", args.n_heads, 1)
    if args.n_heads % args.n_kv_heads:
        raise KsortError(f"-H {args.n_heads} is not a multiple of -KH {args.n_kv_heads}: pass one that is")
    layer = Layer(args.n_heads, args.n_kv_heads, args.head_dim, args.cache_type_k, args.cache_type_v)
    lowest = BLOCK_SIZES[0] if layer.has_blocks else 2
    _check("-D", args.head_dim, lowest, MAX_HEAD_DIM)
    if args.head_dim % 2:
        raise KsortError(f"-D {args.head_dim} is odd: RoPE turns pairs of channels, pass an even number")
    return layer


def _levels(text: str | None) -> list[str]:
    """Kernel levels, highest first unless said otherwise. Raises KsortError for one that cannot run here."""
    usable = available_levels()
    levels = text.split(",") if text is not None else usable[::-1]
    for level in levels:
        if level not in usable:
            raise KsortError(f"--levels {level}: this CPU runs {', '.join(usable)}: use some of these")
    return levels


def _check(flag: str, value: int, lowest: int, highest: int = 2**31) -> None:
    if not lowest <= value <= highest:
        raise KsortError(f"{flag} {value}: expected a number from {lowest} to {highest}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench_attend.py", description="Decode attention beside the read bandwidth.")
    parser.add_argument("-H", "--n-heads", type=int, default=32, metavar="N", help="query heads (%(default)s)")
    parser.add_argument("-KH", "--n-kv-heads", type=int, default=8, metavar="N", help="KV heads (%(default)s)")
    parser.add_argument("-D", "--head-dim", type=int, default=128, metavar="N", help="channels a head (%(default)s)")
    parser.add_argument("-ctk", "--cache-type-k", choices=K_TYPES, default="bfp12", help="default: %(default)s")
    parser.add_argument("-ctv", "--cache-type-v", choices=V_TYPES, default="bfp12", help="default: %(default)s")
    parser.add_argument("-d", "--n-depth", default=DEPTHS, metavar="N,..", help="tokens seen (%(default)s)")
    parser.add_argument("-t", "--threads", type=int, default=0, metavar="N", help="CPU threads (default: all)")
    parser.add_argument("-r", "--repetitions", type=int, default=7, metavar="N", help="turns (default: %(default)s)")
    parser.add_argument("--levels", metavar="LEVEL,..", help="kernel levels (default: all that this CPU runs)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 1 for an error."""
    return run_tool(run, _parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
