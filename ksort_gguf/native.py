"""libksort through cffi (ABI mode): loading, statuses into exceptions, and the runner's one call a layer.

The only file that knows cffi. Declarations come from ksort.h itself (native_files.py finds it), so they exist once;
what each field means, its shape and its unit are said there. cffi keeps no Python objects alive: every object here
holds what its C structs point to.
"""

import functools

import numpy as np
from cffi import FFI

from ksort_gguf import native_files, native_structs
from ksort_gguf.cache_types import CACHE_TYPES
from ksort_gguf.errors import KsortError
from ksort_gguf.families.rope import RopeTables
from ksort_gguf.native_status import LEVELS, user_error
from ksort_gguf.native_structs import ALIGNMENT, Rope, TransformTables, aligned_buffer
from ksort_gguf.plan.kplan import Transform

PARTS = ("k", "v", "attend")  # of a LayerStep: pack keys, pack values, attend

_FLOAT_BYTES = 4


class _Binding:
    """The loaded library: `ffi`, `lib`, and the types that hot calls cast to."""

    def __init__(self):
        library, header = native_files.library_path(), native_files.header_path()
        self.ffi = FFI()
        self.ffi.cdef(native_files.declarations(header.read_text(encoding="utf-8")))
        try:
            self.lib = self.ffi.dlopen(str(library))
            built, expected = self.lib.ksort_abi_version(), self.lib.KSORT_ABI_VERSION
        except (OSError, AttributeError) as error:  # no library at all, or another one without our functions
            raise KsortError(f"{library}: cannot be loaded ({error}): reinstall ksort-gguf on this machine") from error
        if built != expected:
            raise KsortError(f"{library}: ABI version {built}, but this package needs {expected}: reinstall ksort-gguf")
        self.float_pointer = self.ffi.typeof("float *")

    def new(self, struct: str):
        """A zeroed struct of type `struct` with struct_size set, as a pointer that owns it."""
        pointer = self.ffi.new(f"{struct} *")
        pointer.struct_size = self.ffi.sizeof(struct)
        return pointer

    def array(self, ctype: str, values: np.ndarray):
        """A pointer `ctype` to a contiguous array's memory; the caller keeps the array alive."""
        return self.ffi.cast(ctype, values.ctypes.data)

    def size(self, call, *args) -> int:
        """What `call` stores through its last argument, a size_t *, behind `args`. Raises as check."""
        size = self.ffi.new("size_t *")
        self.check(call(*args, size))
        return size[0]

    def check(self, status: int, where: str = "") -> None:
        """Raise for any status but KSORT_OK: KsortError where the user can act, ValueError for a programming error."""
        if status == self.lib.KSORT_OK:
            return
        if error := user_error(self.ffi.string(self.ffi.cast("ksort_status", status)), where):
            raise error
        text = self.ffi.string(self.lib.ksort_status_text(status)).decode()
        raise ValueError(f"libksort: {text} (status {status}){where}")


_binding = functools.cache(_Binding)


def kernels() -> str:
    """The kernel level in use, one of LEVELS. Raises KsortError if KSORT_KERNELS names one that cannot run here."""
    binding = _binding()
    level = binding.ffi.string(binding.lib.ksort_kernels()).decode()
    if level == "unsupported":
        binding.check(binding.lib.KSORT_ERR_KERNELS)
    return level


def select_kernels(level: str | None) -> None:
    """Use `level` (None: the automatic choice) in the whole process. Raises ValueError if this CPU cannot run it."""
    binding = _binding()
    if binding.lib.ksort_select_kernels(binding.ffi.NULL if level is None else level.encode()):
        raise ValueError(f"kernel level {level!r} is unknown, or this CPU does not support it")


def available_levels() -> list[str]:
    """The levels that this CPU can run, lowest first. The level in use stays as it is."""
    binding = _binding()
    in_use = binding.ffi.string(binding.lib.ksort_kernels())
    usable = []
    for level in LEVELS:
        chosen = binding.lib.ksort_select_kernels(level.encode()) == binding.lib.KSORT_OK
        if chosen and kernels() == level:  # "avx512" may fall to "avx512bw"
            usable.append(level)
    binding.lib.ksort_select_kernels(binding.ffi.NULL if in_use == b"unsupported" else in_use)
    return usable


def tile_bytes(type_name: str, head_dim: int, block_size: int) -> int:
    """Bytes of one tile, from the library itself. Raises ValueError for an impossible format."""
    binding = _binding()
    struct = native_structs.format_struct(binding, type_name, head_dim, block_size)
    return binding.size(binding.lib.ksort_tile_bytes, struct)


class Pool:
    """`n_threads` threads (the caller is one of them) and the workspace they share. Used by one thread at a time."""

    def __init__(self, n_threads: int):
        self._binding = _binding()
        handle = self._binding.ffi.new("ksort_pool **")
        self._binding.check(self._binding.lib.ksort_pool_create(n_threads, handle))
        self.n_threads = n_threads
        self.handle = self._binding.ffi.gc(handle[0], self._binding.lib.ksort_pool_destroy)
        self.grow_workspace(ALIGNMENT)

    def grow_workspace(self, n_bytes: int) -> None:
        """Replace the workspace by one of `n_bytes`; its contents are not kept."""
        self.workspace = aligned_buffer(n_bytes)
        self.workspace_pointer = self._binding.array("void *", self.workspace)

    def linear(self, weights: "Weights", x_address: int, y_address: int, n_rows: int) -> None:
        """y = x W^T + bias over all threads: x float32 [n_rows, n_in], y float32 [n_rows, n_out], both contiguous."""
        args, cast, floats = weights.struct, self._binding.ffi.cast, self._binding.float_pointer
        args.x, args.y, args.n_rows = cast(floats, x_address), cast(floats, y_address), n_rows
        self._binding.check(self._binding.lib.ksort_pool_linear(self.handle, args))

    def close(self) -> None:
        """End the threads. Closing twice does nothing; a pool that nobody refers to closes itself."""
        if self.handle != self._binding.ffi.NULL:
            self._binding.ffi.release(self.handle)
            self.handle = self._binding.ffi.NULL

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


class Weights:
    """A matrix [n_out, n_in] in f32, f16 or bf16, rows contiguous, with an optional float32 bias [n_out].

    For Pool.linear. Both are given by their addresses; the caller keeps their memory alive.
    """

    def __init__(self, type_name: str, n_out: int, n_in: int, address: int, bias_address: int | None = None):
        binding = _binding()
        self.struct = args = binding.new("ksort_linear_args")
        args.type, args.n_out, args.n_in = CACHE_TYPES[type_name].native_id, n_out, n_in
        args.x_row_stride, args.y_row_stride = n_in, n_out
        args.weights = binding.ffi.cast("void *", address)
        if bias_address is not None:
            args.bias = binding.ffi.cast(binding.float_pointer, bias_address)


class Cache:
    """One layer's packed keys or values.

    `buffer` is writable, offers the buffer protocol and is 64-byte aligned; without one, memory is allocated here.
    Tile t of KV head h starts at byte t * tile_stride + h * head_stride; by default a tile's heads follow each other,
    and tiles follow each other.
    Raises ValueError for an impossible format or a buffer too small for `n_slots` tokens (whole tiles).
    """

    def __init__(
        self, type_name, head_dim, block_size, n_kv_heads, n_slots, buffer=None, tile_stride=None, head_stride=None
    ):
        self._binding = binding = _binding()
        self.type_name, self.head_dim, self.n_kv_heads = type_name, head_dim, n_kv_heads
        self.heads = n_kv_heads, head_dim
        one_tile = tile_bytes(type_name, head_dim, block_size)
        head_stride = one_tile if head_stride is None else head_stride
        tile_stride = n_kv_heads * one_tile if tile_stride is None else tile_stride
        n_tiles = -(-n_slots // binding.lib.KSORT_TILE_TOKENS)
        needed = (n_tiles - 1) * tile_stride + (n_kv_heads - 1) * head_stride + one_tile
        if buffer is None:
            buffer = aligned_buffer(needed)
        self._memory = binding.ffi.from_buffer(buffer, require_writable=True)
        if needed > len(self._memory):
            raise ValueError(f"buffer of {len(self._memory)} bytes is too small: {n_slots} slots need {needed}")
        self.struct = binding.new("ksort_cache")
        self.struct.format = native_structs.format_struct(binding, type_name, head_dim, block_size)[0]
        self.struct.base = self._memory
        self.struct.tile_stride, self.struct.head_stride = tile_stride, head_stride
        self.struct.n_slots, self.struct.n_kv_heads = n_slots, n_kv_heads

    def pack(self, x, first_slot, rope=None, cos=None, sin=None, ith=0, nth=1, transform=None) -> None:
        """Part `ith` of `nth` of storing float32 x [n_tokens, n_kv_heads, head_dim] from `first_slot` on.

        `rope`: RopeTables [n_kv_heads, head_dim] with cos and sin [n_tokens, n_frequencies]. `transform`: a plan's
        Transform, BFP types only. Raises as _Binding.check.
        """
        x = native_structs.float_heads("x", x, self.head_dim, self.n_kv_heads)
        rope_struct = Rope(self._binding, rope, self.heads).with_waves(cos, sin, len(x))
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


def attend(
    k_cache, v_cache, q, first_slot, *, scale, rope=None, cos=None, sin=None, window=0, query_type="bfp16", nth=1,
    k_transform=None, v_transform=None,
) -> np.ndarray:  # fmt: skip
    """ksort_attend of float32 q [n_queries, n_heads, head_dim] (before RoPE), as float32 of the same shape.

    `k_transform`, `v_transform`: the Transforms that keys and values were packed with. Runs all `nth` parts and the
    merge one after another: for tests and embedding. Raises as _Binding.check.
    """
    binding = _binding()
    q = native_structs.float_heads("q", q, k_cache.head_dim)
    n_queries, n_heads, head_dim = q.shape
    out = np.empty_like(q)
    transforms = k_transform, v_transform
    struct = native_structs.Attend(binding, k_cache, v_cache, n_heads, scale, window, query_type, rope, transforms)
    struct.rope.with_waves(cos, sin, n_queries)
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


class LayerStep:
    """The runner's one call a layer: packs the step's keys and values, then attends, over all threads of `pool`.

    `rope`: tables with arrays [n_kv_heads, head_dim]; `k_transform`, `v_transform`: the plan's for this layer, None
    for float cache types. `layer` only serves error messages.
    """

    def __init__(
        self, pool, k_cache, v_cache, *, n_heads, scale, window, query_type, rope: RopeTables, layer=None,
        k_transform: Transform | None = None, v_transform: Transform | None = None,
    ):  # fmt: skip
        self._binding = binding = _binding()
        self._pool, self._where = pool, "" if layer is None else f" (layer {layer})"
        self._kept = struct = native_structs.Attend(
            binding, k_cache, v_cache, n_heads, scale, window, query_type, rope, (k_transform, v_transform)
        )
        self._attend, self._rope = struct.pointer, struct.rope.pointer
        self._k, self._v = binding.new("ksort_pack_args"), binding.new("ksort_pack_args")
        self._k.cache, self._k.transform, self._k.rope = k_cache.struct, struct.k_transform.pointer, self._rope
        self._v.cache, self._v.transform = v_cache.struct, struct.v_transform.pointer
        null = binding.ffi.NULL
        self._alone = {"k": (self._k, null, null), "v": (null, self._v, null), "attend": (null, null, self._attend)}
        self._k_offset = n_heads * k_cache.head_dim * _FLOAT_BYTES
        self._v_offset = self._k_offset + k_cache.n_kv_heads * k_cache.head_dim * _FLOAT_BYTES

    def run(self, *step: int) -> None:
        """One step, said as `prepare` takes it.

        Raises as _Binding.check; nothing was packed then, unless scores overflowed.
        """
        self.prepare(*step)
        self._call(self._k, self._v, self._attend)

    def prepare(
        self, qkv_address: int, token_stride: int, n_tokens: int, first_slot: int,
        cos_address: int, sin_address: int, n_frequencies: int, out_address: int, out_token_stride: int,
    ) -> None:  # fmt: skip
        """Say where a step of `n_tokens` tokens is, the first in slot `first_slot`; nothing runs yet.

        Addresses are of float32, strides in floats. A row of qkv is [n_heads q | n_kv_heads k | n_kv_heads v] *
        head_dim; cos and sin are [n_tokens, n_frequencies]; out rows are [n_heads * head_dim].
        """
        binding, k, v, attend_args, rope = self._binding, self._k, self._v, self._attend, self._rope
        cast, floats = binding.ffi.cast, binding.float_pointer
        rope.cos, rope.sin, rope.n_frequencies = cast(floats, cos_address), cast(floats, sin_address), n_frequencies
        k.x, v.x = cast(floats, qkv_address + self._k_offset), cast(floats, qkv_address + self._v_offset)
        k.x_token_stride = v.x_token_stride = attend_args.q_token_stride = token_stride
        k.first_slot = v.first_slot = attend_args.first_slot = first_slot
        k.n_tokens = v.n_tokens = attend_args.n_queries = n_tokens
        attend_args.q, attend_args.out = cast(floats, qkv_address), cast(floats, out_address)
        attend_args.out_token_stride = out_token_stride

    def run_part(self, part: str) -> None:
        """One of PARTS of the step that was prepared last, alone: for measurements. Raises as _Binding.check."""
        self._call(*self._alone[part])

    def _call(self, k, v, attend_args) -> None:
        lib, pool = self._binding.lib, self._pool
        status = self._step(k, v, attend_args)
        if status == lib.KSORT_ERR_WORKSPACE:  # rare: the sizes grew. Packing again writes the same bytes.
            pool.grow_workspace(self._binding.size(lib.ksort_attend_workspace_bytes, attend_args, pool.n_threads))
            status = self._step(k, v, attend_args)
        if status:
            self._binding.check(status, self._where)

    def _step(self, k, v, attend_args) -> int:
        pool, attend_struct = self._pool, self._attend
        attend_struct.workspace, attend_struct.workspace_bytes = pool.workspace_pointer, len(pool.workspace)
        return self._binding.lib.ksort_pool_step(pool.handle, k, v, attend_args)
