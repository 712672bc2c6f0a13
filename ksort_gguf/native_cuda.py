"""libksort_cuda: packing into, and attending over, caches in device memory.

Device memory is given by addresses, so that nothing here depends on torch; the caller keeps it alive until the stream
has passed the call. What fields mean, and what a call may return, is said in ksort_cuda.h. Knows no cffi: calls go
through native.py's binding.
"""

from dataclasses import dataclass

from ksort_gguf import native, native_structs
from ksort_gguf.cache_types import CACHE_TYPES, tile_bytes
from ksort_gguf.errors import KsortError

HEAD_DIMS = (64, 80, 96, 128, 256)
K_TYPES = ("bfp16", "bfp14", "bfp12")
V_TYPES = ("f16", "bf16", "bfp16", "bfp12")
WORKSPACE_ALIGNMENT = 256  # bytes


def loaded():
    """The binding of libksort_cuda. Raises KsortError where it is missing, or this GPU does not run its kernels."""
    binding = native.loaded("ksort_cuda")
    if binding.lib.ksort_cuda_device_status():
        raise KsortError(
            "this GPU does not run libksort_cuda's kernels (they need compute capability 8.0, and a driver as new as "
            "the CUDA that built them): run on the CPU"
        )
    return binding


def check_status(status: int) -> None:
    """Raise for a status returned by a call or found in *device_status, as _Binding.check; KSORT_OK passes."""
    if not status:
        return
    binding = native.loaded("ksort_cuda")
    if status == binding.lib.KSORT_ERR_CUDA:
        raise KsortError("the GPU refused one of libksort_cuda's kernels: free some of its memory, or use the CPU")
    binding.check(status)


@dataclass(frozen=True)
class CacheLayout:
    """Contiguous caches of `n_sequences` sequences, [sequence][tile][KV head] tiles of one type."""

    type_name: str
    head_dim: int
    block_size: int
    n_kv_heads: int
    n_tiles: int  # of a sequence
    n_sequences: int = 1

    @property
    def head_bytes(self) -> int:
        """Bytes of one tile of one head."""
        return tile_bytes(CACHE_TYPES[self.type_name], self.head_dim, self.block_size)

    @property
    def n_bytes(self) -> int:
        return self.n_sequences * self.n_tiles * self.n_kv_heads * self.head_bytes


@dataclass(frozen=True)
class RopeAddresses:
    """Device addresses of a ksort_rope's tables; cos and sin are float32 [n_positions, n_frequencies]."""

    partner: int  # uint16 [n_kv_heads, head_dim]
    sign: int  # int8, likewise
    frequency: int  # uint16, likewise
    cos: int
    sin: int
    n_frequencies: int
    n_positions: int


@dataclass(frozen=True)
class TransformAddresses:
    """Device addresses of a ksort_transform's tables, None for those that it does without."""

    rotate: bool
    shift: int | None = None  # float32 [n_kv_heads, head_dim]
    scale: int | None = None  # likewise
    sequence: int | None = None  # uint16, likewise
    feedback: int | None = None  # float32 [n_kv_heads, head_dim, head_dim]


@dataclass(frozen=True)
class Tokens:
    """Which tokens a call is about: the new ones, `n_tokens` for each sequence, behind n_cached[s] others."""

    n_tokens: int
    n_cached: int  # device address: int32 [n_sequences]
    device_status: int  # device address: int32


@dataclass(frozen=True)
class Rows:
    """Heads of tokens in device memory, [n_sequences, n_tokens, heads of this array, head_dim]; strides in elements."""

    address: int
    token_stride: int
    sequence_stride: int = 0  # of no consequence for one sequence


class Layer:
    """The calls of one layer: pack new keys and values into its caches, and attend over them.

    `x_type`: cache type name of all rows, f32, f16 or bf16. `max_slots`: the most tokens that a sequence will have.
    """

    def __init__(
        self, k: CacheLayout, k_address: int, v: CacheLayout, v_address: int, *, n_heads: int, scale: float,
        window: int, max_slots: int, x_type: str, rope: RopeAddresses | None = None,
        k_transform: TransformAddresses | None = None, v_transform: TransformAddresses | None = None,
    ):  # fmt: skip
        self._binding = binding = loaded()
        self._n_sequences, self._n_positions = k.n_sequences, max_slots if rope is None else rope.n_positions
        self._caches = self._cache(k, k_address), self._cache(v, v_address)
        self._rope = self._rope_struct(rope)
        self._transforms = self._transform(k_transform), self._transform(v_transform)
        self._tokens = binding.new("ksort_cuda_tokens")
        self._tokens.n_sequences = k.n_sequences
        self._pack, self._attend = binding.new("ksort_cuda_pack_args"), binding.new("ksort_cuda_attend_args")
        for args in (self._pack, self._attend):
            args.tokens, args.rope, args.x_type = self._tokens, self._rope, CACHE_TYPES[x_type].native_id
            args.k, args.v = self._caches
            args.k_transform, args.v_transform = self._transforms
        self._attend.n_heads, self._attend.scale = n_heads, scale
        self._attend.window, self._attend.max_slots = window, max_slots

    def pack(self, tokens: Tokens, k: Rows, v_address: int, stream: int) -> None:
        """Store the tokens' keys `k` and values (at `v_address`, strides as the keys'). Raises as check_status."""
        args = self._pack
        self._aim(tokens)
        args.k_x, args.v_x = self._pointer(k.address), self._pointer(v_address)
        args.token_stride, args.sequence_stride = k.token_stride, k.sequence_stride
        check_status(self._binding.lib.ksort_cuda_pack(args, self._pointer(stream)))

    def attend(
        self, tokens: Tokens, q: Rows, out: Rows, workspace_address: int, workspace_bytes: int, stream: int
    ) -> None:
        """softmax(scale * q k^T) v of the tokens packed last. Raises as check_status."""
        args = self._attend
        self._aim(tokens)
        args.q, args.out = self._pointer(q.address), self._pointer(out.address)
        args.q_token_stride, args.q_sequence_stride = q.token_stride, q.sequence_stride
        args.out_token_stride, args.out_sequence_stride = out.token_stride, out.sequence_stride
        args.workspace, args.workspace_bytes = self._pointer(workspace_address), workspace_bytes
        check_status(self._binding.lib.ksort_cuda_attend(args, self._pointer(stream)))

    def workspace_bytes(self, tokens: Tokens) -> int:
        """Workspace that `attend` needs for these tokens; a prompt needs no more than a longer one."""
        args = self._attend
        self._aim(tokens)
        args.q_token_stride = args.out_token_stride = args.n_heads * args.k.format.head_dim
        args.q_sequence_stride = args.out_sequence_stride = tokens.n_tokens * args.q_token_stride
        size = self._binding.ffi.new("size_t *")
        check_status(self._binding.lib.ksort_cuda_attend_workspace_bytes(args, size))
        return size[0]

    def _aim(self, tokens: Tokens) -> None:
        struct = self._tokens
        struct.n_tokens, struct.n_positions = tokens.n_tokens, self._n_positions
        struct.n_cached = self._binding.ffi.cast("int32_t *", tokens.n_cached)
        struct.device_status = self._binding.ffi.cast("int32_t *", tokens.device_status)

    def _pointer(self, address: int, ctype: str = "void *"):
        return self._binding.ffi.cast(ctype, address)

    def _cache(self, layout: CacheLayout, address: int):
        struct = self._binding.new("ksort_cuda_cache")
        struct.format = native_structs.format_struct(
            self._binding, layout.type_name, layout.head_dim, layout.block_size
        )[0]
        struct.base = self._pointer(address)
        struct.head_stride, struct.tile_stride = layout.head_bytes, layout.n_kv_heads * layout.head_bytes
        struct.page_stride = layout.n_tiles * struct.tile_stride
        struct.sequence_pages, struct.page_tiles = 1, layout.n_tiles
        struct.n_sequences, struct.n_kv_heads = layout.n_sequences, layout.n_kv_heads
        return struct

    def _rope_struct(self, rope: RopeAddresses | None):
        if rope is None:
            return self._binding.ffi.NULL
        struct = self._binding.new("ksort_rope")
        struct.n_frequencies = rope.n_frequencies
        struct.partner, struct.sign = self._pointer(rope.partner, "uint16_t *"), self._pointer(rope.sign, "int8_t *")
        struct.frequency = self._pointer(rope.frequency, "uint16_t *")
        struct.cos, struct.sin = self._pointer(rope.cos, "float *"), self._pointer(rope.sin, "float *")
        return struct

    def _transform(self, transform: TransformAddresses | None):
        if transform is None:
            return self._binding.ffi.NULL
        struct = self._binding.new("ksort_transform")
        struct.rotate = transform.rotate
        for field in ("shift", "scale", "feedback"):
            if (address := getattr(transform, field)) is not None:
                setattr(struct, field, self._pointer(address, "float *"))
        if transform.sequence is not None:
            struct.sequence = self._pointer(transform.sequence, "uint16_t *")
        return struct
