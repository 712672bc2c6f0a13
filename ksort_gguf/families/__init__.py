"""Model architectures that we know: tensor names, head geometry, RoPE pairing. One file a family."""

from ksort_gguf.errors import KsortError
from ksort_gguf.families.base import Family, Geometry, base_architecture
from ksort_gguf.families.llama import LLAMA
from ksort_gguf.families.qwen2 import QWEN2

FAMILIES = (LLAMA, QWEN2)

__all__ = ["FAMILIES", "Family", "Geometry", "base_architecture", "family_of_gguf", "family_of_hf"]


def family_of_gguf(architecture: str, file: str) -> Family:
    """The family of a GGUF's general.architecture, folded or not. Raises KsortError naming `file`."""
    for family in FAMILIES:
        if family.name == base_architecture(architecture):
            return family
    known = ", ".join(f.name for f in FAMILIES)
    raise KsortError(f"{file}: architecture {architecture!r} is not supported (supported: {known})")


def family_of_hf(architecture: str, file: str) -> Family:
    """The family of an entry of config.json's "architectures". Raises KsortError naming `file`."""
    for family in FAMILIES:
        if architecture in family.hf_architectures:
            return family
    known = ", ".join(a for f in FAMILIES for a in f.hf_architectures)
    raise KsortError(f"{file}: architecture {architecture!r} is not supported (supported: {known})")
