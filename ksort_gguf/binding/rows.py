"""The one typed view of rows of floats that crosses into the libraries."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    Array = np.ndarray | torch.Tensor

_NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def address_of(array: "Array") -> int:
    """Where the first element of a NumPy array or a torch tensor is, in host or device memory."""
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data_ptr()


def type_name(array: "Array") -> str:
    """A float array's type as names.CACHE_TYPES calls it. Raises KeyError for others."""
    return _NAMES[str(array.dtype).removeprefix("torch.")]


class FloatRows:
    """Rows [n_rows, width] of floats, each contiguous, at a distance of `stride` elements; keeps its memory alive.

    In host memory (NumPy, torch) they are float32; a GPU takes f16 and bf16 too (`type_name`).
    """

    __slots__ = ("_first", "_is_part", "_whole", "address", "itemsize", "n_rows", "stride", "width")

    def __init__(self, array: "Array"):
        """array: 2-D, of f32, f16 or bf16, its last axis contiguous. Raises ValueError for others."""
        shape = array.shape
        if len(shape) != 2:
            raise ValueError(f"rows are 2-D, got {list(shape)}")
        self.n_rows: int = shape[0]
        self.width: int = shape[1]
        self.itemsize = array.itemsize
        if self.itemsize > 4:
            raise ValueError(f"rows are of 32 or 16 bits, got {array.dtype}")
        if isinstance(array, np.ndarray):
            stride, step = (n_bytes // self.itemsize for n_bytes in array.strides)
        else:
            stride, step = array.stride()
        if step != 1 and self.width > 1:
            raise ValueError("the values of a row must be contiguous")
        self._whole, self._first, self._is_part = array, 0, False
        self.address = address_of(array)
        self.stride = stride if self.n_rows > 1 else max(stride, self.width)

    def columns(self, start: int, stop: int) -> "FloatRows":
        """The part of every row from value `start` to before `stop`; cheap enough for a step of a GPU."""
        part = FloatRows.__new__(FloatRows)
        part._whole, part._first, part.n_rows, part.stride = self._whole, self._first + start, self.n_rows, self.stride
        part._is_part = True
        part.width, part.itemsize, part.address = stop - start, self.itemsize, self.address + start * self.itemsize
        return part

    def first(self, n: int) -> "FloatRows":
        """The first `n` rows."""
        return self.rows(0, n)

    def rows(self, start: int, stop: int) -> "FloatRows":
        """Rows start .. stop - 1."""
        return FloatRows(self.array[start:stop])

    @property
    def array(self) -> "Array":
        """The same memory as an array of its kind, [n_rows, width]."""
        return self._whole[:, self._first : self._first + self.width] if self._is_part else self._whole

    @property
    def type_name(self) -> str:
        """The values' type as names.CACHE_TYPES calls it."""
        return type_name(self._whole)

    def tensor(self) -> "torch.Tensor":
        """The same memory as a torch tensor [n_rows, width]."""
        array = self.array
        if not isinstance(array, np.ndarray):
            return array
        import torch

        return torch.from_numpy(array)

    def numpy(self) -> np.ndarray:
        """The same memory as float32 [n_rows, width]; rows in host memory only."""
        array = self.array
        return array if isinstance(array, np.ndarray) else array.numpy()
