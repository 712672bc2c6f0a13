"""Loading libksort, libksort_run and libksort_cuda through cffi (ABI mode). The only file that knows cffi.

Declarations come from the headers themselves (files.py finds them), so they exist once; what each field means, its
shape and its unit are said there. cffi keeps no Python objects alive: objects of this room hold what their C structs
point to. A C object is `Any` here: cffi types them when the program runs.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from cffi import FFI

from ksort_gguf.binding import files
from ksort_gguf.binding.rows import FloatRows, address_of
from ksort_gguf.binding.status import user_error
from ksort_gguf.errors import KsortError


@functools.cache
def _declared() -> FFI:
    """One FFI for all libraries, so that a struct of one can be passed to another."""
    ffi = FFI()
    ffi.cdef(files.header_text())
    return ffi


class Binding:
    """A loaded library, lib{name}."""

    def __init__(self, name: str = "ksort"):
        library = files.library_path(name)
        self.ffi = _declared()
        try:
            self.lib: Any = self.ffi.dlopen(str(library))
            built = getattr(self.lib, f"{name}_abi_version")()
            expected = getattr(self.lib, f"{name.upper()}_ABI_VERSION")
        except (OSError, AttributeError) as error:  # no library at all, or another one without our functions
            raise KsortError(f"{library}: cannot be loaded ({error}): reinstall ksort-gguf on this machine") from error
        if built != expected:
            raise KsortError(f"{library}: ABI version {built}, but this package needs {expected}: reinstall ksort-gguf")
        self.null = self.ffi.NULL
        self._floats, self._anything = self.ffi.typeof("float *"), self.ffi.typeof("void *")

    def new(self, struct: str) -> Any:
        """A zeroed struct of type `struct` with struct_size set, as a pointer that owns it."""
        pointer = self.ffi.new(f"{struct} *")
        pointer.struct_size = self.ffi.sizeof(struct)
        return pointer

    def array(self, ctype: str, values: Any) -> Any:
        """A pointer `ctype` to the memory of a NumPy array or a torch tensor; the caller keeps it alive."""
        return self.ffi.cast(ctype, address_of(values))

    def floats(self, rows: FloatRows) -> Any:
        """A float * to float32 rows; the caller keeps them alive. Raises ValueError for rows of another type."""
        if rows.itemsize != _FLOAT_BYTES:
            raise ValueError(f"expected float32 rows, got {rows.type_name}")
        return self.ffi.cast(self._floats, rows.address)

    def pointer(self, address: int) -> Any:
        """A void * to an address that another library gave, such as a CUDA stream."""
        return self.ffi.cast(self._anything, address)

    def memory(self, buffer: Any) -> Any:
        """A char[] over a writable buffer, which it keeps alive."""
        return self.ffi.from_buffer(buffer, require_writable=True)

    def text(self, string: Any) -> str:
        """A C string as text."""
        return self.ffi.string(string).decode()

    def size(self, call: Callable[..., int], *args: Any) -> int:
        """What `call` stores through its last argument, a size_t *, behind `args`. Raises as check."""
        size = self.ffi.new("size_t *")
        self.check(call(*args, size))
        return int(size[0])

    def owned(self, create: Callable[..., int], destroy: Callable[..., None], ctype: str, *args: Any) -> Any:
        """What `create` stores through its last argument, a `ctype` *; `destroy` gets it last. Raises as check."""
        handle = self.ffi.new(f"{ctype} *")
        self.check(create(*args, handle))
        return self.ffi.gc(handle[0], destroy)

    def release(self, handle: Any) -> None:
        """Destroy what `owned` gave now."""
        self.ffi.release(handle)

    def check(self, status: int, where: str = "") -> None:
        """Raise for any status but KSORT_OK: KsortError where the user can act, ValueError for a programming error."""
        if status == self.lib.KSORT_OK:
            return
        if error := user_error(self.ffi.string(self.ffi.cast("ksort_status", status)), where):
            raise error
        libksort = loaded()  # its texts serve for the other libraries' statuses too
        raise ValueError(f"libksort: {libksort.text(libksort.lib.ksort_status_text(status))} (status {status}){where}")


loaded = functools.cache(Binding)  # the one binding of a library in the process


def aligned_buffer(n_bytes: int) -> np.ndarray:
    """Zeroed uint8 [n_bytes] whose first byte is aligned as the libraries ask for (KSORT_ALIGNMENT)."""
    memory = np.zeros(n_bytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + n_bytes]


ALIGNMENT = 64  # bytes
_FLOAT_BYTES = 4
