"""Architectures that we know, one file each. To add one: a file here, a line below, a test."""

from ksort_gguf.errors import UnsupportedModelError
from ksort_gguf.models.families.granite import GRANITE
from ksort_gguf.models.families.llama import LLAMA
from ksort_gguf.models.families.phi3 import PHI3
from ksort_gguf.models.families.qwen2 import QWEN2
from ksort_gguf.models.families.qwen3 import QWEN3
from ksort_gguf.models.families.smollm3 import SMOLLM3
from ksort_gguf.models.family import Family
from ksort_gguf.names import base_architecture

FAMILIES = (
    LLAMA,
    QWEN2,
    QWEN3,
    PHI3,
    SMOLLM3,
    GRANITE,
)


def family_of_gguf(architecture: str, file: str) -> Family:
    """The family of a GGUF's general.architecture, folded or not. Raises UnsupportedModelError naming `file`."""
    for family in FAMILIES:
        if family.name == base_architecture(architecture):
            return family
    known = ", ".join(f.name for f in FAMILIES)
    raise UnsupportedModelError(f"{file}: architecture {architecture!r} is not supported (supported: {known})")


def family_of_hf(architecture: str, file: str) -> Family:
    """The family of an entry of config.json's "architectures". Raises UnsupportedModelError naming `file`."""
    for family in FAMILIES:
        if architecture in family.hf_architectures:
            return family
    known = ", ".join(a for f in FAMILIES for a in f.hf_architectures)
    raise UnsupportedModelError(f"{file}: architecture {architecture!r} is not supported (supported: {known})")
