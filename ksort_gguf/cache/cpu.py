"""The KV cache of one context in host memory, and attention over it by libksort."""

import mmap
from collections.abc import Sequence

from ksort_gguf.binding.cpu import ExactRows, PackedHeads
from ksort_gguf.binding.rows import FloatRows
from ksort_gguf.binding.run import LayerStep, Pool
from ksort_gguf.cache.exact import ring_tiles, steps
from ksort_gguf.cache.protocol import CacheOptions, HeadShape, LayerPlan
from ksort_gguf.errors import ContextError
from ksort_gguf.names import CACHE_TYPES, TILE_TOKENS, check_block_size


def _reserve(n_bytes: int) -> mmap.mmap:
    """Address space that the system backs with memory only where it is written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        return mmap.mmap(-1, n_bytes, flags=flags)
    except (OSError, ValueError, OverflowError) as error:
        raise ContextError(
            f"cannot reserve {n_bytes / 2**30:.1f} GiB for the cache: lower the context size with `n_ctx`",
            field="n_ctx",
        ) from error


class ContextCache:
    """How much one context's cache holds: what caches on all devices have in common.

    Raises KsortError where the options do not fit the heads.
    """

    def __init__(self, layers: Sequence[HeadShape], options: CacheOptions, n_ctx: int):
        if n_ctx < 1:
            raise ContextError(
                f"context size {n_ctx} is not positive: pass `n_ctx` with a number of tokens", field="n_ctx"
            )
        for heads in layers:
            if options.has_blocks or options.query_type == "bfp16":
                check_block_size(options.block_size, heads.head_dim)
        self.layers, self.options, self.n_ctx = tuple(layers), options, n_ctx
        self.n_tokens = 0
        self.n_tiles = -(-n_ctx // TILE_TOKENS)
        self.n_ring_tiles = ring_tiles(options.exact_tail, n_ctx)  # of exact rows
        self.exact_begin = 0  # the first slot, sinks aside, that the ring holds

    def tile_bytes(self, type_name: str, heads: HeadShape) -> int:
        """Bytes of one tile of all of a layer's heads."""
        return heads.n_kv_heads * CACHE_TYPES[type_name].tile_bytes(heads.head_dim, self.options.block_size)

    def k_bytes(self) -> int:
        """Bytes that the stored keys occupy, exact rows among them: whole tiles, all layers."""
        return self._used_bytes(self.options.k_type)

    def v_bytes(self) -> int:
        """Bytes that the stored values occupy, exact rows among them: whole tiles, all layers."""
        return self._used_bytes(self.options.v_type)

    def _used_bytes(self, type_name: str) -> int:
        n_tiles = -(-self.n_tokens // TILE_TOKENS)
        n_bytes = n_tiles * sum(self.tile_bytes(type_name, heads) for heads in self.layers)
        if self.options.has_exact(type_name):
            n_exact = min(n_tiles, self.n_ring_tiles) + min(n_tiles, self.options.exact_sinks, 1)
            n_bytes += n_exact * sum(self.tile_bytes("f16", heads) for heads in self.layers)
        return n_bytes

    def truncate(self, n_tokens: int) -> None:
        """Forget all tokens from slot `n_tokens` on. Their slots are written anew by the tokens that follow."""
        if not 0 <= n_tokens <= self.n_tokens:
            raise ValueError(f"cannot keep {n_tokens} of {self.n_tokens} tokens")
        self.n_tokens = n_tokens


class CpuCache(ContextCache):
    """Packed keys `k[layer]` and values `v[layer]` for `n_ctx` tokens: reserved once, filled as the context grows.

    Memory is [tile][KV head] a layer, so what is stored stays where it is.
    """

    def __init__(self, layers: Sequence[HeadShape], options: CacheOptions, n_ctx: int):
        super().__init__(layers, options, n_ctx)
        self.k = [self._layer(options.k_type, heads) for heads in layers]
        self.v = [self._layer(options.v_type, heads) for heads in layers]

    def _layer(self, type_name: str, heads: HeadShape) -> PackedHeads:
        o, exact = self.options, None
        if o.has_exact(type_name):
            buffer = _reserve((1 + self.n_ring_tiles) * self.tile_bytes("f16", heads))
            sizes = o.exact_tail, o.exact_sinks, self.n_ring_tiles
            exact = ExactRows(heads.head_dim, heads.n_kv_heads, *sizes, buffer)
        buffer = _reserve(self.n_tiles * self.tile_bytes(type_name, heads))
        return PackedHeads(
            type_name, heads.head_dim, o.block_size, heads.n_kv_heads, self.n_ctx, buffer, exact=exact
        )  # fmt: skip


class CpuAttention:
    """cache.protocol.Attention over a CpuCache, on the threads of a pool. For the thread that has the pool."""

    def __init__(self, pool: Pool, cache: CpuCache, layers: Sequence[LayerPlan]):
        self.steps = [
            LayerStep(
                pool,
                cache.k[layer],
                cache.v[layer],
                n_heads=plan.heads.n_heads,
                scale=plan.heads.scale,
                window=plan.heads.window,
                query_type=cache.options.query_type,
                rope=plan.rope,
                layer=layer,
                k_transform=plan.k_transform,
                v_transform=plan.v_transform,
            )
            for layer, plan in enumerate(layers)
        ]
        self._cache = cache
        self._exact = [[heads.exact for heads in sides if heads.exact] for sides in zip(cache.k, cache.v, strict=True)]
        self._has_exact = any(self._exact)
        self._rope_tables = list(dict.fromkeys(plan.rope_table for plan in layers))
        self._table_of = [self._rope_tables.index(plan.rope_table) for plan in layers]

    def bound(self, n_tokens: int) -> int:
        """See Attention."""
        return n_tokens

    def begin(self, n_tokens: int, n_slots: int) -> None:
        """See Attention."""
        self._first_slot = first = n_slots - n_tokens
        self._rows = [table.rows(first, n_tokens) for table in self._rope_tables]
        self._parts: list[tuple[int, int, int]] = []  # in which the step is done, as cache.exact.steps has them
        if self._has_exact:
            self._parts = steps(first, n_tokens, self._cache.exact_begin, self._cache.n_ring_tiles)
            self._cache.exact_begin = self._parts[-1][2]
            for layer in range(len(self.steps)):
                self._set_begin(layer, self._parts[0][2])

    def run(self, layer: int, qkv: FloatRows, out: FloatRows) -> None:
        """See Attention. Raises KsortError for NaN, infinity, and values beyond the cache type's range."""
        if len(self._parts) < 2:
            self.steps[layer].run(qkv, *self.place(layer), out)
            return
        first, cos, sin = self.place(layer)
        for start, stop, begin in self._parts:
            self._set_begin(layer, begin)
            x, its_cos, its_sin, its_out = (rows.rows(start, stop) for rows in (qkv, cos, sin, out))
            self.steps[layer].run(x, first + start, its_cos, its_sin, its_out)

    def _set_begin(self, layer: int, begin: int) -> None:
        for exact in self._exact[layer]:
            exact.begin = begin

    def place(self, layer: int) -> tuple[int, FloatRows, FloatRows]:
        """Where the step's tokens stand: the first one's slot, and their cos and sin in the layer's rope table."""
        cos, sin = self._rows[self._table_of[layer]]
        return self._first_slot, cos, sin
