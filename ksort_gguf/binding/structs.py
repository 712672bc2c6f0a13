"""libksort's structs that are filled from arrays or from each other: checks of shapes and types, and who keeps what.

A struct here keeps the arrays alive that it points to. Arrays are NumPy's, or torch tensors for device memory.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from ksort_gguf.binding.ffi import Binding
from ksort_gguf.kvplan import RopeTables, Transform
from ksort_gguf.names import CACHE_TYPES, TRANSFORM_TABLES

ROPE_DTYPES = {"partner": "uint16", "sign": "int8", "frequency": "uint16"}
POINTERS = {"float32": "float *", "uint16": "uint16_t *", "int8": "int8_t *"}  # C's name of a pointer, by dtype


def float_heads(name: str, x: Any, head_dim: int, n_heads: int | None = None) -> np.ndarray:
    """`x` as contiguous float32 [n_tokens, n_heads, head_dim], of any number of heads for None. Raises ValueError."""
    x = np.ascontiguousarray(x, np.float32)
    if x.ndim != 3 or x.shape[2] != head_dim or n_heads not in (None, x.shape[1]):
        raise ValueError(f"expected {name} [n_tokens, {n_heads or 'n_heads'}, {head_dim}], got {list(x.shape)}")
    return x


def format_struct(binding: Binding, type_name: str, head_dim: int, block_size: int) -> Any:
    """A ksort_format for a cache type's name (names.CACHE_TYPES)."""
    struct = binding.new("ksort_format")
    struct.type, struct.head_dim, struct.block_size = CACHE_TYPES[type_name].native_id, head_dim, block_size
    return struct


class _Tables:
    """A struct that points to arrays; `pointer` is NULL where there is nothing to point to (`source` None)."""

    struct: str  # its name in ksort.h
    word: str  # for messages

    def __init__(self, binding: Binding, source: object):
        self._binding = binding
        self._kept: list[Any] = []
        self.pointer = binding.null if source is None else binding.new(self.struct)

    def _point_to(self, field: str, values: Any, dtype: str, shape: Iterable[int]) -> None:
        """Raises ValueError for another shape than `shape`."""
        if tuple(values.shape) != tuple(shape):
            raise ValueError(f"{self.word} table {field} is {list(values.shape)}, expected {list(shape)}")
        setattr(self.pointer, field, self._binding.array(POINTERS[dtype], values))
        self._kept.append(values)


class Rope(_Tables):
    """A ksort_rope for RoPE tables, or none. `heads`: (n_kv_heads, head_dim). Raises ValueError for other tables."""

    struct, word = "ksort_rope", "RoPE"

    def __init__(self, binding: Binding, tables: RopeTables | None, heads: tuple[int, int]):
        super().__init__(binding, tables)
        if tables is not None:
            for field, dtype in ROPE_DTYPES.items():
                self._point_to(field, np.ascontiguousarray(getattr(tables, field), dtype), dtype, heads)

    def with_positions(self, cos: np.ndarray | None, sin: np.ndarray | None, n_tokens: int) -> "Rope":
        """Point to the rope table's rows of the tokens, cos and sin [n_tokens, n_frequencies]; if it has tables."""
        if self.pointer == self._binding.null:
            return self
        cos, sin = np.ascontiguousarray(cos, np.float32), np.ascontiguousarray(sin, np.float32)
        if cos.ndim != 2 or len(cos) != n_tokens or cos.shape != sin.shape:
            raise ValueError(f"cos {list(cos.shape)}, sin {list(sin.shape)}: expected [{n_tokens}, n_frequencies] both")
        self._point_to("cos", cos, "float32", cos.shape)
        self._point_to("sin", sin, "float32", cos.shape)
        self.pointer.n_frequencies = cos.shape[1]
        return self


class TransformTables(_Tables):
    """A ksort_transform for a plan's tables, or none. `heads`: (n_kv_heads, head_dim).

    Raises ValueError for tables of other shapes than names.TRANSFORM_TABLES says.
    """

    struct, word = "ksort_transform", "transform"

    def __init__(self, binding: Binding, transform: Transform | None, heads: tuple[int, int]):
        super().__init__(binding, transform)
        if transform is None:
            return
        self.pointer.rotate = transform.rotate
        found = transform.tables()
        for table in TRANSFORM_TABLES:
            if table.name in found:
                values = np.ascontiguousarray(found[table.name], table.native_dtype)
                self._point_to(table.name, values, table.native_dtype, table.shape(*heads))
