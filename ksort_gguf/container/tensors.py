"""Tensors that are not in memory: names, shapes, types, and bytes that are read when they are asked for."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import gguf
import numpy as np

from ksort_gguf.errors import KsortError

_READ_BYTES = 1 << 30  # one read call of the system returns at most about 2 GiB
CHUNK_BYTES = 32 << 20  # a tensor that need not be whole is read in pieces of about this size
DENSE_TYPES = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16)


def encoded_bytes(shape: tuple[int, ...], tensor_type: gguf.GGMLQuantizationType) -> int:
    """Bytes of a tensor of numpy-order `shape`. Raises ValueError if it is empty or its rows end inside a block."""
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[tensor_type]
    if not shape or 0 in shape:
        raise ValueError(f"shape {shape} holds nothing")
    if shape[-1] % block_values:
        raise ValueError(f"rows of {shape[-1]} values do not fill blocks of {block_values}")
    return math.prod(shape) // block_values * block_bytes


def decode_f32(raw: np.ndarray, shape: tuple[int, ...], tensor_type: gguf.GGMLQuantizationType) -> np.ndarray:
    """Encoded bytes (uint8) as float32 of `shape`, whose first length may be -1.

    Raises NotImplementedError for types that gguf cannot dequantize.
    """
    kind = gguf.GGMLQuantizationType
    if tensor_type == kind.F64:
        return raw.view(np.float64).astype(np.float32).reshape(shape)
    if tensor_type in (kind.F32, kind.F16):
        return raw.view(np.float32 if tensor_type == kind.F32 else np.float16).astype(np.float32).reshape(shape)
    row_bytes = encoded_bytes(shape[-1:], tensor_type) if len(shape) > 1 else raw.nbytes
    return gguf.quants.dequantize(raw.reshape(-1, row_bytes), tensor_type).astype(np.float32, copy=False).reshape(shape)


def is_finite(raw: np.ndarray, tensor_type: gguf.GGMLQuantizationType) -> bool:
    """Whether encoded bytes (uint8) of one of DENSE_TYPES hold neither NaN nor infinity."""
    if tensor_type == gguf.GGMLQuantizationType.F32:
        return bool(np.isfinite(raw.view(np.float32)).all())
    # All exponent bits set: NaN or infinity. NumPy's own test of float16 takes five times as long.
    exponent = 0x7F80 if tensor_type == gguf.GGMLQuantizationType.BF16 else 0x7C00
    return bool(((raw.view(np.uint16) & exponent) != exponent).all())


class Tensor(ABC):
    """One tensor, not in memory. Nothing is read before a read method is called, and nothing is kept after."""

    def __init__(self, file: str, name: str, shape: tuple[int, ...], tensor_type: gguf.GGMLQuantizationType):
        """`file` is for messages; `shape` is in numpy order (rows first). Raises KsortError for an impossible shape."""
        self.file = file
        self.name = name
        self.shape = shape
        self.type = tensor_type
        try:
            self.n_bytes = encoded_bytes(shape, tensor_type)
        except ValueError as error:
            raise KsortError(f"{file}: tensor {name} ({tensor_type.name}): {error}: the file is damaged") from None

    @abstractmethod
    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Encoded bytes of the first axis' rows start .. stop-1 as uint8 [rows * row_bytes]. Raises KsortError."""

    @property
    def row_bytes(self) -> int:
        """Encoded bytes of one index of the first axis. Meaningless for 1-D tensors of quantized types."""
        return self.n_bytes // self.shape[0]

    def read(self) -> np.ndarray:
        """All encoded bytes as uint8 [n_bytes]. Raises KsortError."""
        return self.read_rows(0, self.shape[0])

    def read_f32(self) -> np.ndarray:
        """Dequantized values as float32 of `shape`. Raises KsortError."""
        return self.decode(self.read())

    def read_finite_f32(self, raw: np.ndarray | None = None) -> np.ndarray:
        """As read_f32, of `raw` where it has been read already. Raises KsortError for NaN or infinity too."""
        values = self.decode(self.read() if raw is None else raw)
        if not np.isfinite(values).all():
            raise self.non_finite()
        return values

    def non_finite(self) -> KsortError:
        """The error for NaN or infinity in this tensor."""
        return KsortError(f"{self.file}: tensor {self.name} holds NaN or infinity: get undamaged weights")

    def decode(self, raw: np.ndarray) -> np.ndarray:
        """`raw`, some whole rows as read_rows() gave them, dequantized to float32 [rows, ...]. Raises KsortError."""
        shape = (-1, *self.shape[1:])
        try:
            return decode_f32(raw, shape, self.type)
        except NotImplementedError:
            raise KsortError(
                f"{self.file}: tensor {self.name} has type {self.type.name}, which the gguf package cannot dequantize: "
                "use another quantization of this model"
            ) from None

    def chunks(self) -> Iterator[np.ndarray]:
        """All encoded bytes in order, in pieces of about CHUNK_BYTES, so that a large tensor need not be in memory."""
        if len(self.shape) < 2 or self.n_bytes <= CHUNK_BYTES:
            yield self.read()
            return
        rows = max(1, CHUNK_BYTES // self.row_bytes)
        for start in range(0, self.shape[0], rows):
            yield self.read_rows(start, min(start + rows, self.shape[0]))


class FileTensor(Tensor):
    """A tensor at a byte offset of an open file, whose position moves: not for several threads at once."""

    def __init__(
        self,
        path: Path,
        handle: FileIO,
        offset: int,
        name: str,
        shape: tuple[int, ...],
        tensor_type: gguf.GGMLQuantizationType,
    ):
        super().__init__(str(path), name, shape, tensor_type)
        self._handle = handle
        self._offset = offset

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        n_bytes = self.n_bytes * (stop - start) // self.shape[0]
        data = np.empty(n_bytes, np.uint8)
        self._handle.seek(self._offset + self.n_bytes * start // self.shape[0])
        n_read = 0
        while n_read < n_bytes:
            n = self._handle.readinto(data.data[n_read : n_read + _READ_BYTES])
            if not n:
                raise KsortError(f"{self.file}: ends inside tensor {self.name}: the file was cut off, get it again")
            n_read += n
        return data
