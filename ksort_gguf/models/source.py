"""What every source of a model offers: the metadata of a stock or folded GGUF, its spec, and lazy tensors."""

from functools import cached_property
from pathlib import Path

import gguf
import numpy as np

from ksort_gguf.container.tensors import Tensor
from ksort_gguf.container.typed import typed
from ksort_gguf.container.values import Value
from ksort_gguf.errors import CacheTypeError, KsortError, UnsupportedModelError
from ksort_gguf.models.family import Family
from ksort_gguf.models.keys import ModelKeys
from ksort_gguf.models.spec import ModelSpec, Rope
from ksort_gguf.names import BLOCK_SIZES, K_TYPES, QUERY_TYPES, Keys, base_architecture


class Source:
    """A model: `values` (metadata with exact GGUF types), `tensors` by name in file order, its `family` and `spec`,
    and the `alignment` of its data section.

    Raises KsortError naming the file, and the key or tensor, for what is missing, misshapen, or not in the spec.
    """

    def __init__(self, path: Path, family: Family, values: dict[str, Value], tensors: dict[str, Tensor]):
        self.path = path
        self.family = family
        self.values = values
        self.tensors = tensors
        self.alignment = gguf.GGUF_DEFAULT_ALIGNMENT
        keys = ModelKeys(self.metadata, str(path))
        self.spec: ModelSpec = family.spec(keys, {name: tensor.shape for name, tensor in tensors.items()})
        keys.refuse_unread()
        self._check_tensors()

    @cached_property
    def metadata(self) -> dict[str, object]:
        """Plain Python values of all keys: int, float, bool, str, list."""
        return {key: value.decode() for key, value in self.values.items()}

    def set_value(self, key: str, value: Value) -> None:
        """Replace or add a metadata value; not one of the architecture's, which the spec was made from."""
        self.values[key] = value
        self.__dict__.pop("metadata", None)

    @property
    def architecture(self) -> str:
        """general.architecture: the family's name, or that of a folded file."""
        return str(self.metadata["general.architecture"])

    @property
    def is_folded(self) -> bool:
        """Whether a plan is inside."""
        return base_architecture(self.architecture) != self.architecture

    def refuse_folded(self, instead: str) -> None:
        """Raise KsortError for a folded file, saying what to do `instead`."""
        if self.is_folded:
            raise KsortError(f"{self.path}: is folded already: {instead}")

    def tensor(self, name: str) -> Tensor:
        """A tensor that must be there. Raises KsortError naming the file and the tensor."""
        if name not in self.tensors:
            raise KsortError(f"{self.path}: tensor {name} is missing: the model is incomplete, get it again")
        return self.tensors[name]

    def rope_factors(self, rope: Rope, n_ctx: int) -> np.ndarray | None:
        """float32 [n_rot / 2]: what divides the frequencies in a context of `n_ctx` tokens; None for nothing."""
        is_long = rope.long_factors is not None and n_ctx > rope.original_context
        name = rope.long_factors if is_long else rope.factors
        return None if name is None else self.tensor(name).read_finite_f32()

    def files(self) -> list[Path]:
        """The model's own path and the files that its tensors are in."""
        return sorted({self.path, *(Path(tensor.file) for tensor in self.tensors.values())})

    def declared_cache(self) -> tuple[str | None, int | None, str | None]:
        """The K-cache type, block size and query type that the metadata declare, each None where they do not.

        Raises CacheTypeError naming the file and the key for a value that FORMAT.md does not know.
        """
        file = str(self.path)

        def declared(key: str, kind: str, known: tuple) -> object:
            value = typed(self.metadata, key, kind, file)
            if value is not None and value not in known:
                names = ", ".join(map(str, known))
                raise CacheTypeError(f"{file}: key {key} is {value!r}, known are {names}: convert the model again")
            return value

        k_type = declared(Keys.CACHE_TYPE_K, "a string", K_TYPES)
        block_size = declared(Keys.BLOCK_SIZE, "an integer", BLOCK_SIZES)
        query_type = declared(Keys.QUERY_TYPE, "a string", QUERY_TYPES)
        return (
            None if k_type is None else str(k_type),
            block_size if isinstance(block_size, int) else None,
            None if query_type is None else str(query_type),
        )

    def _check_tensors(self) -> None:
        """Hold the file's tensors against the spec's; a plan's own are looked at where the plan is read."""
        used = self.spec.tensors()
        for name, shape in used.items():
            found = self.tensor(name).shape
            if found != shape:
                raise KsortError(
                    f"{self.path}: tensor {name} has shape {list(found)}, where the metadata promise {list(shape)}: "
                    "the model is damaged, get it again"
                )
        for name in self.tensors:
            is_plan = self.is_folded and name.startswith(Keys.PREFIX)
            if name not in used and not is_plan:
                raise UnsupportedModelError(
                    f"{self.path}: tensor {name} has no place in a {self.family.name} model: not supported, run it "
                    "with llama.cpp"
                )

    def close(self) -> None:
        """Release files. Reading tensors afterwards is an error."""

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
