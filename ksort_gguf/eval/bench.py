"""llama-bench's measurement: tokens a second of prompts and of generation, at given depths of the cache."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ksort_gguf.cache.protocol import Backend, CacheOptions, Context


@dataclass(frozen=True)
class Measurement:
    """Repeated timings of one test: `n_prompt` tokens fed at once, or `n_gen` one by one, after `n_depth` tokens."""

    n_prompt: int
    n_gen: int
    n_depth: int
    samples_ns: list[int]

    @property
    def name(self) -> str:
        """llama-bench's name of the test, such as "pp512 @ d4096"."""
        name = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return f"{name} @ d{self.n_depth}" if self.n_depth else name

    @property
    def samples_ts(self) -> list[float]:
        """Tokens a second of each repetition."""
        return [(self.n_prompt + self.n_gen) * 1e9 / ns for ns in self.samples_ns]

    @property
    def avg_ts(self) -> float:
        return statistics.fmean(self.samples_ts)

    @property
    def stddev_ts(self) -> float:
        """Sample standard deviation of the tokens a second; 0 for one repetition."""
        return statistics.stdev(self.samples_ts) if len(self.samples_ns) > 1 else 0.0


def measure(
    backend: Backend,
    options: CacheOptions,
    n_prompts: list[int],
    n_gens: list[int],
    depths: list[int],
    repetitions: int,
) -> Iterator[Measurement]:
    """Every test at every depth, each after one run that does not count. Zero counts are skipped."""
    generator = torch.Generator().manual_seed(0)
    for depth in depths:
        longest = max([*n_prompts, *n_gens])
        tokens = torch.randint(backend.n_vocab, (depth + longest,), generator=generator).tolist()
        context = backend.start(options, depth + longest)
        if depth:
            context.forward(tokens[:depth])
        for n_prompt, n_gen in [(n, 0) for n in n_prompts if n] + [(0, n) for n in n_gens if n]:
            run = tokens[depth : depth + n_prompt + n_gen]
            samples = [_time(context, depth, run, at_once=n_prompt > 0) for _ in range(repetitions + 1)]
            yield Measurement(n_prompt, n_gen, depth, samples[1:])


def _time(context: Context, depth: int, tokens: list[int], at_once: bool) -> int:
    """Nanoseconds of feeding `tokens` after the first `depth` tokens of the cache."""
    context.cache.truncate(depth)
    start = time.perf_counter_ns()
    if at_once:
        context.forward(tokens)
    else:
        for token in tokens:
            context.forward([token])
    return time.perf_counter_ns() - start
