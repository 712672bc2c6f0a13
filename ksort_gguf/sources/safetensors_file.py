"""Safetensors checkpoints, one shard or many, as lazy tensors.

Data comes by plain reads, as for GGUF, so that no more than the tensor at hand is resident.
"""

import json
import struct
from pathlib import Path

from gguf import GGMLQuantizationType

from ksort_gguf.errors import KsortError
from ksort_gguf.sources.base import Tensor
from ksort_gguf.sources.gguf_container import FileTensor

_TYPES = {
    "F64": GGMLQuantizationType.F64,
    "F32": GGMLQuantizationType.F32,
    "F16": GGMLQuantizationType.F16,
    "BF16": GGMLQuantizationType.BF16,
}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class Checkpoint:
    """The tensors of a Hugging Face directory by their own names, shard after shard."""

    def __init__(self, directory: Path):
        """Raises KsortError for missing, cut-off or damaged shards."""
        self.tensors: dict[str, Tensor] = {}
        self._files = []
        try:
            for shard, wanted in _shards(directory).items():
                self._add_shard(directory / shard, wanted)
        except BaseException:
            self.close()
            raise

    def _add_shard(self, path: Path, wanted: list[str] | None) -> None:
        """Add the tensors `wanted` (None: all) of one shard."""
        try:
            handle = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise KsortError(f"{path}: cannot be read ({error.strerror}): get the file again") from None
        self._files.append(handle)
        file_bytes = path.stat().st_size
        header, data_start = _read_header(path, handle, file_bytes)
        names = header.keys() if wanted is None else wanted
        for name in names:
            if name not in header:
                raise KsortError(f"{path}: tensor {name}, which {_INDEX} promises, is missing: get the file again")
            self.tensors[name] = _tensor(path, handle, name, header[name], data_start, file_bytes)

    def close(self) -> None:
        """Close the shards."""
        for file in self._files:
            file.close()


def _shards(directory: Path) -> dict[str, list[str] | None]:
    """Shard file names in order, each with the tensor names that the index puts there (None: without an index)."""
    index = directory / _INDEX
    if not index.is_file():
        if not (directory / _SINGLE).is_file():
            raise KsortError(f"{directory}: has neither {_SINGLE} nor {_INDEX}: save the model as safetensors")
        return {_SINGLE: None}
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards: dict[str, list[str] | None] = {str(shard): [] for shard in sorted(set(weight_map.values()))}
        for name, shard in weight_map.items():
            shards[str(shard)].append(name)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise KsortError(f"{index}: is not a safetensors index: get it again") from None
    return shards


def _read_header(path: Path, handle, file_bytes: int) -> tuple[dict[str, dict], int]:
    """The entry of each tensor, and where the data starts: 8 bytes of length, JSON, data."""
    try:
        length = struct.unpack("<Q", handle.read(8))[0]
        if 8 + length > file_bytes:
            raise KsortError(f"{path}: ends inside its header: the file was cut off, get it again")
        header = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        return header, 8 + length
    except (struct.error, ValueError, AttributeError):
        raise KsortError(f"{path}: is not a safetensors file: get it again") from None


def _tensor(path: Path, handle, name: str, entry: dict, data_start: int, file_bytes: int) -> Tensor:
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise KsortError(f"{path}: the entry of tensor {name} is damaged: get the file again") from None
    if data_start + stop > file_bytes:
        raise KsortError(
            f"{path}: tensor {name} ends at byte {data_start + stop} but the file has {file_bytes}: "
            "the file was cut off, get it again"
        )
    if dtype not in _TYPES:
        raise KsortError(f"{path}: tensor {name} has type {dtype}: only {', '.join(_TYPES)} are supported")
    tensor = FileTensor(path, handle, data_start + start, name, shape, _TYPES[dtype])
    if tensor.n_bytes != stop - start:
        raise KsortError(f"{path}: the entry of tensor {name} is damaged: get the file again")
    return tensor
