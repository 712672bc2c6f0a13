"""Reading an architecture's metadata so that nothing is passed over: what no one read is refused, or warned about."""

import logging
import math
from collections.abc import Mapping

from ksort_gguf.errors import KsortError, UnsupportedModelError
from ksort_gguf.models.known_keys import Effect, gguf_key_effect

_BARE_PREFIX = "xielu."  # keys that llama.cpp gives no architecture's name
_LOG = logging.getLogger(__name__)


class ModelKeys:
    """The metadata of a model, stock or folded, by keys without the architecture's name in front.

    Every method raises KsortError naming the file and the key for a value of another kind, or a missing one that has
    no default.
    """

    def __init__(self, metadata: Mapping[str, object], file: str):
        """metadata: plain values of all keys of the file."""
        self._metadata, self.file = metadata, file
        self.architecture = str(metadata["general.architecture"])
        self._prefix = f"{self.architecture}."
        self._read: set[str] = set()

    def value(self, key: str, default: object = None) -> object:
        """The value as it stands in the file, or `default`; None is no default."""
        self._read.add(key)
        found = self._metadata.get(self._prefix + key, default)
        if found is None:
            raise KsortError(f"{self.file}: missing key {self._prefix}{key}: the file is incomplete, convert it again")
        return found

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise KsortError(
                f"{self.file}: key {self._prefix}{key} is {value!r}, expected one positive integer for all layers"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number, zero or more."""
        value = self.value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise KsortError(f"{self.file}: key {self._prefix}{key} is {value!r}, expected a number, zero or more")
        return float(value)

    def positive(self, key: str, default: float | None = None) -> float:
        """A number above zero."""
        value = self.number(key, default)
        if value == 0:
            raise KsortError(f"{self.file}: key {self._prefix}{key} is 0: the file is damaged, get it again")
        return value

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self.value(key, default)
        if not isinstance(value, str):
            raise KsortError(f"{self.file}: key {self._prefix}{key} is {value!r}, expected a string")
        return value

    def has(self, key: str) -> bool:
        """Whether the file has the key."""
        return self._prefix + key in self._metadata

    def refuse_unread(self) -> None:
        """Raise UnsupportedModelError for a key that was not read and would change what the model computes.

        Unknown keys under the architecture's name are one warning in the log.
        """
        unknown = []
        for key, value in self._metadata.items():
            suffix = key.removeprefix(self._prefix)
            if suffix in self._read or (suffix == key and not key.startswith(_BARE_PREFIX)):
                continue
            effect = gguf_key_effect(suffix, value)
            if effect is Effect.COMPUTES:
                raise UnsupportedModelError(
                    f"{self.file}: key {key} is {_short(value)}, which is not supported for this architecture: "
                    "run the model with llama.cpp"
                )
            if effect is Effect.UNKNOWN:
                unknown.append(key)
        if unknown:
            _LOG.warning("%s: unknown keys are ignored: %s", self.file, ", ".join(unknown))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
