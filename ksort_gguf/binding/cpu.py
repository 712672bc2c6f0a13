"""One layer's packed keys or values in host memory, and attention over them: libksort's calls, part after part."""

from typing import Any

import numpy as np

from ksort_gguf.binding.ffi import Binding, aligned_buffer, loaded
from ksort_gguf.binding.structs import Rope, TransformTables, float_heads, format_struct
from ksort_gguf.kvplan import RopeTables, Transform
from ksort_gguf.names import BLOCK_SIZES, CACHE_TYPES


def tile_bytes(type_name: str, head_dim: int, block_size: int) -> int:
    """Bytes of one tile, from the library itself. Raises ValueError for an impossible format."""
    binding = loaded()
    return binding.size(binding.lib.ksort_tile_bytes, format_struct(binding, type_name, head_dim, block_size))


class ExactRows:
    """The exact rows beside one layer's packed keys or values: the newest slots and the first ones, in f16 tiles.

    A query reads `n_tail` slots up to its own from them, and the first `n_sinks`. `n_tiles`: of the ring behind the
    first tile. `buffer`: as PackedHeads takes it, for [1 + n_tiles][KV head] tiles of f16.
    Raises ValueError for a buffer that is too small.
    """

    def __init__(self, head_dim: int, n_kv_heads: int, n_tail: int, n_sinks: int, n_tiles: int, buffer: Any = None):
        binding = loaded()
        one_tile = tile_bytes("f16", head_dim, BLOCK_SIZES[0])
        needed = (1 + n_tiles) * n_kv_heads * one_tile
        self._memory = binding.memory(aligned_buffer(needed) if buffer is None else buffer)
        if needed > len(self._memory):
            raise ValueError(f"buffer of {len(self._memory)} bytes is too small: exact rows need {needed}")
        self.n_slots = n_tiles * binding.lib.KSORT_TILE_TOKENS  # that the ring holds
        self.struct = binding.new("ksort_exact")
        self.struct.base, self.struct.head_stride = self._memory, one_tile
        self.struct.tile_stride = n_kv_heads * one_tile
        self.struct.n_tiles, self.struct.n_tail, self.struct.n_sinks = n_tiles, n_tail, n_sinks

    @property
    def begin(self) -> int:
        """The first slot, sinks aside, whose row the ring holds: ksort.h says how to keep it."""
        return int(self.struct.begin)

    @begin.setter
    def begin(self, slot: int) -> None:
        self.struct.begin = slot


class PackedHeads:
    """One layer's packed keys or values, and the exact rows beside them if it has some (BFP types only).

    `buffer` is writable, offers the buffer protocol and is 64-byte aligned; without one, memory is allocated here.
    Tile t of KV head h starts at byte t * tile_stride + h * head_stride; by default a tile's heads follow each other,
    and tiles follow each other.
    Raises ValueError for an impossible format or a buffer too small for `n_slots` tokens (whole tiles).
    """

    def __init__(
        self, type_name: str, head_dim: int, block_size: int, n_kv_heads: int, n_slots: int, buffer: Any = None,
        tile_stride: int | None = None, head_stride: int | None = None, exact: ExactRows | None = None,
    ):  # fmt: skip
        self._binding = binding = loaded()
        self.type_name, self.head_dim, self.n_kv_heads = type_name, head_dim, n_kv_heads
        self.heads = n_kv_heads, head_dim
        one_tile = tile_bytes(type_name, head_dim, block_size)
        head_stride = one_tile if head_stride is None else head_stride
        tile_stride = n_kv_heads * one_tile if tile_stride is None else tile_stride
        n_tiles = -(-n_slots // binding.lib.KSORT_TILE_TOKENS)
        needed = (n_tiles - 1) * tile_stride + (n_kv_heads - 1) * head_stride + one_tile
        if buffer is None:
            buffer = aligned_buffer(needed)
        self._memory = binding.memory(buffer)
        if needed > len(self._memory):
            raise ValueError(f"buffer of {len(self._memory)} bytes is too small: {n_slots} slots need {needed}")
        self.struct = binding.new("ksort_cache")
        self.struct.format = format_struct(binding, type_name, head_dim, block_size)[0]
        self.struct.base = self._memory
        self.struct.tile_stride, self.struct.head_stride = tile_stride, head_stride
        self.struct.n_slots, self.struct.n_kv_heads = n_slots, n_kv_heads
        self.exact = exact
        if exact is not None:
            self.struct.exact = exact.struct

    def pack(
        self, x: Any, first_slot: int, rope: RopeTables | None = None, cos: np.ndarray | None = None,
        sin: np.ndarray | None = None, ith: int = 0, nth: int = 1, transform: Transform | None = None,
    ) -> None:  # fmt: skip
        """Part `ith` of `nth` of storing float32 x [n_tokens, n_kv_heads, head_dim] from `first_slot` on.

        `rope`: RopeTables [n_kv_heads, head_dim] with cos and sin [n_tokens, n_frequencies]. `transform`: a plan's
        Transform, BFP types only. Raises as Binding.check.
        """
        x = float_heads("x", x, self.head_dim, self.n_kv_heads)
        rope_struct = Rope(self._binding, rope, self.heads).with_positions(cos, sin, len(x))
        transform_struct = TransformTables(self._binding, transform, self.heads)
        args = self._binding.new("ksort_pack_args")
        args.cache, args.rope, args.transform = self.struct, rope_struct.pointer, transform_struct.pointer
        args.x, args.x_token_stride = self._binding.array("float *", x), self.n_kv_heads * self.head_dim
        args.first_slot, args.n_tokens = first_slot, len(x)
        self._binding.check(self._binding.lib.ksort_pack(args, ith, nth))

    def unpack(self, first_slot: int, n_tokens: int) -> np.ndarray:
        """The stored values of slots first_slot .. first_slot+n_tokens-1: float32 [n_tokens, n_kv_heads, head_dim]."""
        out = np.empty((n_tokens, self.n_kv_heads, self.head_dim), np.float32)
        status = self._binding.lib.ksort_unpack(self.struct, first_slot, n_tokens, self._binding.array("float *", out))
        self._binding.check(status)
        return out


class AttendArgs:
    """A ksort_attend_args for two caches and what it points to; memory and tokens are still open.

    `transforms`: those that keys and values were packed with, or None each.
    """

    def __init__(
        self, binding: Binding, k: PackedHeads, v: PackedHeads, n_heads: int, scale: float, window: int,
        query_type: str, rope: RopeTables | None, transforms: tuple[Transform | None, Transform | None],
    ):  # fmt: skip
        self._caches = k, v
        self.rope = Rope(binding, rope, k.heads)
        self.k_transform = TransformTables(binding, transforms[0], k.heads)
        self.v_transform = TransformTables(binding, transforms[1], v.heads)
        self.pointer = args = binding.new("ksort_attend_args")
        args.k, args.v, args.rope = k.struct, v.struct, self.rope.pointer
        args.k_transform, args.v_transform = self.k_transform.pointer, self.v_transform.pointer
        args.n_heads, args.window, args.scale = n_heads, window, scale
        args.query_type = CACHE_TYPES[query_type].native_id


def attend(
    k: PackedHeads, v: PackedHeads, q: Any, first_slot: int, *, scale: float, rope: RopeTables | None = None,
    cos: np.ndarray | None = None, sin: np.ndarray | None = None, window: int = 0, query_type: str = "bfp16",
    nth: int = 1, k_transform: Transform | None = None, v_transform: Transform | None = None,
) -> np.ndarray:  # fmt: skip
    """ksort_attend of float32 q [n_queries, n_heads, head_dim] (before RoPE), as float32 of the same shape.

    `k_transform`, `v_transform`: the Transforms that keys and values were packed with. Runs all `nth` parts and the
    merge one after another. Raises as Binding.check.
    """
    binding = loaded()
    q = float_heads("q", q, k.head_dim)
    n_queries, n_heads, head_dim = q.shape
    out = np.empty_like(q)
    struct = AttendArgs(binding, k, v, n_heads, scale, window, query_type, rope, (k_transform, v_transform))
    struct.rope.with_positions(cos, sin, n_queries)
    args = struct.pointer
    args.q, args.out = binding.array("float *", q), binding.array("float *", out)
    args.q_token_stride = args.out_token_stride = n_heads * head_dim
    args.first_slot, args.n_queries = first_slot, n_queries
    workspace = aligned_buffer(binding.size(binding.lib.ksort_attend_workspace_bytes, args, nth))
    args.workspace, args.workspace_bytes = binding.array("void *", workspace), len(workspace)
    for call in (binding.lib.ksort_attend, binding.lib.ksort_attend_merge):
        for ith in range(nth):
            binding.check(call(args, ith, nth))
    return out
