"""GGUF metadata values: their bytes and what they mean."""

import struct

import gguf
import pytest

from ksort_gguf.container.values import decode_at, encode

_Value = gguf.GGUFValueType


@pytest.mark.parametrize(
    ("value", "kind", "element"),
    [
        ("", _Value.STRING, None),
        ([], _Value.ARRAY, _Value.STRING),
        ([], _Value.ARRAY, _Value.INT32),
        (["a", "", "\u00e9"], _Value.ARRAY, _Value.STRING),
        ([-1, 2**31 - 1], _Value.ARRAY, _Value.INT32),
        (2**64 - 1, _Value.UINT64, None),
        (True, _Value.BOOL, None),
    ],
)
def test_values_survive(value, kind, element):
    """Catches dropped empty strings and arrays, and wrong widths."""
    encoded = encode(value, kind, element)
    assert encoded.decode() == value
    assert decode_at(encoded.raw, 0, kind)[1] == len(encoded.raw)


def test_nested_array_is_decoded():
    """Catches a parser that takes the inner arrays' headers for values and loses its place in the file."""
    inner = encode([7, 8], _Value.ARRAY, _Value.UINT8).raw
    raw = struct.pack("<IQ", _Value.ARRAY, 2) + inner + inner
    assert decode_at(raw, 0, _Value.ARRAY) == ([[7, 8], [7, 8]], len(raw))
