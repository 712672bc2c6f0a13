"""What every source of a model offers: the metadata of a stock or folded GGUF, and tensors read one at a time."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import gguf
import numpy as np

from ksort_gguf.errors import KsortError
from ksort_gguf.families import Family, Geometry
from ksort_gguf.plan.kplan import KPlan
from ksort_gguf.sources.gguf_values import Value

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


class Source:
    """A model: `values` (metadata with exact GGUF types), `tensors` by name in file order, its `family`, the
    `alignment` of its data section, and the `plan` of a folded file (None for a stock one)."""

    def __init__(self, path: Path, family: Family, values: dict[str, Value], tensors: dict[str, Tensor]):
        self.path = path
        self.family = family
        self.values = values
        self.tensors = tensors
        self.plan: KPlan | None = None
        self.alignment = gguf.GGUF_DEFAULT_ALIGNMENT

    @cached_property
    def metadata(self) -> dict[str, object]:
        """Plain Python values of all keys: int, float, bool, str, list."""
        return {key: value.decode() for key, value in self.values.items()}

    def set_value(self, key: str, value: Value) -> None:
        """Replace or add a metadata value."""
        self.values[key] = value
        self.__dict__.pop("metadata", None)

    @cached_property
    def geometry(self) -> Geometry:
        """The model's sizes. Raises KsortError naming the file and key."""
        return self.family.geometry(self.metadata, str(self.path))

    def tensor(self, name: str) -> Tensor:
        """A tensor that must be there. Raises KsortError naming the file and the tensor."""
        if name not in self.tensors:
            raise KsortError(f"{self.path}: tensor {name} is missing: the model is incomplete, get it again")
        return self.tensors[name]

    def files(self) -> list[Path]:
        """The model's own path and the files that its tensors are in."""
        return sorted({self.path, *(Path(tensor.file) for tensor in self.tensors.values())})

    def check_complete(self) -> None:
        """Raise KsortError naming the first tensor that the family needs and this model lacks, or a misshapen one."""
        for name in self.family.required_tensors(self.geometry.n_layers):
            self.tensor(name)
        n_vocab = self.tensors["token_embd.weight"].shape[0]
        n_ff_key = f"{self.metadata['general.architecture']}.feed_forward_length"
        n_ff = self.metadata.get(n_ff_key, self.tensors["blk.0.ffn_gate.weight"].shape[0])
        for name, shape in self.family.shapes(self.geometry, n_vocab, n_ff).items():
            if name in self.tensors and self.tensors[name].shape != shape:
                found = list(self.tensors[name].shape)
                raise KsortError(
                    f"{self.path}: tensor {name} has shape {found}, where the metadata promise {list(shape)}: "
                    "the model is damaged, get it again"
                )

    def close(self) -> None:
        """Release files. Reading tensors afterwards is an error."""

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()
