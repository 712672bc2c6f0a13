"""ksort-gguf: a 4-bit key and value cache for local and served LLM inference.

    from ksort_gguf import load, convert, make_plan, PackedCache, KsortError

Importing the package imports nothing heavy: names below are looked up when they are used.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ksort_gguf.api import convert, load, make_plan, read_plan
    from ksort_gguf.cache.packed import PackedCache
    from ksort_gguf.engine.llm import LLM
    from ksort_gguf.errors import (
        BusyError,
        CacheTypeError,
        ContextError,
        DeviceError,
        KsortError,
        PlanError,
        UnsupportedModelError,
    )
    from ksort_gguf.kvplan import KVPlan

__version__ = "0.2.0"

__all__ = [
    "LLM",
    "BusyError",
    "CacheTypeError",
    "ContextError",
    "DeviceError",
    "KVPlan",
    "KsortError",
    "PackedCache",
    "PlanError",
    "UnsupportedModelError",
    "convert",
    "load",
    "make_plan",
    "read_plan",
]

_HOMES = {
    "api": ("convert", "load", "make_plan", "read_plan"),
    "cache.packed": ("PackedCache",),
    "engine.llm": ("LLM",),
    "errors": (
        "BusyError",
        "CacheTypeError",
        "ContextError",
        "DeviceError",
        "KsortError",
        "PlanError",
        "UnsupportedModelError",
    ),
    "kvplan": ("KVPlan",),
}


def __getattr__(name: str) -> object:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
