"""How fast memory can be read: what a measurement of bytes is compared with."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ksort_gguf.binding.ffi import aligned_buffer
from ksort_gguf.binding.levels import select_kernels
from ksort_gguf.binding.rows import FloatRows
from ksort_gguf.binding.run import Linear, Pool

READ_ROW = 1024  # float32 a row of the buffer, as a matrix
UNKNOWN_LAST_CACHE = 64 << 20  # bytes, where the system does not say


def last_cache_bytes() -> int:
    """Size of the last-level caches of the CPUs that this process may use, all together; a guess outside Linux."""
    caches = set()
    for cpu in os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ():
        levels = sorted(Path(f"/sys/devices/system/cpu/cpu{cpu}/cache").glob("index*"))
        if levels:
            caches.add(tuple((levels[-1] / name).read_text().strip() for name in ("shared_cpu_list", "size")))
    return sum(int(size.removesuffix("K")) << 10 for _, size in caches) or UNKNOWN_LAST_CACHE


class Readers:
    """Ways to read one large buffer with all threads."""

    def __init__(self, pool: Pool, n_bytes: int):
        self._pool = pool
        self._buffer = aligned_buffer(n_bytes // (4 * READ_ROW) * (4 * READ_ROW))
        floats = self._buffer.view(np.float32)
        floats[:] = 1  # memory that was never written is one page of zeros, which no cache misses
        self._y = np.empty((1, len(floats) // READ_ROW), np.float32)
        self._linear = Linear(floats.reshape(-1, READ_ROW))
        call = self._linear.call(pool, FloatRows(np.ones((1, READ_ROW), np.float32)), FloatRows(self._y))
        self._threads = ThreadPoolExecutor(pool.n_threads)
        # linear is the last: it leaves the pool's threads awake, as the layer before attention does in a model
        self._readers: dict[str, Callable[[], object]] = {
            "or of int64": self._in_pieces(np.bitwise_or.reduce, np.int64),
            "maximum of float32": self._in_pieces(np.maximum.reduce, np.float32),
            "linear of float32": lambda: pool.run([call]),
        }

    def _in_pieces(self, reduce: Callable, dtype: type) -> Callable[[], object]:
        pieces: list[np.ndarray] = np.array_split(self._buffer.view(dtype), self._pool.n_threads)
        return lambda: list(self._threads.map(reduce, pieces))

    def run(self) -> dict[str, float]:
        """GB/s of each reader, by name."""
        select_kernels(None)  # the fastest level
        speeds = {}
        for name, read in self._readers.items():
            start = time.perf_counter_ns()
            read()
            speeds[name] = len(self._buffer) / (time.perf_counter_ns() - start)
        return speeds
