"""Where the native libraries and their headers are, and what cffi can read of a header. Knows no cffi."""

import os
import re
import sys
from importlib import metadata
from pathlib import Path

from ksort_gguf.errors import DeviceError, KsortError

LIBRARY_VARIABLE = "KSORT_LIBRARY"  # path of another build of libksort, such as one with sanitizers
RUN_LIBRARY_VARIABLE = "KSORT_RUN_LIBRARY"
CUDA_LIBRARY_VARIABLE = "KSORT_CUDA_LIBRARY"

_VARIABLES = {"ksort": LIBRARY_VARIABLE, "ksort_run": RUN_LIBRARY_VARIABLE, "ksort_cuda": CUDA_LIBRARY_VARIABLE}
_BUILD_NOTE = "lib/ksort_build.txt"  # what the build says it did about CUDA
_PACKAGE = Path(__file__).resolve().parents[1]
_SOURCE_HEADERS = tuple(_PACKAGE.parent / "native" / folder for folder in ("include", "run"))


def library_path(library: str = "ksort") -> Path:
    """The file of lib{library}: what its variable names, or the installed one. Raises KsortError if it is not there."""
    override = os.environ.get(_VARIABLES[library])
    if override:
        if Path(override).is_file():
            return Path(override)
        raise KsortError(
            f"{_VARIABLES[library]}={override}: no such file: unset it, or give the path of a lib{library} build"
        )
    name = f"lib/lib{library}.{'dylib' if sys.platform == 'darwin' else 'so'}"
    for folder in package_folders():
        if (folder / name).is_file():
            return folder / name
    if library == "ksort_cuda":
        raise DeviceError(
            f"{_PACKAGE / name}: {cuda_build() or 'libksort_cuda: not built: install ksort-gguf where nvcc is on PATH'}"
        )
    raise KsortError(
        f"{_PACKAGE / name}: native library missing: install the package with `pip install .` (needs a C compiler)"
    )


def cuda_build() -> str:
    """What the installed build did about libksort_cuda, in one line; empty where nothing is installed."""
    for folder in package_folders():
        if (folder / _BUILD_NOTE).is_file():
            return (folder / _BUILD_NOTE).read_text(encoding="utf-8").strip()
    return ""


def header_text() -> str:
    """What cffi can parse of all headers. Raises KsortError where one is missing."""
    headers = (_header(name) for name in ("ksort.h", "ksort_run.h", "ksort_cuda.h"))
    return "\n".join(declarations(header.read_text(encoding="utf-8")) for header in headers)


def _header(name: str) -> Path:
    """A header of the package or, running from a source tree, of native/."""
    for folder in (*(folder / "include" for folder in package_folders()), *_SOURCE_HEADERS):
        if (folder / name).is_file():
            return folder / name
    raise KsortError(f"{_PACKAGE}/include/{name}: the native header is missing: reinstall ksort-gguf")


def package_folders() -> list[Path]:
    """This package's folder, and where it is installed: another one when Python runs in a source tree."""
    try:
        return [_PACKAGE, Path(str(metadata.distribution("ksort-gguf").locate_file("ksort_gguf")))]
    except metadata.PackageNotFoundError:
        return [_PACKAGE]


def declarations(header: str) -> str:
    """What cffi can parse of a header's text: its C declarations and its `#define NAME integer` lines."""
    header = re.sub(r"^#ifdef __cplusplus\n.*?^#endif.*?\n", "", header, flags=re.MULTILINE | re.DOTALL)
    integer_define = re.compile(r"#define \w+ \d+\s*(/\*.*)?$")
    return "\n".join(line for line in header.splitlines() if not line.startswith("#") or integer_define.match(line))
