"""GGUF metadata values: their bytes and what they mean.

A value keeps the bytes it had, so that a converted file repeats them exactly: integer widths, empty strings and
arrays, nested arrays. gguf.GGUFReader is not used: it makes array views for each of the hundred thousands of tokens and
merges (Qwen2.5: 8.5 s and 490 MB for the header, against 0.4 s and 40 MB here).
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from mmap import mmap
from typing import Any

from gguf import GGUFValueType

_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

Buffer = bytes | mmap  # what values are read from: slices of both are bytes


class Truncated(ValueError):
    """The buffer ends inside a value."""


@dataclass(frozen=True)
class Value:
    """One metadata value. `raw` is little-endian, as it stands in a file after the type word."""

    type: GGUFValueType
    raw: bytes

    def decode(self) -> object:
        """The value as int, float, bool, str or (nested) list. Bytes that are not UTF-8 become U+FFFD."""
        return decode_at(self.raw, 0, self.type)[0]


def string_at(buffer: Buffer, offset: int) -> tuple[str, int]:
    """The string at `offset` and the offset after it. Raises Truncated."""
    start = offset + 8
    if start > len(buffer):
        raise Truncated
    stop = start + _U64.unpack_from(buffer, offset)[0]
    if stop > len(buffer):
        raise Truncated
    return buffer[start:stop].decode("utf-8", errors="replace"), stop


def decode_at(buffer: Buffer, offset: int, value_type: GGUFValueType) -> tuple[object, int]:
    """The value of `value_type` at `offset` of `buffer`, and the offset after it.

    Raises Truncated, and ValueError for an unknown element type of an array.
    """
    if value_type == GGUFValueType.STRING:
        return string_at(buffer, offset)
    if value_type == GGUFValueType.ARRAY:
        return _array_at(buffer, offset)
    scalar = struct.Struct("<" + _SCALARS[value_type])
    if offset + scalar.size > len(buffer):
        raise Truncated
    return scalar.unpack_from(buffer, offset)[0], offset + scalar.size


def _array_at(buffer: Buffer, offset: int) -> tuple[list, int]:
    if offset + 12 > len(buffer):
        raise Truncated
    element_type = GGUFValueType(_U32.unpack_from(buffer, offset)[0])
    count = _U64.unpack_from(buffer, offset + 4)[0]
    offset += 12
    if element_type in _SCALARS:
        stop = offset + count * struct.calcsize("<" + _SCALARS[element_type])
        if stop > len(buffer):
            raise Truncated
        return list(struct.unpack_from(f"<{count}{_SCALARS[element_type]}", buffer, offset)), stop
    elements = []
    for _ in range(count):
        element, offset = decode_at(buffer, offset, element_type)
        elements.append(element)
    return elements, offset


def encode_string(text: str) -> bytes:
    """Length as uint64, then UTF-8 bytes."""
    data = text.encode("utf-8")
    return _U64.pack(len(data)) + data


def encode(value: Any, value_type: GGUFValueType, element_type: GGUFValueType | None = None) -> Value:
    """The Value for a Python value; `element_type` is needed for arrays only (of scalars or strings)."""
    if value_type == GGUFValueType.STRING:
        return Value(value_type, encode_string(value))
    if value_type == GGUFValueType.ARRAY:
        if element_type is None:
            raise ValueError("an array needs the type of its elements")
        return Value(value_type, _encode_array(value, element_type))
    return Value(value_type, struct.pack("<" + _SCALARS[value_type], value))


def _encode_array(elements: Sequence[Any], element_type: GGUFValueType) -> bytes:
    head = _U32.pack(element_type) + _U64.pack(len(elements))
    if element_type == GGUFValueType.STRING:
        return head + b"".join(map(encode_string, elements))
    return head + struct.pack(f"<{len(elements)}{_SCALARS[element_type]}", *elements)


def uint32(value: int) -> Value:
    """An integer as GGUF writes counts and ids."""
    return encode(value, GGUFValueType.UINT32)


def string(value: str) -> Value:
    """A string value."""
    return encode(value, GGUFValueType.STRING)


def strings(values: Sequence[str]) -> Value:
    """An array of strings, possibly empty."""
    return encode(values, GGUFValueType.ARRAY, GGUFValueType.STRING)
