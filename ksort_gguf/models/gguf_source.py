"""A GGUF model as a source: stock, or folded by us."""

from pathlib import Path

from ksort_gguf.container.gguf_reader import Container, open_container
from ksort_gguf.errors import KsortError
from ksort_gguf.models.families import family_of_gguf
from ksort_gguf.models.source import Source
from ksort_gguf.names import Keys


class GgufSource(Source):
    """An open GGUF model file."""

    def __init__(self, path: Path, container: Container):
        architecture = container.values.get("general.architecture")
        if architecture is None:
            raise KsortError(f"{path}: key general.architecture is missing: this is not a model file")
        _check_kind(path, container)
        self._file = container.file
        family = family_of_gguf(str(architecture.decode()), str(path))
        super().__init__(path, family, container.values, container.tensors)
        self.alignment = container.alignment

    def close(self) -> None:
        self._file.close()


def _check_kind(path: Path, container: Container) -> None:
    """Raise KsortError unless the file is a whole model."""

    def value(key: str, default: object) -> object:
        return container.values[key].decode() if key in container.values else default

    kind = value("general.type", "model")
    if kind == Keys.PLAN_FILE_TYPE:
        raise KsortError(f"{path}: is a plan file, not a model: give the model, and the plan with `plan_file`")
    if kind != "model":
        raise KsortError(f"{path}: general.type is {kind!r}: not a model file")
    if value("split.count", 1) not in (0, 1):
        raise KsortError(f"{path}: is one part of a split model: join the parts with llama-gguf-split --merge")


def open_gguf(path: Path) -> GgufSource:
    """Open a GGUF model, stock or folded. Raises KsortError naming the file (see open_container and Source)."""
    path = Path(path)
    container = open_container(path)
    try:
        return GgufSource(path, container)
    except BaseException:
        container.file.close()
        raise
