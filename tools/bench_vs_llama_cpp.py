"""Speed of prompts and generation beside llama.cpp's, in one run: the same file, threads and tokens, taking turns.

    pip install llama-cpp-python
    python tools/bench_vs_llama_cpp.py -m model-f16.gguf -d 0,4096,8064

A cache is written keys/values, as in bfp12/f16. Ours are compared with each of llama.cpp's, which runs with flash
attention as `llama-bench -fa 1` does, its automatic rotation included. Every cache is filled once, to the largest
depth; then, depth by depth from there down, all caches take turns -r times, after one turn that does not count. A ratio
is that of the same turn, so that noise meets both sides alike. Prints a Markdown table of medians with the lowest and
highest ratio, then one JSON line.
"""

import argparse
import ctypes
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Protocol

import torch
from command_line import counts, run_tool

from ksort_gguf.engine.load import LoadedModel, load_model
from ksort_gguf.errors import KsortError
from ksort_gguf.models.run_native import N_UBATCH
from ksort_gguf.names import K_TYPES, V_TYPES

OURS, THEIRS = "bfp12/f16,bfp12/bfp12", "f16/f16,q4_0/f16,q4_0/q4_0"


class Engine(Protocol):
    """One running text and its cache in some runtime."""

    def feed(self, tokens: list[int]) -> None:
        """Append tokens; returns when the logits of the last one are there."""

    def truncate(self, n_tokens: int) -> None:
        """Forget all but the first n_tokens."""


class OurEngine:
    """ksort_gguf's runner."""

    def __init__(self, loaded: LoadedModel, cache: str, n_ctx: int):
        k_type, v_type = cache.split("/")
        self._context = loaded.backend.start(loaded.cache_options(k_type, v_type), n_ctx)

    def feed(self, tokens: list[int]) -> None:
        self._context.forward(tokens)

    def truncate(self, n_tokens: int) -> None:
        self._context.cache.truncate(n_tokens)


class LlamaCpp:
    """llama.cpp's model of a file, loaded once."""

    def __init__(self, path: str, n_threads: int):
        try:
            import llama_cpp
        except ImportError:
            raise KsortError("llama.cpp is missing: pip install llama-cpp-python") from None
        self.api, self.n_threads = llama_cpp, n_threads
        self._silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silence, None)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise KsortError(f"{path}: llama.cpp cannot load it: pass a stock GGUF, with its plan as --plan-file")

    def type_id(self, name: str) -> int:
        """The ggml_type of a cache type's name. Raises KsortError."""
        number = getattr(self.api, f"GGML_TYPE_{name.upper()}", None)
        if number is None:
            raise KsortError(f"--theirs: llama.cpp has no type {name}: use for example f16, q8_0 or q4_0")
        return number


class TheirEngine:
    """llama.cpp with flash attention."""

    def __init__(self, llama: LlamaCpp, cache: str, n_ctx: int):
        self._api = api = llama.api
        params = api.llama_context_default_params()
        params.type_k, params.type_v = map(llama.type_id, cache.split("/"))
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, N_UBATCH, N_UBATCH
        params.n_threads = params.n_threads_batch = llama.n_threads
        params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._context = api.llama_init_from_model(llama.model, params)
        if not self._context:
            raise KsortError(f"--theirs {cache}: llama.cpp refuses this cache: try another")

    def feed(self, tokens: list[int]) -> None:
        for start in range(0, len(tokens), N_UBATCH):
            part = tokens[start : start + N_UBATCH]
            ids = (ctypes.c_int32 * len(part))(*part)  # the batch only points to it
            if status := self._api.llama_decode(self._context, self._api.llama_batch_get_one(ids, len(part))):
                raise RuntimeError(f"llama_decode returned {status}")
        self._api.llama_synchronize(self._context)

    def truncate(self, n_tokens: int) -> None:
        self._api.llama_memory_seq_rm(self._api.llama_get_memory(self._context), 0, n_tokens, -1)


def measure(engine: Engine, depth: int, tokens: list[int], at_once: bool) -> float:
    """Tokens a second of feeding `tokens` after the first `depth` ones, together or one by one."""
    engine.truncate(depth)
    start = time.perf_counter()
    for part in [tokens] if at_once else [[token] for token in tokens]:
        engine.feed(part)
    return len(tokens) / (time.perf_counter() - start)


def take_turns(
    engines: dict[str, Engine], depth: int, tokens: list[int], at_once: bool, n_turns: int
) -> dict[str, list[float]]:
    """Tokens a second of every engine in every turn."""
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(n_turns + 1):
        for name, engine in engines.items():
            speed = measure(engine, depth, tokens, at_once)
            if turn:
                speeds[name].append(speed)
    return speeds


def compare(test: str, speeds: dict[str, list[float]], ours: list[str], theirs: list[str]) -> list[dict]:
    """A row for each of ours with each of theirs."""
    rows = []
    for own in ours:
        for other in theirs:
            ratios = [a / b for a, b in zip(speeds[f"ours {own}"], speeds[f"theirs {other}"], strict=True)]
            rows.append(
                {
                    "test": test,
                    "ours": own,
                    "theirs": other,
                    "ours_ts": statistics.median(speeds[f"ours {own}"]),
                    "theirs_ts": statistics.median(speeds[f"theirs {other}"]),
                    "ratio": statistics.median(ratios),
                    "lowest": min(ratios),
                    "highest": max(ratios),
                }
            )
    return rows


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = [
        "| test | ksort-gguf K/V | t/s | llama.cpp K/V | t/s | ratio | lowest, highest turn |",
        "|---|---|---:|---|---:|---:|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['test']} | {row['ours']} | {row['ours_ts']:.1f} | {row['theirs']} | {row['theirs_ts']:.1f} "
            f"| {row['ratio']:.2f} | {row['lowest']:.2f}, {row['highest']:.2f} |"
        )
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    """Measure and print. Raises KsortError."""
    depths = sorted(counts("-d", args.n_depth, lowest=0), reverse=True)
    for flag, value, least in (("-p", args.n_prompt, 0), ("-n", args.n_gen, 0), ("-r", args.repetitions, 1)):
        if value < least:
            raise KsortError(f"{flag} {value} is too small: pass {least} or more")
    tests = [(f"pp{args.n_prompt}", args.n_prompt, True), (f"tg{args.n_gen}", args.n_gen, False)]
    ours = _caches("--ours", args.ours, (K_TYPES, V_TYPES))
    theirs = _caches("--theirs", args.theirs, None)
    loaded = load_model(args.model, args.plan_file, args.threads)
    llama = LlamaCpp(args.model, loaded.backend.n_threads)
    n_ctx = depths[0] + max(args.n_prompt, args.n_gen)
    engines: dict[str, Engine] = {f"ours {cache}": OurEngine(loaded, cache, n_ctx) for cache in ours}
    engines |= {f"theirs {cache}": TheirEngine(llama, cache, n_ctx) for cache in theirs}
    tokens = torch.randint(loaded.backend.n_vocab, (n_ctx,), generator=torch.Generator().manual_seed(0)).tolist()
    for name, engine in engines.items():
        print(f"filling {name} with {depths[0]} tokens", file=sys.stderr, flush=True)
        if depths[0]:
            engine.feed(tokens[: depths[0]])
    rows = []
    for depth in depths:
        for name, n_tokens, at_once in tests:
            if n_tokens:
                speeds = take_turns(engines, depth, tokens[depth : depth + n_tokens], at_once, args.repetitions)
                rows += compare(f"{name} @ d{depth}" if depth else name, speeds, ours, theirs)
                print(f"{name} @ d{depth} measured", file=sys.stderr, flush=True)
    print(table(rows))
    print(json.dumps({"model": Path(args.model).name, "n_threads": loaded.backend.n_threads, "rows": rows}))


def _caches(flag: str, text: str, known: tuple[tuple[str, ...], tuple[str, ...]] | None) -> list[str]:
    """The caches of "bfp12/f16,f16/f16". Raises KsortError."""
    caches = text.split(",")
    for cache in caches:
        types = cache.split("/")
        if len(types) != 2 or (known is not None and not (types[0] in known[0] and types[1] in known[1])):
            raise KsortError(f"{flag} {cache}: expected a K and a V cache type, as in {OURS.split(',')[0]}")
    return caches


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench_vs_llama_cpp.py", description="Speed beside llama.cpp's, in one run.")
    parser.add_argument("-m", "--model", required=True, metavar="FILE", help="stock GGUF file, for both")
    parser.add_argument("--plan-file", metavar="FILE", help="KV plan for our caches")
    parser.add_argument("-p", "--n-prompt", type=int, default=512, metavar="N", help="prompt (default: %(default)s)")
    parser.add_argument("-n", "--n-gen", type=int, default=32, metavar="N", help="generation (default: %(default)s)")
    parser.add_argument("-d", "--n-depth", default="0,4096,8064", metavar="N,..", help="default: %(default)s")
    parser.add_argument("--ours", default=OURS, metavar="K/V,..", help="our caches (default: %(default)s)")
    parser.add_argument("--theirs", default=THEIRS, metavar="K/V,..", help="llama.cpp's (default: %(default)s)")
    parser.add_argument("-t", "--threads", type=int, default=0, metavar="N", help="CPU threads (default: all)")
    parser.add_argument("-r", "--repetitions", type=int, default=5, metavar="N", help="turns (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 1 for an error."""
    return run_tool(run, _parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
