"""Where libksort, libksort_cuda and their headers are, and what cffi can read of a header. Knows no cffi."""

import os
import re
import sys
from importlib import metadata
from pathlib import Path

from ksort_gguf.errors import KsortError

LIBRARY_VARIABLE = "KSORT_LIBRARY"  # path of another build of the library, such as one with sanitizers
CUDA_LIBRARY_VARIABLE = "KSORT_CUDA_LIBRARY"

_VARIABLES = {"ksort": LIBRARY_VARIABLE, "ksort_cuda": CUDA_LIBRARY_VARIABLE}
_WHERE_MISSING = {
    "ksort": "native library missing: install the package with `pip install .` (needs a C compiler)",
    "ksort_cuda": "this ksort-gguf was built without CUDA: install it again where nvcc is on PATH (`pip install .`)",
}
_PACKAGE = Path(__file__).resolve().parent
_SOURCE_HEADERS = _PACKAGE.parent / "native" / "include"


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
    raise KsortError(f"{_PACKAGE / name}: {_WHERE_MISSING[library]}")


def header_path(name: str = "ksort.h") -> Path:
    """A header of the package, or, running from a source tree, in native/include. Raises KsortError if neither is."""
    for path in (*(folder / "include" / name for folder in package_folders()), _SOURCE_HEADERS / name):
        if path.is_file():
            return path
    raise KsortError(f"{_PACKAGE}/include/{name}: the native header is missing: reinstall ksort-gguf")


def header_text(library: str = "ksort") -> str:
    """What cffi can parse of lib{library}'s header, and of ksort.h, which every other header includes."""
    text = declarations(header_path().read_text(encoding="utf-8"))
    if library != "ksort":
        text += "\n" + declarations(header_path(f"{library}.h").read_text(encoding="utf-8"))
    return text


def package_folders() -> list[Path]:
    """This package's folder, and where it is installed: another one when Python runs in a source tree."""
    try:
        return [_PACKAGE, Path(metadata.distribution("ksort-gguf").locate_file("ksort_gguf"))]
    except metadata.PackageNotFoundError:
        return [_PACKAGE]


def declarations(header: str) -> str:
    """What cffi can parse of a header's text: its C declarations and its `#define NAME integer` lines."""
    header = re.sub(r"^#ifdef __cplusplus\n.*?^#endif.*?\n", "", header, flags=re.MULTILINE | re.DOTALL)
    integer_define = re.compile(r"#define \w+ \d+\s*(/\*.*)?$")
    return "\n".join(line for line in header.splitlines() if not line.startswith("#") or integer_define.match(line))
