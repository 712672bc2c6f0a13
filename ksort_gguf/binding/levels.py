"""Kernel levels of libksort."""

from ksort_gguf.binding.ffi import loaded
from ksort_gguf.binding.status import LEVELS


def kernels() -> str:
    """The kernel level in use, one of LEVELS. Raises KsortError if KSORT_KERNELS names one that cannot run here."""
    binding = loaded()
    level = binding.text(binding.lib.ksort_kernels())
    if level == "unsupported":
        binding.check(binding.lib.KSORT_ERR_KERNELS)
    return level


def select_kernels(level: str | None) -> None:
    """Use `level` (None: the automatic choice) in the whole process. Raises ValueError if this CPU cannot run it."""
    binding = loaded()
    if binding.lib.ksort_select_kernels(binding.null if level is None else level.encode()):
        raise ValueError(f"kernel level {level!r} is unknown, or this CPU does not support it")


def available_levels() -> list[str]:
    """The levels that this CPU can run, lowest first. The level in use stays as it is."""
    binding = loaded()
    in_use = binding.text(binding.lib.ksort_kernels())
    usable = []
    for level in LEVELS:
        chosen = binding.lib.ksort_select_kernels(level.encode()) == binding.lib.KSORT_OK
        if chosen and kernels() == level:  # "avx512" may fall to "avx512bw"
            usable.append(level)
    binding.lib.ksort_select_kernels(binding.null if in_use == "unsupported" else in_use.encode())
    return usable
