"""Reading any GGUF file: metadata values and lazy tensors, nothing about models.

The header is parsed over a mapping that is closed at once; tensor data comes by plain reads, since the pages of a
mapped model would count as resident memory.
"""

import mmap
import struct
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGUF_VERSION, GGMLQuantizationType, GGUFValueType

from ksort_gguf.container.tensors import FileTensor, Tensor
from ksort_gguf.container.values import Truncated, Value, decode_at, string_at
from ksort_gguf.errors import KsortError
from ksort_gguf.names import FORMAT_VERSION, Keys

MAGIC = b"GGUF"
ALIGNMENT_KEY = "general.alignment"


@dataclass(frozen=True)
class Container:
    """An open GGUF file. `tensors` read through `file` until it is closed."""

    values: dict[str, Value]
    tensors: dict[str, Tensor]
    alignment: int
    file: FileIO


def open_container(path: Path) -> Container:
    """Open a GGUF file (versions 2 and 3, little-endian) and parse its header.

    Raises KsortError, naming the file and where it applies the tensor, for: no such file, not a GGUF, other versions,
    a cut-off file, an unknown tensor type, a newer ksort.format_version.
    """
    if path.is_dir():
        raise KsortError(f"{path}: is a directory: give a GGUF file (ksort-gguf convert makes one of a checkpoint)")
    try:
        handle = open(path, "rb", buffering=0)  # noqa: SIM115 (the container keeps it)
    except OSError as error:
        raise KsortError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return _parse(path, handle)
    except Truncated:
        handle.close()
        raise KsortError(f"{path}: ends inside its header: the file was cut off, get it again") from None
    except BaseException:
        handle.close()
        raise


def _parse(path: Path, handle: FileIO) -> Container:
    if handle.read(4) != MAGIC:
        raise KsortError(f"{path}: is not a GGUF file")
    with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
        n_tensors, n_values = _check_version(path, buffer)
        values, offset = _parse_values(path, buffer, n_values)
        check_format_version(path, values)
        infos, offset = _parse_tensor_infos(buffer, offset, n_tensors)
        alignment = _alignment(path, values)
        file_bytes = len(buffer)
    data_start = -(-offset // alignment) * alignment
    tensors: dict[str, Tensor] = {}
    for name, shape, type_id, tensor_offset in infos:
        if name in tensors:
            raise KsortError(f"{path}: tensor {name} appears twice: the file is damaged")
        tensor = FileTensor(path, handle, data_start + tensor_offset, name, shape, _tensor_type(path, name, type_id))
        if data_start + tensor_offset + tensor.n_bytes > file_bytes:
            raise KsortError(
                f"{path}: tensor {name} ends at byte {data_start + tensor_offset + tensor.n_bytes} but the file has "
                f"{file_bytes}: the file was cut off, get it again"
            )
        tensors[name] = tensor
    return Container(values, tensors, alignment, handle)


def _check_version(path: Path, buffer: mmap.mmap) -> tuple[int, int]:
    """Tensor and value counts of the header."""
    if len(buffer) < 24:
        raise Truncated
    version, n_tensors, n_values = struct.unpack_from("<IQQ", buffer, 4)
    if version & 0xFFFF == 0:
        raise KsortError(f"{path}: is a big-endian GGUF file: convert it with gguf-convert-endian")
    if version > GGUF_VERSION:
        raise KsortError(f"{path}: GGUF version {version} is newer than {GGUF_VERSION}, which this program knows")
    if version < 2:
        raise KsortError(f"{path}: GGUF version {version} is no longer in use: get a file of version 2 or 3")
    return n_tensors, n_values


def _parse_values(path: Path, buffer: mmap.mmap, count: int) -> tuple[dict[str, Value], int]:
    values: dict[str, Value] = {}
    offset = 24
    for _ in range(count):
        key, start = string_at(buffer, offset)
        if start + 4 > len(buffer):
            raise Truncated
        type_id = struct.unpack_from("<I", buffer, start)[0]
        try:
            value_type = GGUFValueType(type_id)
            offset = decode_at(buffer, start + 4, value_type)[1]
        except Truncated:
            raise
        except ValueError as error:
            raise KsortError(f"{path}: key {key!r} has an unknown value type ({error}): the file is damaged") from None
        if key in values:
            raise KsortError(f"{path}: key {key!r} appears twice: the file is damaged")
        values[key] = Value(value_type, buffer[start + 4 : offset])
    return values, offset


def check_format_version(path: Path, values: dict[str, Value]) -> None:
    """Raise KsortError if the file was made for a newer major version of our keys."""
    if Keys.FORMAT_VERSION in values:
        version = values[Keys.FORMAT_VERSION].decode()
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise KsortError(
                f"{path}: key {Keys.FORMAT_VERSION} is {version!r}, expected an integer: make the file again"
            )
        if version > FORMAT_VERSION:
            raise KsortError(
                f"{path}: {Keys.FORMAT_VERSION} is {version}, newer than {FORMAT_VERSION}, which this program knows: "
                "update ksort-gguf"
            )


def _parse_tensor_infos(
    buffer: mmap.mmap, offset: int, count: int
) -> tuple[list[tuple[str, tuple[int, ...], int, int]], int]:
    """(name, shape in numpy order, type id, offset in the data section) of each tensor, and the offset after them."""
    infos = []
    for _ in range(count):
        name, offset = string_at(buffer, offset)
        if offset + 4 > len(buffer):
            raise Truncated
        n_dims = struct.unpack_from("<I", buffer, offset)[0]
        end = offset + 4 + 8 * n_dims + 12
        if end > len(buffer):
            raise Truncated
        *dims, type_id, tensor_offset = struct.unpack_from(f"<{n_dims}QIQ", buffer, offset + 4)
        infos.append((name, tuple(reversed(dims)), type_id, tensor_offset))
        offset = end
    return infos, offset


def _alignment(path: Path, values: dict[str, Value]) -> int:
    if ALIGNMENT_KEY not in values:
        return GGUF_DEFAULT_ALIGNMENT
    alignment = values[ALIGNMENT_KEY].decode()
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise KsortError(f"{path}: {ALIGNMENT_KEY} is {alignment!r}, not a power of two: the file is damaged")
    return alignment


def _tensor_type(path: Path, name: str, type_id: int) -> GGMLQuantizationType:
    try:
        tensor_type = GGMLQuantizationType(type_id)
    except ValueError:
        tensor_type = None
    if tensor_type not in GGML_QUANT_SIZES:
        raise KsortError(f"{path}: tensor {name} has type {type_id}, which the gguf package does not know: update gguf")
    return tensor_type
