"""Safetensors checkpoints, one shard or many, as lazy tensors.

Headers are checked by the safetensors package: types, shapes, and ranges that cover the data once. Data comes by plain
reads, as for GGUF, so that no more than the tensor at hand is resident.
"""

import json
from collections.abc import Collection
from io import FileIO
from pathlib import Path

from gguf import GGMLQuantizationType
from safetensors import SafetensorError, safe_open

from ksort_gguf.checkpoint.config import read_json
from ksort_gguf.container.tensors import FileTensor, Tensor
from ksort_gguf.errors import KsortError

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
        self._files: list[FileIO] = []
        try:
            for shard, wanted in _shards(directory).items():
                self._add_shard(directory / shard, wanted)
        except BaseException:
            self.close()
            raise

    def _add_shard(self, path: Path, wanted: Collection[str] | None) -> None:
        """Add the tensors `wanted` (None: all) of one shard."""
        try:
            handle = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by close)
        except (OSError, ValueError) as error:  # ValueError: no name that a file can have
            reason = error.strerror if isinstance(error, OSError) else error
            raise KsortError(f"{path}: cannot be read ({reason}): get the file again") from None
        self._files.append(handle)
        header, data_start = _read_header(path, handle)
        for name in header if wanted is None else wanted:
            if name not in header:
                raise KsortError(f"{path}: tensor {name}, which {_INDEX} promises, is missing: get the file again")
            self.tensors[name] = _tensor(path, handle, name, header[name], data_start)

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
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise KsortError(f"{index}: is not a safetensors index: get it again")
    return {
        shard: [name for name, place in weight_map.items() if place == shard]
        for shard in sorted(set(weight_map.values()))
    }


def _read_header(path: Path, handle: FileIO) -> tuple[dict[str, dict], int]:
    """The entry of each tensor, and where the data starts: 8 bytes of length, JSON, data."""
    try:
        with safe_open(path, framework="numpy"):
            length = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).removeprefix("Error while deserializing header: ").split())
        raise KsortError(f"{path}: is not a whole safetensors file ({reason}): get it again") from None
    header.pop("__metadata__", None)
    return header, 8 + length


def _tensor(path: Path, handle: FileIO, name: str, entry: dict, data_start: int) -> Tensor:
    dtype, shape, start = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][0]
    if dtype not in _TYPES:
        raise KsortError(f"{path}: tensor {name} has type {dtype}: only {', '.join(_TYPES)} are supported")
    return FileTensor(path, handle, data_start + start, name, shape, _TYPES[dtype])
