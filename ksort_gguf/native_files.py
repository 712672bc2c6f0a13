"""Where libksort and its header are, and what cffi can read of the header. Knows no cffi."""

import os
import re
import sys
from importlib import metadata
from pathlib import Path

from ksort_gguf.errors import KsortError

LIBRARY_VARIABLE = "KSORT_LIBRARY"  # path of another build of the library, such as one with sanitizers

_PACKAGE = Path(__file__).resolve().parent
_SOURCE_HEADER = _PACKAGE.parent / "native" / "include" / "ksort.h"


def library_path() -> Path:
    """The library's file: KSORT_LIBRARY, or the installed one. Raises KsortError if it does not exist."""
    override = os.environ.get(LIBRARY_VARIABLE)
    if override:
        if Path(override).is_file():
            return Path(override)
        raise KsortError(f"{LIBRARY_VARIABLE}={override}: no such file: unset it, or give the path of a libksort build")
    name = f"lib/libksort.{'dylib' if sys.platform == 'darwin' else 'so'}"
    for folder in package_folders():
        if (folder / name).is_file():
            return folder / name
    raise KsortError(
        f"{_PACKAGE / name}: native library missing: install the package with `pip install .` (needs a C compiler)"
    )


def header_path() -> Path:
    """ksort.h of the package, or, running from a source tree, in native/include. Raises KsortError if neither is."""
    for path in (*(folder / "include" / "ksort.h" for folder in package_folders()), _SOURCE_HEADER):
        if path.is_file():
            return path
    raise KsortError(f"{_PACKAGE}/include/ksort.h: the native header is missing: reinstall ksort-gguf")


def package_folders() -> list[Path]:
    """This package's folder, and where it is installed: another one when Python runs in a source tree."""
    try:
        return [_PACKAGE, Path(metadata.distribution("ksort-gguf").locate_file("ksort_gguf"))]
    except metadata.PackageNotFoundError:
        return [_PACKAGE]


def declarations(header: str) -> str:
    """What cffi can parse of ksort.h's text: its C declarations and its `#define NAME integer` lines."""
    header = re.sub(r"^#ifdef __cplusplus\n.*?^#endif.*?\n", "", header, flags=re.MULTILINE | re.DOTALL)
    integer_define = re.compile(r"#define \w+ \d+\s*(/\*.*)?$")
    return "\n".join(line for line in header.splitlines() if not line.startswith("#") or integer_define.match(line))
