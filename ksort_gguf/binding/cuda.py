"""libksort_cuda: packing into, and attending over, caches in device memory.

Memory is given as torch tensors on the device, or anything else with shape, dtype and data_ptr(); the caller keeps it
alive until the stream has passed the call. What fields mean, and what a call may return, is said in ksort_cuda.h.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ksort_gguf.binding.ffi import Binding, loaded
from ksort_gguf.binding.rows import FloatRows
from ksort_gguf.binding.structs import POINTERS, ROPE_DTYPES, format_struct
from ksort_gguf.errors import DeviceError
from ksort_gguf.kvplan import RopeTables, Transform
from ksort_gguf.names import CACHE_TYPES, TRANSFORM_TABLES

HEAD_DIMS = (64, 80, 96, 128, 256)
K_TYPES = ("bfp16", "bfp14", "bfp12", "sbfp12", "sbfp11")
V_TYPES = ("f16", "bf16", "bfp16", "bfp12", "sbfp12", "sbfp11")

OnDevice = Callable[[np.ndarray], Any]  # a copy of an array in device memory


def library() -> Binding:
    """The binding of libksort_cuda. Raises DeviceError where it is missing, or this GPU does not run its kernels."""
    binding = loaded("ksort_cuda")
    if binding.lib.ksort_cuda_device_status():
        raise DeviceError(
            "this GPU does not run libksort_cuda's kernels (they need compute capability 8.0, and a driver as new as "
            "the CUDA that built them): run on the CPU"
        )
    return binding


def check_status(status: int) -> None:
    """Raise for a status returned by a call or found in *device_status, as Binding.check; KSORT_OK passes."""
    if not status:
        return
    binding = loaded("ksort_cuda")
    if status == binding.lib.KSORT_ERR_CUDA:
        raise DeviceError("the GPU refused one of libksort_cuda's kernels: free some of its memory, or use the CPU")
    binding.check(status)


@dataclass(frozen=True)
class CacheLayout:
    """Contiguous caches of `n_contexts` contexts, [context][tile][KV head] tiles of one type."""

    type_name: str
    head_dim: int
    block_size: int
    n_kv_heads: int
    n_tiles: int  # of a context
    n_contexts: int = 1

    @property
    def head_bytes(self) -> int:
        """Bytes of one tile of one head."""
        return CACHE_TYPES[self.type_name].tile_bytes(self.head_dim, self.block_size)

    @property
    def n_bytes(self) -> int:
        return self.n_contexts * self.n_tiles * self.n_kv_heads * self.head_bytes


class ExactRows:
    """Exact rows beside one layer's packed keys and values: [context][1 + n_tiles][KV head] f16 tiles, sinks' first.

    k_rows, v_rows: uint8 on the device, or None beside a float type. begin: int32 [n_contexts] on the device, the first
    slot, sinks aside, that the rings of n_tiles hold.
    """

    def __init__(
        self, k: CacheLayout, k_rows: Any, v: CacheLayout, v_rows: Any, begin: Any, *, n_tail: int, n_sinks: int,
        n_tiles: int,
    ):  # fmt: skip
        self._sizes, self._begin = (n_tail, n_sinks, n_tiles), begin
        self.k, self.v = self._struct(k, k_rows), self._struct(v, v_rows)

    def _struct(self, layout: CacheLayout, rows: Any) -> Any:
        binding = library()
        if rows is None:
            return binding.null
        struct = binding.new("ksort_cuda_exact")
        struct.n_tail, struct.n_sinks, struct.n_tiles = self._sizes
        struct.head_stride = CACHE_TYPES["f16"].tile_bytes(layout.head_dim, layout.block_size)
        struct.tile_stride = layout.n_kv_heads * struct.head_stride
        struct.context_stride = (1 + struct.n_tiles) * struct.tile_stride
        struct.base, struct.begin = binding.array("void *", rows), binding.array("int32_t *", self._begin)
        return struct


@dataclass(frozen=True)
class Tokens:
    """Which tokens a call is about: the new ones, `n_tokens` for each context, behind n_cached[c] others."""

    n_tokens: int
    n_cached: Any  # int32 [n_contexts] on the device
    device_status: Any  # int32 [1] on the device: where kernels report what they find


class Layer:
    """The calls of one layer: pack new keys and values into its caches, and attend over them.

    k_memory, v_memory: uint8 [layout.n_bytes] on the device. x_type: cache type name of all rows, f32, f16 or bf16.
    max_slots: the most tokens that a context will have. rope: tables, with cos and sin float32 [n_positions,
    n_frequencies] on the device; None for rows that are rotated already. Rows are of all contexts one after the other,
    [n_contexts * n_tokens, heads * head_dim].
    """

    def __init__(
        self, k: CacheLayout, k_memory: Any, v: CacheLayout, v_memory: Any, *, n_heads: int, scale: float,
        window: int, max_slots: int, x_type: str, on_device: OnDevice, rope: RopeTables | None = None,
        cos: Any = None, sin: Any = None, k_transform: Transform | None = None, v_transform: Transform | None = None,
    ):  # fmt: skip
        self._binding = binding = library()
        self._on_device, self._kept = on_device, [k_memory, v_memory, cos, sin]
        self._n_positions = max_slots if rope is None else len(cos)
        structs = self._caches = self._cache(k, k_memory), self._cache(v, v_memory)
        rope_struct = self._rope(rope, cos, sin)
        transforms = self._transform(k_transform), self._transform(v_transform)
        self._kept += [*structs, rope_struct, *transforms]
        self._tokens = binding.new("ksort_cuda_tokens")
        self._tokens.n_contexts = k.n_contexts
        self._aimed: Tokens | None = None  # what the struct says
        self._workspace: Any = None  # likewise
        self._pack, self._attend = binding.new("ksort_cuda_pack_args"), binding.new("ksort_cuda_attend_args")
        for args in (self._pack, self._attend):
            args.tokens, args.rope, args.x_type = self._tokens, rope_struct, CACHE_TYPES[x_type].native_id
            args.k, args.v = structs
            args.k_transform, args.v_transform = transforms
        self._attend.n_heads, self._attend.scale = n_heads, scale
        self._attend.window, self._attend.max_slots = window, max_slots

    def set_exact(self, rows: ExactRows) -> None:
        """The exact rows that the calls from now on keep and read."""
        self._exact = rows
        self._caches[0].exact, self._caches[1].exact = rows.k, rows.v

    def pack(self, tokens: Tokens, k: FloatRows, v: FloatRows, stream: int) -> None:
        """Store the tokens' keys and values, rows of one stride. Raises as check_status."""
        args = self._pack
        self._aim(tokens)
        args.k_x, args.v_x = self._binding.pointer(k.address), self._binding.pointer(v.address)
        args.token_stride, args.context_stride = k.stride, k.stride * tokens.n_tokens
        check_status(self._binding.lib.ksort_cuda_pack(args, self._binding.pointer(stream)))

    def attend(self, tokens: Tokens, q: FloatRows, out: FloatRows, workspace: Any, stream: int) -> None:
        """softmax(scale * q k^T) v of the tokens packed last; workspace: uint8 [bytes]. Raises as check_status."""
        args, binding = self._attend, self._binding
        self._aim(tokens)
        args.q, args.out = binding.pointer(q.address), binding.pointer(out.address)
        args.q_token_stride, args.q_context_stride = q.stride, q.stride * tokens.n_tokens
        args.out_token_stride, args.out_context_stride = out.stride, out.stride * tokens.n_tokens
        if workspace is not self._workspace:
            self._workspace = workspace
            args.workspace, args.workspace_bytes = binding.array("void *", workspace), len(workspace)
        check_status(binding.lib.ksort_cuda_attend(args, binding.pointer(stream)))

    def workspace_bytes(self, tokens: Tokens) -> int:
        """Workspace that `attend` needs for these tokens; a prompt needs no more than a longer one."""
        args = self._attend
        self._aim(tokens)
        args.q_token_stride = args.out_token_stride = args.n_heads * args.k.format.head_dim
        args.q_context_stride = args.out_context_stride = tokens.n_tokens * args.q_token_stride
        return self._binding.size(self._binding.lib.ksort_cuda_attend_workspace_bytes, args)

    def _aim(self, tokens: Tokens) -> None:
        if tokens is self._aimed:
            return
        self._aimed = tokens
        struct, array = self._tokens, self._binding.array
        struct.n_tokens, struct.n_positions = tokens.n_tokens, self._n_positions
        struct.n_cached = array("int32_t *", tokens.n_cached)
        struct.device_status = array("int32_t *", tokens.device_status)

    def _cache(self, layout: CacheLayout, memory: Any) -> Any:
        struct = self._binding.new("ksort_cuda_cache")
        struct.format = format_struct(self._binding, layout.type_name, layout.head_dim, layout.block_size)[0]
        struct.base = self._binding.array("void *", memory)
        struct.head_stride, struct.tile_stride = layout.head_bytes, layout.n_kv_heads * layout.head_bytes
        struct.page_stride = layout.n_tiles * struct.tile_stride
        struct.context_pages, struct.page_tiles = 1, layout.n_tiles
        struct.n_contexts, struct.n_kv_heads = layout.n_contexts, layout.n_kv_heads
        return struct

    def _table(self, values: np.ndarray, dtype: str) -> Any:
        """A pointer to a copy on the device."""
        copy = self._on_device(np.ascontiguousarray(values, dtype))
        self._kept.append(copy)
        return self._binding.array(POINTERS[dtype], copy)

    def _rope(self, rope: RopeTables | None, cos: Any, sin: Any) -> Any:
        if rope is None:
            return self._binding.null
        struct = self._binding.new("ksort_rope")
        struct.n_frequencies = cos.shape[1]
        for field, dtype in ROPE_DTYPES.items():
            setattr(struct, field, self._table(getattr(rope, field), dtype))
        struct.cos, struct.sin = self._binding.array("float *", cos), self._binding.array("float *", sin)
        return struct

    def _transform(self, transform: Transform | None) -> Any:
        if transform is None:
            return self._binding.null
        struct = self._binding.new("ksort_transform")
        struct.rotate, found = transform.rotate, transform.tables()
        for table in TRANSFORM_TABLES:
            if table.name in found:
                setattr(struct, table.name, self._table(found[table.name], table.native_dtype))
        return struct
