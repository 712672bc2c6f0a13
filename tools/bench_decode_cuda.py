"""Decode steps of the GPU runner: with and without a CUDA graph, and the bytes of the cache, at a depth.

    python tools/bench_decode_cuda.py -m model-f16.gguf --plan-file plan.gguf -d 8192

For each cache, K/V types joined by a slash, the context is filled with -d random tokens; then -n tokens are decoded one
by one, -r times from the same depth after a run that does not count, turn by turn with the graph and without it. A step
ends when its logits are in CPU memory, as generation needs them. Prints a Markdown table of medians with the
lowest and highest ratio of a turn, and one JSON line.
"""

import argparse
import json
import statistics
import sys
import time
from typing import cast

import torch
from command_line import counts, run_tool

from ksort_gguf.engine.load import LoadedModel, load_model
from ksort_gguf.errors import KsortError
from ksort_gguf.models.run_torch import TorchModel
from ksort_gguf.names import K_TYPES, V_TYPES

CACHES = "f16/f16,bfp12/f16,bfp12/bfp12"


def run(args: argparse.Namespace) -> None:
    """Measure and print. Raises KsortError."""
    (depth,) = counts("-d", args.n_depth, lowest=1)
    (n_gen,), (n_turns,) = counts("-n", args.n_gen, lowest=1), counts("-r", args.repetitions, lowest=1)
    caches = [_types(spelling) for spelling in args.types.split(",")]
    loaded = load_model(args.model, args.plan_file, device="cuda")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(loaded.backend.n_vocab, (depth + n_gen,), generator=generator).tolist()
    rows = [measure(loaded, *types, tokens, depth, n_turns) for types in caches]
    device = torch.cuda.get_device_name()
    print(f"{loaded.path.name} on {device}, tokens decoded one by one behind {depth} others\n")
    print("| K/V | graph t/s | eager t/s | ratio | lowest, highest turn | K bytes | V bytes |")
    print("|---|---:|---:|---:|---|---:|---:|")
    for row in rows:
        print(
            f"| {row['k_type']}/{row['v_type']} | {row['graph_ts']:.1f} | {row['eager_ts']:.1f} | {row['ratio']:.2f} "
            f"| {row['lowest']:.2f}, {row['highest']:.2f} | {row['k_bytes']:,} | {row['v_bytes']:,} |"
        )
    print(json.dumps({"model": loaded.path.name, "device": device, "depth": depth, "n_gen": n_gen, "rows": rows}))


def measure(loaded: LoadedModel, k_type: str, v_type: str, tokens: list[int], depth: int, n_turns: int) -> dict:
    """One row: decoding tokens[depth:] behind tokens[:depth], turn by turn with the graph and without."""
    model = cast(TorchModel, loaded.backend)
    context = model.start(loaded.cache_options(k_type, v_type), len(tokens))
    context.forward(tokens[:depth])
    row = {"k_type": k_type, "v_type": v_type, "k_bytes": context.cache.k_bytes(), "v_bytes": context.cache.v_bytes()}
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(n_turns + 1):
        for use_graph, runs in seconds.items():
            model.use_graph = use_graph
            context.cache.truncate(depth)
            start = time.perf_counter()
            for token in tokens[depth:]:
                context.forward([token])
            if turn:
                runs.append(time.perf_counter() - start)
    ratios = [eager / graph for graph, eager in zip(seconds[True], seconds[False], strict=True)]
    n_gen = len(tokens) - depth
    speeds = {
        name: n_gen / statistics.median(seconds[use_graph]) for name, use_graph in (("graph", True), ("eager", False))
    }
    return {
        **row,
        "graph_ts": speeds["graph"],
        "eager_ts": speeds["eager"],
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
    }


def _types(spelling: str) -> tuple[str, str]:
    k_type, _, v_type = spelling.partition("/")
    if k_type not in K_TYPES or v_type not in V_TYPES:
        raise KsortError(f"--types {spelling}: expected K/V types, such as bfp12/f16, of {', '.join(K_TYPES)}")
    return k_type, v_type


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench_decode_cuda.py", description="Decoding on a GPU, by graph and not.")
    parser.add_argument("-m", "--model", required=True, metavar="FILE", help="GGUF file, stock or folded")
    parser.add_argument("--plan-file", metavar="FILE", help="KV plan for a stock GGUF")
    parser.add_argument("-d", "--n-depth", default="8192", metavar="N", help="tokens in the cache before (%(default)s)")
    parser.add_argument("-n", "--n-gen", default="64", metavar="N", help="tokens decoded in a run (%(default)s)")
    parser.add_argument("-r", "--repetitions", default="5", metavar="N", help="turns (%(default)s)")
    parser.add_argument("--types", default=CACHES, metavar="K/V,..", help="caches (%(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 1 for an error."""
    return run_tool(run, _parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
