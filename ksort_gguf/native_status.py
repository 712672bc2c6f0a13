"""What a status of libksort that the user can act on says to them. Knows no cffi."""

import os
import platform

from ksort_gguf.errors import KsortError

KERNELS_VARIABLE = "KSORT_KERNELS"  # read by the library itself
# kernel levels, lowest first
LEVELS = ("scalar", "neon") if platform.machine() == "aarch64" else ("scalar", "avx2", "avx512bw", "avx512")

_MESSAGES = {  # {where}: nothing, or the layer
    "KSORT_ERR_NON_FINITE": (
        "the model produced NaN or infinity in keys, values or queries{where}: "
        "the weights are damaged or overflow their type; check the file, or convert with --outtype bf16 or f32"
    ),
    "KSORT_ERR_RANGE": (
        "keys or values{where} are too large for the cache type, or become so in the plan's transform: "
        "use --cache-type-k f32 and --cache-type-v f32, which are never transformed, or run the model without a plan"
    ),
    "KSORT_ERR_TRANSFORM": (
        "the plan is damaged{where}: a shift is not finite, a scale not positive and finite, or a sequence "
        "no permutation; make the plan again"
    ),
    "KSORT_ERR_THREADS": "the system refused the threads or their memory: ask for fewer with -t",
}


def user_error(status: str, where: str = "") -> KsortError | None:
    """The error for a status by its name in ksort.h, or None for one that only a programming error brings about."""
    if status == "KSORT_ERR_KERNELS":
        return KsortError(
            f"{KERNELS_VARIABLE}={os.environ.get(KERNELS_VARIABLE, '')}: not a kernel level that this CPU runs: "
            f"unset it, or use one of {', '.join(LEVELS)}"
        )
    return KsortError(_MESSAGES[status].format(where=where)) if status in _MESSAGES else None
