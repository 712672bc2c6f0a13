"""Tensors that are made from others as they are read: other types, other row orders."""

import gguf
import numpy as np

from ksort_gguf.container.tensors import Tensor, is_finite
from ksort_gguf.errors import KsortError

_Type = gguf.GGMLQuantizationType

OUTTYPES = {  # weight type, general.file_type
    "f32": (_Type.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (_Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (_Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (_Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}


def stored_type(name: str, shape: tuple[int, ...], outtype: str) -> gguf.GGMLQuantizationType:
    """The type that llama.cpp's converter gives a tensor: vectors and norms F32, rows that Q8_0 can't hold F16."""
    if len(shape) < 2 or name.endswith("_norm.weight"):
        return _Type.F32
    wanted = OUTTYPES[outtype][0]
    return _Type.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] else wanted


class RetypedTensor(Tensor):
    """A dense tensor in another type. NaN and infinity, also by overflow of F16, are errors."""

    def __init__(self, base: Tensor, tensor_type: gguf.GGMLQuantizationType):
        super().__init__(base.file, base.name, base.shape, tensor_type)
        self._base = base

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        values = self._base.read_finite_f32(self._base.read_rows(start, stop))
        with np.errstate(over="ignore"):  # found below
            raw = np.ascontiguousarray(gguf.quants.quantize(values, self.type)).reshape(-1).view(np.uint8)
        if self.type == _Type.F16 and not is_finite(raw, self.type):
            raise KsortError(f"{self.file}: tensor {self.name} holds values too large for f16: use `outtype` bf16")
        return raw

    def non_finite(self) -> KsortError:
        return self._base.non_finite()


class ReorderedTensor(Tensor):
    """A tensor whose rows are permuted the same way inside every head."""

    def __init__(self, base: Tensor, head_map: np.ndarray):
        """`head_map` int [head_dim]: place i of each head holds the base's row head_map[i] of that head."""
        super().__init__(base.file, base.name, base.shape, base.type)
        self._base = base
        self._head_map = head_map

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        head_dim = len(self._head_map)
        first_head, end_head = start // head_dim, -(-stop // head_dim)
        heads = self._base.read_rows(first_head * head_dim, end_head * head_dim).reshape(-1, head_dim, self.row_bytes)
        rows = heads[:, self._head_map].reshape(-1, self.row_bytes)
        return rows[start - first_head * head_dim : stop - first_head * head_dim].reshape(-1)

    def non_finite(self) -> KsortError:
        return self._base.non_finite()


class ArrayTensor(Tensor):
    """A small tensor that is made rather than read."""

    def __init__(self, file: str, name: str, values: np.ndarray):
        """`values` float32."""
        super().__init__(file, name, values.shape, _Type.F32)
        self._values = values

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        return self._values[start:stop].reshape(-1).view(np.uint8)
