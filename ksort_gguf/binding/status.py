"""What a status of libksort that the user can act on says to them. Knows no cffi."""

import os
import platform

from ksort_gguf.errors import CacheTypeError, KsortError, PlanError

KERNELS_VARIABLE = "KSORT_KERNELS"  # read by the library itself
# kernel levels, lowest first
LEVELS = ("scalar", "neon") if platform.machine() == "aarch64" else ("scalar", "avx2", "avx512bw", "avx512")

_MESSAGES: dict[str, tuple[type[KsortError], str]] = {  # {where}: nothing, or the layer
    "KSORT_ERR_NON_FINITE": (
        KsortError,
        "the model produced NaN or infinity in keys, values or queries{where}: "
        "the weights are damaged or overflow their type; check the file, or convert with `outtype` bf16 or f32",
    ),
    "KSORT_ERR_RANGE": (
        CacheTypeError,
        "keys or values{where} are too large for the cache type, or become so in the plan's transform: "
        "use `cache_type_k` f32 and `cache_type_v` f32, which are never transformed, or run the model without a plan",
    ),
    "KSORT_ERR_TRANSFORM": (
        PlanError,
        "the plan is damaged{where}: a shift is not finite, a scale not positive and finite, or a permutation "
        "is none; make the plan again",
    ),
    "KSORT_ERR_THREADS": (
        KsortError,
        "the system refused the threads or their memory: ask for fewer with `n_threads`",
    ),
}


def user_error(status: str, where: str = "") -> KsortError | None:
    """The error for a status by its name in ksort.h, or None for one that only a programming error brings about."""
    if status == "KSORT_ERR_KERNELS":
        return KsortError(
            f"{KERNELS_VARIABLE}={os.environ.get(KERNELS_VARIABLE, '')}: not a kernel level that this CPU runs: "
            f"unset it, or use one of {', '.join(LEVELS)}"
        )
    if status not in _MESSAGES:
        return None
    kind, text = _MESSAGES[status]
    return kind(text.format(where=where))
