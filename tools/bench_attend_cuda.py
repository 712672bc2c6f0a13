"""Attention and packing of one layer on a GPU, beside torch's attention over f16 and the speed of a copy.

    python tools/bench_attend_cuda.py

No model: keys, values and queries are random normal, packed by the library, and go through the calls that the runner
makes, RoPE included. Three parts:

    decode  one token for each of B contexts in slot T - 1
    prompt  n tokens at once: 4096 of 4096, and 512 behind 32768
    pack    4096 tokens, RoPE and storing, without a plan and with all of its run-time steps

Calls go round over enough copies of their data to fill the GPU's L2 four times, within a CUDA graph, so that neither
caches nor launches from Python are measured; times are medians over -r replays. torch's attention runs over f16 keys
and values of the same shape, in the same way, with each backend that takes the shape (flash, cuDNN, efficient); the
fastest one counts. GB/s counts the bytes that must move: tiles of keys and values that are read (decode), rows that are
read and tiles that are written (pack); shares are of a copy of 1 GiB, bytes read and written. "Bytes allow" is the
ratio of f16's bytes to the cache's. Prints a Markdown table for each part and one JSON line.
"""

import argparse
import json
import sys
import warnings
from itertools import product

import torch
from command_line import counts, run_tool
from cuda_steps import PackedSteps, Plan, Rope, Shape, sdpa_calls
from cuda_timing import call_us, copy_gb_s, n_copies

from ksort_gguf.binding.cuda import HEAD_DIMS, K_TYPES, V_TYPES
from ksort_gguf.cache.cuda_device import require_cuda
from ksort_gguf.errors import KsortError

PARTS = ("decode", "prompt", "pack")
PROMPTS = ((4096, 0), (512, 32768))  # new tokens, tokens before them
PACKED_TOKENS = 4096
MEMORY_SHARE = 0.9  # of the free memory that a shape's data may take


class Bench:
    """Measures shapes; `copy` is the speed of a copy in GB/s."""

    def __init__(self, types: list[tuple[str, str]], repetitions: int, ropes: dict[tuple[int, int], Rope]):
        self._types, self._repetitions, self._ropes = types, repetitions, ropes
        self.copy = copy_gb_s(repetitions)

    def attention(self, shape: Shape) -> dict | None:
        """Decode or prompt: the JSON row; None, with a note, where the GPU's memory is too small."""
        torch.cuda.empty_cache()
        f16_bytes = shape.cache_bytes("f16", "f16")
        needed = f16_bytes * n_copies(f16_bytes)  # no cache that is measured beside it takes more
        if needed > MEMORY_SHARE * torch.cuda.mem_get_info()[0]:
            print(f"{_name(shape)} is left out: {needed / 2**30:.0f} GiB do not fit the GPU", file=sys.stderr)
            return None
        sdpa = self._sdpa(shape, f16_bytes)
        best = min(sdpa, key=lambda name: sdpa[name])
        row = {**vars(shape), "sdpa_us": sdpa, "best": best, "best_us": sdpa[best], "caches": []}
        for k_type, v_type in self._types:
            n_bytes = shape.cache_bytes(k_type, v_type)
            steps = PackedSteps(shape, k_type, v_type, n_copies(n_bytes), self._rope(shape))
            us = call_us(steps.attend_calls(), self._repetitions)
            steps.check()
            row["caches"].append(
                {
                    "types": f"{k_type}/{v_type}",
                    **self._speed(us, n_bytes),
                    "ratio": sdpa[best] / us,
                    "bytes_allow": f16_bytes / n_bytes,
                }
            )
        return row

    def pack(self, shape: Shape, k_type: str, v_type: str, plan: Plan | None) -> dict:
        """The JSON row of packing the shape's new tokens."""
        torch.cuda.empty_cache()
        n_bytes = shape.x_bytes() + shape.cache_bytes(k_type, v_type)
        steps = PackedSteps(shape, k_type, v_type, n_copies(n_bytes), self._rope(shape), plan)
        us = call_us(steps.pack_calls(), self._repetitions)
        steps.check()
        types = f"{k_type}/{v_type}"
        return {**vars(shape), "types": types, "plan": plan is not None, **self._speed(us, n_bytes)}

    def _sdpa(self, shape: Shape, f16_bytes: int) -> dict[str, float]:
        """Microseconds by backend, of those that take the shape. Raises KsortError if none does."""
        times = {}
        for name, calls in sdpa_calls(shape, n_copies(f16_bytes)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of each reason why a backend refuses
                try:
                    times[name] = call_us(calls, self._repetitions)
                except RuntimeError as error:
                    print(f"{_name(shape)}, {name}: {str(error).splitlines()[0]}", file=sys.stderr)
        if not times:
            raise KsortError(f"no backend of torch's attention takes {_name(shape)}: pass other shapes")
        return times

    def _speed(self, us: float, n_bytes: int) -> dict[str, float]:
        gb_s = n_bytes / us / 1e3
        return {"us": us, "bytes": n_bytes, "gb_s": gb_s, "share": gb_s / self.copy}

    def _rope(self, shape: Shape) -> Rope:
        return self._ropes[shape.n_kv_heads, shape.head_dim]


def run(args: argparse.Namespace) -> None:
    """Measure and print. Raises KsortError."""
    parts = _chosen("--parts", args.parts, PARTS)
    heads, (repetitions,) = _heads(args.heads), counts("-r", args.repetitions, lowest=1)
    types = [_types(spelling) for spelling in args.types.split(",")]
    batches, depths = counts("-B", args.batch, lowest=1), counts("-d", args.n_depth, lowest=1)
    (head_dim,) = counts("-D", args.head_dim, lowest=1)
    if head_dim not in HEAD_DIMS:
        raise KsortError(f"-D {head_dim}: expected one of {', '.join(map(str, HEAD_DIMS))}")
    require_cuda()
    longest = max(*depths, *(sum(prompt) for prompt in PROMPTS))
    ropes = {(n_kv_heads, head_dim): Rope(n_kv_heads, head_dim, longest) for n_kv_heads in {kv for _, kv in heads}}
    bench = Bench(types, repetitions, ropes)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; a copy moves {bench.copy:.0f} GB/s\n")
    rows: dict[str, list[dict]] = {}
    if "decode" in parts:
        shapes = [Shape(batch, *h, head_dim, depth) for h, batch, depth in product(heads, batches, depths)]
        rows["decode"] = _attention_table("decode", bench, shapes)
    if "prompt" in parts:
        shapes = [Shape(1, *h, head_dim, before + n, n) for h, (n, before) in product(heads, PROMPTS)]
        rows["prompt"] = _attention_table("prompt", bench, shapes)
    if "pack" in parts:
        rows["pack"] = _pack_table(bench, heads, head_dim, types)
    print(json.dumps({"device": torch.cuda.get_device_name(), "copy_gb_s": bench.copy, **rows}))


def _attention_table(part: str, bench: Bench, shapes: list[Shape]) -> list[dict]:
    print(
        f"| {part} | torch f16 us | backend | K/V | us | ratio | bytes allow | GB/s | share of copy |\n"
        "|---|---:|---|---|---:|---:|---:|---:|---:|"
    )
    rows = []
    for shape in shapes:
        if (row := bench.attention(shape)) is None:
            continue
        rows.append(row)
        for cache in row["caches"]:
            print(
                f"| {_name(shape)} | {row['best_us']:.1f} | {row['best']} | {cache['types']} | {cache['us']:.1f} "
                f"| {cache['ratio']:.2f} | {cache['bytes_allow']:.2f} | {cache['gb_s']:.0f} | {cache['share']:.0%} |",
                flush=True,
            )
    print()
    return rows


def _pack_table(bench: Bench, heads: list[tuple[int, int]], head_dim: int, types: list[tuple[str, str]]) -> list[dict]:
    print("| pack | K/V | plan | us | GB/s | share of copy |\n|---|---|---|---:|---:|---:|")
    rows = []
    for n_kv_heads in dict.fromkeys(n_kv_heads for _, n_kv_heads in heads):
        shape = Shape(1, n_kv_heads, n_kv_heads, head_dim, PACKED_TOKENS, PACKED_TOKENS)
        for (k_type, v_type), plan in product(types, (None, Plan(n_kv_heads, head_dim))):
            row = bench.pack(shape, k_type, v_type, plan)
            rows.append(row)
            print(
                f"| {PACKED_TOKENS} tokens, {n_kv_heads} KV heads | {row['types']} | {'all steps' if plan else 'none'} "
                f"| {row['us']:.1f} | {row['gb_s']:.0f} | {row['share']:.0%} |",
                flush=True,
            )
    print()
    return rows


def _name(shape: Shape) -> str:
    new = f", {shape.n_tokens} new" if shape.n_tokens > 1 else ""
    return f"B={shape.batch} {shape.n_heads}/{shape.n_kv_heads} heads T={shape.depth}{new}"


def _chosen(flag: str, text: str, known: tuple[str, ...]) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise KsortError(f"{flag} {text}: {name!r} is not one of {', '.join(known)}")
    return names


def _heads(text: str) -> list[tuple[int, int]]:
    """(query heads, KV heads) of "32/32,32/8"."""
    pairs = []
    for spelling in text.split(","):
        n_heads, slash, n_kv_heads = spelling.partition("/")
        if not (slash and n_heads.isdecimal() and n_kv_heads.isdecimal() and int(n_kv_heads)):
            raise KsortError(f"--heads {text}: expected query heads/KV heads, such as 32/8,64/8")
        if int(n_heads) % int(n_kv_heads) or not int(n_heads):
            raise KsortError(f"--heads {spelling}: the first number is not a multiple of the second")
        pairs.append((int(n_heads), int(n_kv_heads)))
    return pairs


def _types(spelling: str) -> tuple[str, str]:
    k_type, _, v_type = spelling.partition("/")
    if k_type not in K_TYPES or v_type not in V_TYPES:
        raise KsortError(f"--types {spelling}: expected keys of {', '.join(K_TYPES)} / values of {', '.join(V_TYPES)}")
    return k_type, v_type


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench_attend_cuda.py", description="Attention and packing on a GPU.")
    parser.add_argument("--parts", default=",".join(PARTS), metavar="PART,..", help="what to measure (%(default)s)")
    parser.add_argument("-B", "--batch", default="1,8,64", metavar="N,..", help="contexts, decode (%(default)s)")
    parser.add_argument("--heads", default="32/32,32/8,64/8", metavar="H/KH,..", help="heads (%(default)s)")
    parser.add_argument("-D", "--head-dim", default="128", metavar="N", help="channels a head (%(default)s)")
    parser.add_argument("-d", "--n-depth", default="2048,8192,32768,131072", metavar="N,..", help="slots (%(default)s)")
    parser.add_argument("--types", default="bfp12/f16,bfp12/bfp12", metavar="K/V,..", help="caches (%(default)s)")
    parser.add_argument("-r", "--repetitions", default="11", metavar="N", help="replays (%(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 1 for an error."""
    return run_tool(run, _parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
