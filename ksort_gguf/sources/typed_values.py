"""Metadata values of the type that a key must have: files come from many converters."""

from collections.abc import Mapping

import numpy as np

from ksort_gguf.cache_types import BLOCK_SIZES, K_TYPES, QUERY_TYPES, Keys
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


def typed(metadata: Mapping[str, object], key: str, kind: str, file: str, default=None):
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


def declared_cache(metadata: Mapping[str, object], file: str) -> tuple[str | None, int | None, str | None]:
    """The K-cache type, block size and query type that a model file declares, each None where it does not.

    Raises KsortError naming `file` and the key for a value that FORMAT.md does not know.
    """
    declared = []
    for key, kind, known in (
        (Keys.CACHE_TYPE_K, "a string", K_TYPES),
        (Keys.BLOCK_SIZE, "an integer", BLOCK_SIZES),
        (Keys.QUERY_TYPE, "a string", QUERY_TYPES),
    ):
        value = typed(metadata, key, kind, file)
        if value is not None and value not in known:
            names = ", ".join(map(str, known))
            raise KsortError(f"{file}: key {key} is {value!r}, known are {names}: convert the model again")
        declared.append(value)
    return tuple(declared)
