"""Metadata values of the type that a key must have: files come from many converters."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ksort_gguf.errors import KsortError

_ARRAYS = (list, tuple, np.ndarray)
_INTEGERS = (int, np.integer)
_NUMBERS = (int, float, np.number)

# what a message calls a type: whether a value is of it. The elements of a GGUF array all have one type.
_IS_A = {
    "a string": lambda value: isinstance(value, str),
    "an integer": lambda value: isinstance(value, _INTEGERS) and not isinstance(value, bool),
    "true or false": lambda value: isinstance(value, bool),
    "an array of strings": lambda value: isinstance(value, _ARRAYS) and all(isinstance(v, str) for v in value[:1]),
    "an array of numbers": lambda value: isinstance(value, _ARRAYS) and all(isinstance(v, _NUMBERS) for v in value[:1]),
}


def typed(metadata: Mapping[str, object], key: str, kind: str, file: str, default: Any = None) -> Any:
    """The value of `key`, or `default` where the file lacks it.

    Raises KsortError naming `file` and the key if the value is not `kind`, one of "a string", "an integer",
    "true or false", "an array of strings", "an array of numbers".
    """
    if key not in metadata:
        return default
    value = metadata[key]
    if not _IS_A[kind](value):
        found = type(value).__name__ if isinstance(value, _ARRAYS) else repr(value)
        raise KsortError(f"{file}: key {key} is {found}, expected {kind}: convert the model again")
    return value
