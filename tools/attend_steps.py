"""Decode steps of attention alone, on random keys and values: what bench_attend.py measures."""

import time
from dataclasses import dataclass

import numpy as np

from ksort_gguf.binding.cpu import PackedHeads
from ksort_gguf.binding.ffi import aligned_buffer
from ksort_gguf.binding.rows import FloatRows
from ksort_gguf.binding.run import LayerStep, Pool
from ksort_gguf.errors import KsortError
from ksort_gguf.kvplan import RopeTables
from ksort_gguf.models.rope import stock_tables
from ksort_gguf.names import CACHE_TYPES, DEFAULT_QUERY_TYPE, TILE_TOKENS, default_block_size

PACKED_AT_ONCE = 4096  # tokens
LEAST_STEPS = 8  # of a turn: the first finds cold page tables, which a model's other layers do not


@dataclass(frozen=True)
class Layer:
    """What is attended to."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    k_type: str
    v_type: str

    @property
    def block_size(self) -> int:
        return default_block_size(self.head_dim)

    def tile_bytes(self, type_name: str) -> int:
        """Bytes of a tile of all KV heads."""
        return self.n_kv_heads * CACHE_TYPES[type_name].tile_bytes(self.head_dim, self.block_size)

    @property
    def has_blocks(self) -> bool:
        """Whether keys or values are stored in BFP."""
        return CACHE_TYPES[self.k_type].is_bfp or CACHE_TYPES[self.v_type].is_bfp

    @property
    def query_type(self) -> str:
        return DEFAULT_QUERY_TYPE if CACHE_TYPES[self.k_type].is_bfp else "f32"

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def rope(self) -> RopeTables:
        """Tables [n_kv_heads, head_dim]; all channels turn."""
        tables = stock_tables(self.head_dim, self.head_dim, "half")
        return RopeTables(*(np.tile(table, (self.n_kv_heads, 1)) for table in vars(tables).values()))

    def step_bytes(self, depth: int) -> int:
        """Bytes of keys and values that a token in slot `depth` - 1 must read."""
        return n_tiles(depth) * (self.tile_bytes(self.k_type) + self.tile_bytes(self.v_type))

    def n_copies(self, depth: int, n_bytes: int) -> int:
        """Copies of caches of `depth` tokens that fill at least `n_bytes`."""
        return -(-n_bytes // self.step_bytes(depth))


def n_tiles(depth: int) -> int:
    return -(-depth // TILE_TOKENS)


class Memory:
    """Random keys or values, packed once: caches of any depth are views of its tiles.

    Raises KsortError where memory is not enough.
    """

    def __init__(self, layer: Layer, type_name: str, tiles: int, generator: np.random.Generator):
        self._format = type_name, layer.head_dim, layer.block_size, layer.n_kv_heads
        self._tile_bytes = layer.tile_bytes(type_name)
        try:
            self._bytes = aligned_buffer(tiles * self._tile_bytes)
        except (MemoryError, ValueError) as error:
            size = tiles * self._tile_bytes / 2**30
            raise KsortError(f"no memory for {size:.1f} GiB of {type_name}: lower the depths with -d") from error
        whole = PackedHeads(*self._format, tiles * TILE_TOKENS, self._bytes)
        for slot in range(0, tiles * TILE_TOKENS, PACKED_AT_ONCE):
            n_tokens = min(PACKED_AT_ONCE, tiles * TILE_TOKENS - slot)
            shape = n_tokens, layer.n_kv_heads, layer.head_dim
            whole.pack(generator.standard_normal(shape, dtype=np.float32), slot)

    def cache(self, depth: int, copy: int) -> PackedHeads:
        """Copy number `copy` of caches of `depth` tokens; copies share no tile."""
        n_bytes = n_tiles(depth) * self._tile_bytes
        return PackedHeads(*self._format, depth, self._bytes[copy * n_bytes : (copy + 1) * n_bytes])


class DecodeSteps:
    """A decode step of one token in slot `depth` - 1, on each copy of the caches. `out`: float32, the last one's."""

    def __init__(self, layer: Layer, pool: Pool, depth: int, caches: list[tuple[PackedHeads, PackedHeads]]):
        self.depth, self.n_bytes = depth, layer.step_bytes(depth)
        n_q, n_kv = layer.n_heads * layer.head_dim, layer.n_kv_heads * layer.head_dim
        qkv = np.random.default_rng(depth).standard_normal((1, n_q + 2 * n_kv), dtype=np.float32)
        self.q = qkv[0, :n_q].reshape(layer.n_heads, layer.head_dim)
        self.out = np.empty_like(self.q)
        theta = (depth - 1) * 10000.0 ** (-np.arange(0, layer.head_dim, 2) / layer.head_dim)
        self.cos, self.sin = (part(theta)[None].astype(np.float32) for part in (np.cos, np.sin))
        rope, self._steps = layer.rope(), []
        for k_cache, v_cache in caches:
            step = LayerStep(
                pool, k_cache, v_cache, n_heads=layer.n_heads, scale=layer.scale, window=0,
                query_type=layer.query_type, rope=rope,
            )  # fmt: skip
            rows = (FloatRows(array) for array in (self.cos, self.sin, self.out.reshape(1, n_q)))
            step.prepare(FloatRows(qkv), depth - 1, *rows)
            self._steps.append(step)

    def run(self) -> float:
        """LEAST_STEPS steps or more, as often on every copy; returns microseconds a step."""
        n_rounds = -(-LEAST_STEPS // len(self._steps))
        start = time.perf_counter_ns()
        for _ in range(n_rounds):
            for step in self._steps:
                step.run_part("attend")
        return (time.perf_counter_ns() - start) / (n_rounds * len(self._steps)) / 1e3
