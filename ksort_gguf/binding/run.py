"""The runner's calls into libksort_run, over a pool of threads: what a block does around and in attention."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

from ksort_gguf.binding.cpu import AttendArgs, PackedHeads
from ksort_gguf.binding.ffi import ALIGNMENT, aligned_buffer, loaded
from ksort_gguf.binding.rows import FloatRows, type_name
from ksort_gguf.kvplan import RopeTables, Transform
from ksort_gguf.names import CACHE_TYPES

PARTS = ("k", "v", "attend")  # of a LayerStep: pack keys, pack values, attend
NO_PART = "none"  # what a call costs that does nothing

Call = Callable[[], int]  # a prepared call into the library, which returns a status


class Pool:
    """`n_threads` threads (the caller is one of them) and the workspace they share. Used by one thread at a time."""

    def __init__(self, n_threads: int):
        self._binding = loaded("ksort_run")
        lib = self._binding.lib
        self.handle = self._binding.owned(lib.ksort_pool_create, lib.ksort_pool_destroy, "ksort_pool *", n_threads)
        self.n_threads = n_threads
        self.grow_workspace(ALIGNMENT)

    def grow_workspace(self, n_bytes: int) -> None:
        """Replace the workspace by one of `n_bytes`; its contents are not kept."""
        self.workspace = aligned_buffer(n_bytes)
        self.workspace_pointer = self._binding.array("void *", self.workspace)

    def run(self, calls: Iterable[Call]) -> None:
        """Make calls that Linear, RmsNorm and SwiGlu prepared, one after another. Raises as Binding.check."""
        for call in calls:
            if status := call():
                self._binding.check(status)

    def close(self) -> None:
        """End the threads. Closing twice does nothing; a pool that nobody refers to closes itself."""
        if self.handle != self._binding.null:
            self._binding.release(self.handle)
            self.handle = self._binding.null

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Operation:
    """A C struct of an operation over rows, and the library's function that takes it."""

    _fields: tuple[str, ...]  # rows, each with a {field}_row_stride beside it, in the order that `call` takes them

    def __init__(self, name: str):
        self._binding = loaded("ksort_run")
        self.struct = self._binding.new(f"ksort_{name}_args")
        self._function = getattr(self._binding.lib, f"ksort_pool_{name}")
        self._rows: tuple[FloatRows | None, ...] = ()  # kept alive

    def call(self, pool: Pool, *rows: FloatRows | None) -> Call:
        """A call for Pool.run over these rows, to be made any number of times until the next `call`."""
        self._rows = rows
        for field, x in zip(self._fields, rows, strict=True):
            setattr(self.struct, field, self._binding.null if x is None else self._binding.floats(x))
            if x is not None:
                setattr(self.struct, f"{field}_row_stride", x.stride)
        self.struct.n_rows = next(x.n_rows for x in rows if x is not None)
        return functools.partial(self._function, pool.handle, self.struct)


class Linear(_Operation):
    """y = x W^T + bias. W [n_out, n_in] in f32, f16 or bf16 with contiguous rows, bias float32 [n_out] or None.

    Torch tensors, used as they are and kept alive. `call` takes rows x [n, n_in] and y [n, n_out].
    """

    _fields = "x", "y"

    def __init__(self, weight: Any, bias: Any = None):
        super().__init__("linear")
        self._kept = weight, bias
        args, binding = self.struct, self._binding
        self.n_out, self.n_in = weight.shape
        args.type, args.n_out, args.n_in = CACHE_TYPES[type_name(weight)].native_id, self.n_out, self.n_in
        args.weights = binding.array("void *", weight)
        if bias is not None:
            args.bias = binding.array("float *", bias)


class RmsNorm(_Operation):
    """x += added_scale * added (None adds nothing), then y = RMSNorm(x) with a float32 gain [n].

    heads: a row holds this many vectors of n values, each normalized by itself; y may be x. `call` takes rows x, added
    and y.
    """

    _fields = "x", "added", "y"

    def __init__(self, gain: Any, epsilon: float, heads: int = 1, added_scale: float = 1.0):
        super().__init__("rms_norm")
        self._kept = gain
        args = self.struct
        args.gain, args.n, args.epsilon = self._binding.array("float *", gain), len(gain), epsilon
        args.heads, args.added_scale = heads, added_scale


class SwiGlu(_Operation):
    """y = silu(gate) * up. `call` takes rows gate, up and y, all [n, n_ff]."""

    _fields = "gate", "up", "y"

    def __init__(self, n: int):
        super().__init__("swiglu")
        self.struct.n = n

    def call(self, pool: Pool, *rows: FloatRows | None) -> Call:
        gate, up, y = (row for row in rows if row is not None)
        if gate.stride != up.stride:
            raise ValueError(f"rows of gate and up are {gate.stride} and {up.stride} apart: they must be alike")
        self._rows, args = rows, self.struct
        args.gate, args.up, args.y = (self._binding.floats(x) for x in (gate, up, y))
        args.row_stride, args.y_row_stride, args.n_rows = gate.stride, y.stride, gate.n_rows
        return functools.partial(self._function, pool.handle, args)


class LayerStep:
    """The runner's one call a layer: packs the step's keys and values, then attends, over all threads of `pool`.

    `rope`: tables with arrays [n_kv_heads, head_dim]; `k_transform`, `v_transform`: the plan's for this layer, None
    for float cache types. `layer` only serves error messages.
    """

    def __init__(
        self, pool: Pool, k: PackedHeads, v: PackedHeads, *, n_heads: int, scale: float, window: int, query_type: str,
        rope: RopeTables, layer: int | None = None, k_transform: Transform | None = None,
        v_transform: Transform | None = None,
    ):  # fmt: skip
        self._binding = binding = loaded("ksort_run")
        self._pool, self._where = pool, "" if layer is None else f" (layer {layer})"
        self._kept = struct = AttendArgs(
            binding, k, v, n_heads, scale, window, query_type, rope, (k_transform, v_transform)
        )
        self._attend, self._rope = struct.pointer, struct.rope.pointer
        self._k, self._v = binding.new("ksort_pack_args"), binding.new("ksort_pack_args")
        self._k.cache, self._k.transform, self._k.rope = k.struct, struct.k_transform.pointer, self._rope
        self._v.cache, self._v.transform = v.struct, struct.v_transform.pointer
        null = binding.null
        self._alone = {"k": (self._k, null, null), "v": (null, self._v, null), "attend": (null, null, self._attend)}
        self._alone[NO_PART] = (null, null, null)
        self._rows: tuple[FloatRows, FloatRows] | None = None  # that the structs point to, kept alive
        self._n_q, self._n_kv = n_heads * k.head_dim, k.n_kv_heads * k.head_dim

    def run(self, qkv: FloatRows, first_slot: int, cos: FloatRows, sin: FloatRows, out: FloatRows) -> None:
        """One step, said as `prepare` takes it.

        Raises as Binding.check; nothing was packed then, unless scores overflowed.
        """
        self.prepare(qkv, first_slot, cos, sin, out)
        self._call(self._k, self._v, self._attend)

    def prepare(self, qkv: FloatRows, first_slot: int, cos: FloatRows, sin: FloatRows, out: FloatRows) -> None:
        """Say where a step of qkv.n_rows tokens is, the first in slot `first_slot`; nothing runs yet.

        A row of qkv is [n_heads q | n_kv_heads k | n_kv_heads v] * head_dim; cos and sin are the rope table's rows of
        these tokens, [n_tokens, n_frequencies]; rows of out are [n_heads * head_dim].
        """
        binding, k, v, attend, rope = self._binding, self._k, self._v, self._attend, self._rope
        rope.cos, rope.sin, rope.n_frequencies = binding.floats(cos), binding.floats(sin), cos.width
        k.first_slot = v.first_slot = attend.first_slot = first_slot
        if self._rows is not None and self._rows[0] is qkv and self._rows[1] is out:
            return
        self._rows = qkv, out
        k_rows = qkv.columns(self._n_q, self._n_q + self._n_kv)
        v_rows = qkv.columns(self._n_q + self._n_kv, self._n_q + 2 * self._n_kv)
        k.x, v.x, attend.q, attend.out = (binding.floats(x) for x in (k_rows, v_rows, qkv, out))
        k.x_token_stride = v.x_token_stride = attend.q_token_stride = qkv.stride
        k.n_tokens = v.n_tokens = attend.n_queries = qkv.n_rows
        attend.out_token_stride = out.stride

    def run_part(self, part: str) -> None:
        """One of PARTS, or NO_PART, of the step prepared last: for measurements. Raises as Binding.check."""
        self._call(*self._alone[part])

    def _call(self, k: Any, v: Any, attend: Any) -> None:
        lib, pool = self._binding.lib, self._pool
        status = self._step(k, v, attend)
        if status == lib.KSORT_ERR_WORKSPACE:  # rare: the sizes grew. Packing again writes the same bytes.
            libksort = loaded().lib
            pool.grow_workspace(self._binding.size(libksort.ksort_attend_workspace_bytes, attend, pool.n_threads))
            status = self._step(k, v, attend)
        if status:
            self._binding.check(status, self._where)

    def _step(self, k: Any, v: Any, attend: Any) -> int:
        pool, args = self._pool, self._attend
        args.workspace, args.workspace_bytes = pool.workspace_pointer, len(pool.workspace)
        return int(self._binding.lib.ksort_pool_step(pool.handle, k, v, attend))
