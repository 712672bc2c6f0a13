"""Whether a model can run on a GPU here, and what is missing where it cannot."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ksort_gguf.binding import cuda
from ksort_gguf.errors import ContextError, DeviceError, KsortError

_OLDEST_TORCH = (2, 8)  # the first whose torch.mm has out_dtype


def missing() -> str | None:
    """What is missing of a torch with CUDA, a GPU and libksort_cuda, in words for the user; None if a model can run."""
    version = torch.__version__
    if torch.version.cuda is None:
        return f"this torch ({version}) has no CUDA: install a CUDA build of torch"
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST_TORCH:
        return f"torch {version} is too old: install {'.'.join(map(str, _OLDEST_TORCH))} or newer"
    if not torch.cuda.is_available():
        return "torch finds no GPU: check what nvidia-smi and CUDA_VISIBLE_DEVICES say"
    try:
        cuda.library()
    except KsortError as error:
        return str(error)
    return None


def require_cuda() -> None:
    """Raise DeviceError saying what is missing."""
    if what := missing():
        raise DeviceError(f"`device` cuda: {what}", field="device")


@contextmanager
def memory_errors(what: str) -> Iterator[None]:
    """Turn CUDA's running out of memory into a ContextError about `what`."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise ContextError(
            f"the GPU's memory is too small for {what}: lower the context size with `n_ctx`, or run on the CPU",
            field="n_ctx",
        ) from error
