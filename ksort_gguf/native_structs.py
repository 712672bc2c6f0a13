"""libksort's structs that are filled from arrays or from each other: checks of shapes and types, and who keeps what.

Knows no cffi: structs and pointers are made by `binding`, native.py's. A struct here keeps the arrays alive that it
points to.
"""

import numpy as np

from ksort_gguf.cache_types import CACHE_TYPES
from ksort_gguf.families.rope import RopeTables
from ksort_gguf.plan.kplan import Transform

ALIGNMENT = 64  # bytes; KSORT_ALIGNMENT

_ROPE_TYPES = {"partner": np.uint16, "sign": np.int8, "frequency": np.uint16}
_TRANSFORM_TYPES = {"shift": np.float32, "scale": np.float32, "sequence": np.uint16, "feedback": np.float32}
_POINTERS = {"float32": "float *", "uint16": "uint16_t *", "int8": "int8_t *"}  # C's name of a pointer, by dtype


def aligned_buffer(n_bytes: int) -> np.ndarray:
    """Zeroed uint8 [n_bytes] whose first byte is aligned as the library asks for."""
    memory = np.zeros(n_bytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + n_bytes]


def float_heads(name: str, x, head_dim: int, n_heads: int | None = None) -> np.ndarray:
    """`x` as contiguous float32 [n_tokens, n_heads, head_dim], of any number of heads for None. Raises ValueError."""
    x = np.ascontiguousarray(x, np.float32)
    if x.ndim != 3 or x.shape[2] != head_dim or n_heads not in (None, x.shape[1]):
        raise ValueError(f"expected {name} [n_tokens, {n_heads or 'n_heads'}, {head_dim}], got {list(x.shape)}")
    return x


def format_struct(binding, type_name: str, head_dim: int, block_size: int):
    """A ksort_format for a cache type's name (cache_types.CACHE_TYPES)."""
    struct = binding.new("ksort_format")
    struct.type, struct.head_dim, struct.block_size = CACHE_TYPES[type_name].native_id, head_dim, block_size
    return struct


class _Tables:
    """A struct that points to arrays; `pointer` is NULL where there is nothing to point to (`source` None)."""

    struct: str  # its name in ksort.h
    word: str  # for messages

    def __init__(self, binding, source):
        self._binding, self._kept = binding, []
        self.pointer = binding.ffi.NULL if source is None else binding.new(self.struct)

    def _point_to(self, field: str, values: np.ndarray, shape: tuple[int, ...]) -> None:
        """Raises ValueError for another shape than `shape`."""
        if values.shape != shape:
            raise ValueError(f"{self.word} table {field} is {list(values.shape)}, expected {list(shape)}")
        setattr(self.pointer, field, self._binding.array(_POINTERS[values.dtype.name], values))
        self._kept.append(values)


class Rope(_Tables):
    """A ksort_rope for RoPE tables, or none. `heads`: (n_kv_heads, head_dim). Raises ValueError for other tables."""

    struct, word = "ksort_rope", "RoPE"

    def __init__(self, binding, tables: RopeTables | None, heads: tuple[int, int]):
        super().__init__(binding, tables)
        if tables is not None:
            for field, dtype in _ROPE_TYPES.items():
                self._point_to(field, np.ascontiguousarray(getattr(tables, field), dtype), heads)

    def with_waves(self, cos, sin, n_tokens: int) -> "Rope":
        """Point to the tokens' cos and sin [n_tokens, n_frequencies]; does nothing without tables."""
        if self.pointer == self._binding.ffi.NULL:
            return self
        cos, sin = np.ascontiguousarray(cos, np.float32), np.ascontiguousarray(sin, np.float32)
        if cos.ndim != 2 or len(cos) != n_tokens or cos.shape != sin.shape:
            raise ValueError(f"cos {list(cos.shape)}, sin {list(sin.shape)}: expected [{n_tokens}, n_frequencies] both")
        self._point_to("cos", cos, cos.shape)
        self._point_to("sin", sin, cos.shape)
        self.pointer.n_frequencies = cos.shape[1]
        return self


class TransformTables(_Tables):
    """A ksort_transform for a plan's tables, or none. `heads`: (n_kv_heads, head_dim).

    Raises ValueError unless feedback is [n_kv_heads, head_dim, head_dim], and the other tables [n_kv_heads, head_dim].
    """

    struct, word = "ksort_transform", "transform"

    def __init__(self, binding, transform: Transform | None, heads: tuple[int, int]):
        super().__init__(binding, transform)
        if transform is None:
            return
        self.pointer.rotate = transform.rotate
        for field, dtype in _TRANSFORM_TYPES.items():
            if (table := getattr(transform, field)) is not None:
                shape = (*heads, heads[1]) if field == "feedback" else heads
                self._point_to(field, np.ascontiguousarray(table, dtype), shape)


class Attend:
    """A ksort_attend_args for two caches (native.Cache), and what it points to; memory and tokens are still open.

    `transforms`: those that keys and values were packed with, or None each.
    """

    def __init__(self, binding, k_cache, v_cache, n_heads, scale, window, query_type, rope, transforms):
        self._caches = caches = k_cache, v_cache
        self.rope = Rope(binding, rope, k_cache.heads)
        self.k_transform, self.v_transform = (
            TransformTables(binding, transform, cache.heads)
            for transform, cache in zip(transforms, caches, strict=True)
        )
        self.pointer = args = binding.new("ksort_attend_args")
        args.k, args.v, args.rope = k_cache.struct, v_cache.struct, self.rope.pointer
        args.k_transform, args.v_transform = self.k_transform.pointer, self.v_transform.pointer
        args.n_heads, args.window, args.scale = n_heads, window, scale
        args.query_type = CACHE_TYPES[query_type].native_id
