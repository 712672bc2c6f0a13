"""Times of calls that only enqueue work on a GPU, and the speed of its memory."""

import math
import statistics
from collections.abc import Callable

import torch

COPY_BYTES = 1 << 30
L2_TIMES = 4  # what the calls of a measurement go through, at least
_REPLAY_US = 2000  # that a replay takes, about: starting one, which is measured with it, takes some 14


def n_copies(n_bytes: int) -> int:
    """Copies of data of `n_bytes` that the GPU's L2 cannot hold: every byte then comes from memory."""
    return -(-L2_TIMES * torch.cuda.get_device_properties().L2_cache_size // n_bytes)


def call_us(calls: list[Callable[[], object]], repetitions: int) -> float:
    """Median microseconds of one call, over replays of a CUDA graph that goes round over `calls`."""
    calls[0]()  # what is set up on first use cannot be captured
    torch.cuda.synchronize()
    n_rounds = math.ceil(_REPLAY_US / _replay_us(calls, 1, 1))
    return _replay_us(calls, n_rounds, repetitions) / (n_rounds * len(calls))


def _replay_us(calls: list[Callable[[], object]], n_rounds: int, repetitions: int) -> float:
    """Median microseconds of a graph of all calls, `n_rounds` times."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(n_rounds):
            for call in calls:
                call()
    return _median_us(graph.replay, repetitions)


def copy_gb_s(repetitions: int) -> float:
    """GB/s of a copy within the GPU's memory, bytes read and bytes written."""
    source = torch.randint(256, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / _median_us(lambda: target.copy_(source), repetitions) / 1e3


def _median_us(call: Callable[[], object], repetitions: int) -> float:
    """Median microseconds that the GPU takes for `call`, after a run that does not count."""
    times = []
    for _ in range(repetitions + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times[1:])
