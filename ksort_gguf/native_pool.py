"""The runner's calls into libksort, over a pool of threads: what a transformer block does around and in attention.

Knows no cffi: calls go through native.py's binding.
"""

import functools
from collections.abc import Callable, Iterable

from ksort_gguf import native, native_structs
from ksort_gguf.cache_types import CACHE_TYPES
from ksort_gguf.families.rope import RopeTables
from ksort_gguf.native_structs import ALIGNMENT, aligned_buffer
from ksort_gguf.plan.kplan import Transform

PARTS = ("k", "v", "attend")  # of a LayerStep: pack keys, pack values, attend
NO_PART = "none"  # what a call costs that does nothing

_FLOAT_BYTES = 4


class Pool:
    """`n_threads` threads (the caller is one of them) and the workspace they share. Used by one thread at a time."""

    def __init__(self, n_threads: int):
        self._binding = native.loaded()
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
        self.run([weights.call(self, x_address, y_address, n_rows)])

    def rms_norm(self, norm: "RmsNorm", x_address: int, added_address: int, y_address: int, n_rows: int) -> None:
        """x += added (unless its address is 0), y = RMSNorm(x) over all threads: float32 [n_rows, n], contiguous."""
        self.run([norm.call(self, x_address, added_address, y_address, n_rows)])

    def swiglu(self, swiglu: "SwiGlu", gate_up_address: int, y_address: int, n_rows: int) -> None:
        """y = silu(gate) * up over all threads: rows [gate | up] float32 [n_rows, 2 n], y [n_rows, n], contiguous."""
        up_address = gate_up_address + swiglu.struct.n * _FLOAT_BYTES
        self.run([swiglu.call(self, gate_up_address, up_address, y_address, n_rows)])

    def run(self, calls: Iterable[Callable[[], int]]) -> None:
        """Make calls that Weights, RmsNorm and SwiGlu prepared, one after another. Raises as _Binding.check."""
        for call in calls:
            if status := call():
                self._binding.check(status)

    def close(self) -> None:
        """End the threads. Closing twice does nothing; a pool that nobody refers to closes itself."""
        if self.handle != self._binding.ffi.NULL:
            self._binding.ffi.release(self.handle)
            self.handle = self._binding.ffi.NULL

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


class _Operation:
    """A C struct of an operation over rows, and the library's function that takes it."""

    _pointers: tuple[str, ...]  # fields, in the order that `aim` takes their addresses

    def __init__(self, name: str):
        self._binding = native.loaded()
        self.struct = self._binding.new(f"ksort_{name}_args")
        self._function = getattr(self._binding.lib, f"ksort_pool_{name}")

    def aim(self, *addresses_and_rows: int) -> None:
        """Point to float32 rows at the addresses, then how many rows."""
        *addresses, self.struct.n_rows = addresses_and_rows
        for field, address in zip(self._pointers, addresses, strict=True):
            setattr(self.struct, field, self._binding.ffi.cast(self._binding.float_pointer, address))

    def call(self, pool: Pool, *addresses_and_rows: int) -> Callable[[], int]:
        """A call for Pool.run over these rows, to be made any number of times until the next `aim` or `call`."""
        self.aim(*addresses_and_rows)
        return functools.partial(self._function, pool.handle, self.struct)


class Weights(_Operation):
    """A matrix [n_out, n_in] in f32, f16 or bf16, rows contiguous, with an optional float32 bias [n_out].

    For Pool.linear. Both are given by their addresses; the caller keeps their memory alive.
    """

    _pointers = "x", "y"

    def __init__(self, type_name: str, n_out: int, n_in: int, address: int, bias_address: int | None = None):
        super().__init__("linear")
        args, binding = self.struct, self._binding
        args.type, args.n_out, args.n_in = CACHE_TYPES[type_name].native_id, n_out, n_in
        args.x_row_stride, args.y_row_stride = n_in, n_out
        args.weights = binding.ffi.cast("void *", address)
        if bias_address is not None:
            args.bias = binding.ffi.cast(binding.float_pointer, bias_address)


class RmsNorm(_Operation):
    """RMSNorm of rows of `n` values, for Pool.rms_norm. The caller keeps the float32 gain [n] at `address` alive."""

    _pointers = "x", "added", "y"

    def __init__(self, n: int, address: int, epsilon: float):
        super().__init__("rms_norm")
        args, binding = self.struct, self._binding
        args.gain, args.n, args.epsilon = binding.ffi.cast(binding.float_pointer, address), n, epsilon
        args.x_row_stride = args.added_row_stride = args.y_row_stride = n


class SwiGlu(_Operation):
    """SwiGLU of rows of `n` gates and `n` values, for Pool.swiglu."""

    _pointers = "gate", "up", "y"

    def __init__(self, n: int):
        super().__init__("swiglu")
        self.struct.n, self.struct.row_stride, self.struct.y_row_stride = n, 2 * n, n


class LayerStep:
    """The runner's one call a layer: packs the step's keys and values, then attends, over all threads of `pool`.

    `rope`: tables with arrays [n_kv_heads, head_dim]; `k_transform`, `v_transform`: the plan's for this layer, None
    for float cache types. `layer` only serves error messages.
    """

    def __init__(
        self, pool, k_cache, v_cache, *, n_heads, scale, window, query_type, rope: RopeTables, layer=None,
        k_transform: Transform | None = None, v_transform: Transform | None = None,
    ):  # fmt: skip
        self._binding = binding = native.loaded()
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
        self._alone[NO_PART] = (null, null, null)
        self._aimed: tuple[int, ...] = ()  # rows that the structs point to
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
        k.first_slot = v.first_slot = attend_args.first_slot = first_slot
        rows = qkv_address, token_stride, n_tokens, out_address, out_token_stride
        if rows == self._aimed:
            return
        self._aimed = rows
        k.x, v.x = cast(floats, qkv_address + self._k_offset), cast(floats, qkv_address + self._v_offset)
        k.x_token_stride = v.x_token_stride = attend_args.q_token_stride = token_stride
        k.n_tokens = v.n_tokens = attend_args.n_queries = n_tokens
        attend_args.q, attend_args.out = cast(floats, qkv_address), cast(floats, out_address)
        attend_args.out_token_stride = out_token_stride

    def run_part(self, part: str) -> None:
        """One of PARTS, or NO_PART, of the step prepared last: for measurements. Raises as _Binding.check."""
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
