"""config.json of transformers 4 and 5: values of the right kind, and which of its keys no one asked for."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from ksort_gguf.errors import KsortError, UnsupportedModelError
from ksort_gguf.names import MAX_LAYERS

_MAX_COUNT = 2**31 - 1  # of what GGUF stores as uint32 and other programs read as int32
_FLOAT32_RANGE = (2.0**-126, 2.0**128 - 2.0**104)  # of normal numbers: what GGUF stores as float32
_ROPE_NAMES = {"none": "default", "su": "longrope"}  # older names of RoPE types


class HfConfig:
    """A parsed config.json. Methods raise KsortError naming the file and the key.

    They remember the keys that were asked for: `unread` gives the rest, which nobody understood.
    """

    def __init__(self, path: Path):
        self.path = path
        self._config = read_json(path)
        self._read: set[str] = set()
        self._rope_defaults: dict[str, object] = {}
        architectures = self.value("architectures")
        if not isinstance(architectures, list) or not architectures:
            raise KsortError(f"{path}: key architectures is missing: name the model class, such as LlamaForCausalLM")
        self.architecture = str(architectures[0])

    def value(self, key: str, default: object = None) -> object:
        """The value as it stands in the file; `default` where it is missing or null."""
        self._read.add(key)
        found = self._config.get(key)
        return default if found is None else found

    def unread(self) -> dict[str, object]:
        """The keys that nobody asked for, with their values."""
        return {key: value for key, value in self._config.items() if key not in self._read}

    def set_default(self, key: str, value: object) -> None:
        """What a missing or null `key` means for this architecture."""
        if self._config.get(key) is None:
            self._config[key] = value

    def require(self, key: str, value: object) -> None:
        """Raise UnsupportedModelError unless `key` is missing, null or `value`."""
        if self.value(key, value) != value:
            raise UnsupportedModelError(f"{self.path}: {key} {self._config[key]!r} is not supported ({value} is)")

    def ignore(self, key: str) -> None:
        """Say that the rest of the checkpoint makes `key` plain, whatever its value."""
        self._read.add(key)

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _MAX_COUNT:
            raise KsortError(f"{self.path}: key {key} is {value!r}, expected a positive integer")
        return value

    def number(self, key: str, value: object) -> float:
        """`value`, found under `key`, as a positive float that float32 can hold."""
        smallest, largest = _FLOAT32_RANGE
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not smallest <= value <= largest:
            raise KsortError(f"{self.path}: key {key} is {value!r}, expected a positive number that float32 can hold")
        return float(value)

    @property
    def n_layers(self) -> int:
        """Layers of the model."""
        n_layers = self.count("num_hidden_layers")
        if n_layers > MAX_LAYERS:
            raise KsortError(f"{self.path}: key num_hidden_layers is {n_layers}, expected at most {MAX_LAYERS}")
        return n_layers

    @property
    def n_heads(self) -> int:
        """Query heads."""
        return self.count("num_attention_heads")

    @property
    def n_kv_heads(self) -> int:
        """Key and value heads."""
        return self.count("num_key_value_heads", self.n_heads)

    @property
    def head_dim(self) -> int:
        """Channels a head: an even number, or RoPE could not pair them."""
        head_dim = self.count("head_dim", max(1, self.count("hidden_size") // self.n_heads))
        if head_dim % 2:
            raise KsortError(f"{self.path}: head dimension {head_dim} is odd, so RoPE cannot pair its channels")
        return head_dim

    @property
    def is_tied(self) -> bool:
        """Whether the embedding also serves as the output projection."""
        return bool(self.value("tie_word_embeddings", False))

    @property
    def rope(self) -> Mapping[str, object]:
        """RoPE parameters: rope_scaling (transformers 4; it wins, as there) or rope_parameters, with rope_theta."""
        scaling, parameters = self.value("rope_scaling"), self.value("rope_parameters")
        rope = scaling or parameters or {}
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            raise UnsupportedModelError(
                f"{self.path}: RoPE parameters {rope!r} are not supported: expected one set for all layers"
            )
        theta = self.value("rope_theta")
        if theta is None and isinstance(parameters, dict):
            theta = parameters.get("rope_theta")
        return {**self._rope_defaults, **({} if theta is None else {"rope_theta": theta}), **rope}

    def set_rope_default(self, key: str, value: object) -> None:
        """What a missing RoPE parameter means for this architecture."""
        self._rope_defaults[key] = value

    def rope_type(self, *supported: str) -> str:
        """The kind of RoPE scaling, "default" or one of `supported`."""
        name = str(self.rope.get("rope_type", self.rope.get("type", "default")))
        name = _ROPE_NAMES.get(name, name)
        if name not in ("default", *supported):
            known = ", ".join(("default", *supported))
            raise UnsupportedModelError(f"{self.path}: RoPE type {name!r} is not supported ({known})")
        return name

    def rope_number(self, key: str, default: float | None = None) -> float:
        """A positive number among the RoPE parameters."""
        return self.number(key, self.rope.get(key, default))

    def window(self, all_layers: bool = False) -> int:
        """Sliding attention window in tokens, 0 for none. Raises KsortError if it counts and not all layers have it.

        all_layers: what a window without any word about layers means.
        """
        window = self.count("sliding_window") if self.value("sliding_window") else 0
        layer_types, slides = self.value("layer_types"), self.value("use_sliding_window")
        first = self.count("max_window_layers", self.n_layers) if slides else math.inf
        self.ignore("max_window_layers")
        if all_layers and layer_types is None:
            return window
        if layer_types is None:
            layer_types = [
                "sliding_attention" if layer >= first else "full_attention" for layer in range(self.n_layers)
            ]
        if not isinstance(layer_types, list) or not {"sliding_attention", "full_attention"}.issuperset(layer_types):
            raise UnsupportedModelError(
                f"{self.path}: layer_types {layer_types!r} is not supported (full_attention, sliding_attention)"
            )
        n_sliding = layer_types.count("sliding_attention") if window else 0
        if 0 < n_sliding < len(layer_types) and window < self.count("max_position_embeddings"):
            raise UnsupportedModelError(
                f"{self.path}: {n_sliding} of {len(layer_types)} layers have a sliding window of {window}, which is "
                f"not supported: set max_position_embeddings to {window} at most, where the window changes nothing"
            )
        return window if n_sliding == len(layer_types) else 0

    def refuse_unread(self, computes: Callable[[str, object], bool]) -> None:
        """Raise UnsupportedModelError for a key that nobody asked for and that `computes` says changes a model."""
        for key, value in self.unread().items():
            if computes(key, value):
                raise UnsupportedModelError(
                    f"{self.path}: {key} {value!r} is not supported for {self.architecture}: use another program, or "
                    "remove it if the weights were trained without it"
                )


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises KsortError naming it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise KsortError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise KsortError(f"{path}: is not JSON ({error}): get it again") from None
    if not isinstance(value, dict):
        raise KsortError(f"{path}: is not a JSON object: get it again")
    return value
