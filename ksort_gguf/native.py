"""libksort through cffi (ABI mode): loading, statuses into exceptions, and the runner's one call a layer.

The only file that knows cffi (native_cuda.py's calls into libksort_cuda go through its binding too). Declarations come
from the headers themselves (native_files.py finds them), so they exist once; what each field means, its shape and its
unit are said there. cffi keeps no Python objects alive: every object here
holds what its C structs point to.
"""

import functools

import numpy as np
from cffi import FFI

from ksort_gguf import native_files, native_structs
from ksort_gguf.errors import KsortError
from ksort_gguf.native_status import LEVELS, user_error
from ksort_gguf.native_structs import Rope, TransformTables, aligned_buffer


class _Binding:
    """A loaded library, lib{name}: `ffi`, `lib`, and the types that hot calls cast to."""

    def __init__(self, name: str = "ksort"):
        library = native_files.library_path(name)
        self.ffi = FFI()
        self.ffi.cdef(native_files.header_text(name))
        try:
            self.lib = self.ffi.dlopen(str(library))
            built = getattr(self.lib, f"{name}_abi_version")()
            expected = getattr(self.lib, f"{name.upper()}_ABI_VERSION")
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
        libksort = loaded()  # its texts serve for libksort_cuda's statuses too
        text = libksort.ffi.string(libksort.lib.ksort_status_text(status)).decode()
        raise ValueError(f"libksort: {text} (status {status}){where}")


loaded = functools.cache(_Binding)  # the one binding of a library in the process


def kernels() -> str:
    """The kernel level in use, one of LEVELS. Raises KsortError if KSORT_KERNELS names one that cannot run here."""
    binding = loaded()
    level = binding.ffi.string(binding.lib.ksort_kernels()).decode()
    if level == "unsupported":
        binding.check(binding.lib.KSORT_ERR_KERNELS)
    return level


def select_kernels(level: str | None) -> None:
    """Use `level` (None: the automatic choice) in the whole process. Raises ValueError if this CPU cannot run it."""
    binding = loaded()
    if binding.lib.ksort_select_kernels(binding.ffi.NULL if level is None else level.encode()):
        raise ValueError(f"kernel level {level!r} is unknown, or this CPU does not support it")


def available_levels() -> list[str]:
    """The levels that this CPU can run, lowest first. The level in use stays as it is."""
    binding = loaded()
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
    binding = loaded()
    struct = native_structs.format_struct(binding, type_name, head_dim, block_size)
    return binding.size(binding.lib.ksort_tile_bytes, struct)


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
    binding = loaded()
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
