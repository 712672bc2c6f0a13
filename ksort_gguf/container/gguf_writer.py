"""Writing a GGUF file: one tensor at a time, and under its name only when complete."""

import contextlib
import errno
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from gguf import GGUF_DEFAULT_ALIGNMENT, GGUF_VERSION, GGMLQuantizationType

from ksort_gguf.container.gguf_reader import MAGIC
from ksort_gguf.container.tensors import encoded_bytes
from ksort_gguf.container.values import Value, encode_string
from ksort_gguf.errors import KsortError

TensorInfo = tuple[str, tuple[int, ...], GGMLQuantizationType]  # name, shape in numpy order, type


def check_output(path: Path, force: bool, inputs: Sequence[Path] = ()) -> None:
    """Raise KsortError if `path` must not be written: it exists without `force`, is an input, or has no folder."""
    for source in inputs:
        if path.exists() and os.path.samefile(path, source):
            raise KsortError(f"{path}: is the input itself: choose another `outfile`", field="outfile")
    if path.exists() and not path.is_file():
        raise KsortError(f"{path}: is not a regular file: give `outfile` a file name", field="outfile")
    if path.exists() and not force:
        raise KsortError(
            f"{path}: exists already: choose another `outfile`, or overwrite it with `force`", field="outfile"
        )
    if not path.parent.is_dir():
        raise KsortError(f"{path}: its folder does not exist: make it first")


class GgufOutput:
    """Use as a context: write every tensor, in the order of `infos`; leaving it without an error renames the file.

    The data goes to a temporary file beside `path`, which is removed on any error, Ctrl-C included, so that an existing
    file under `path` is replaced whole or not at all. I/O errors (a full disk) become KsortError.
    """

    def __init__(
        self,
        path: Path,
        values: Mapping[str, Value],
        infos: Sequence[TensorInfo],
        *,
        alignment: int = GGUF_DEFAULT_ALIGNMENT,
        force: bool = False,
    ):
        """`alignment` must agree with general.alignment in `values`. Raises KsortError as check_output does."""
        check_output(path, force)
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        self._header = _header(values, infos, alignment)
        self._alignment = alignment
        self._pending = [(name, encoded_bytes(shape, tensor_type)) for name, shape, tensor_type in reversed(infos)]

    def __enter__(self) -> "GgufOutput":
        try:
            self._file = open(self._temporary, "wb")
        except OSError as error:
            raise self._explain(error) from None
        try:
            self._write([self._header])
        except OSError as error:
            self._discard()
            raise self._explain(error) from None
        return self

    def write_tensor(self, name: str, chunks: Iterable[np.ndarray]) -> None:
        """Write the next tensor's bytes. Raises KsortError on I/O errors, ValueError on a wrong name or size."""
        expected_name, expected_bytes = self._pending.pop()
        if name != expected_name:
            raise ValueError(f"tensor {name} written where {expected_name} was announced")
        try:
            n_written = self._write(chunks)
        except OSError as error:
            raise self._explain(error) from None
        if n_written != expected_bytes:
            raise ValueError(f"tensor {name}: {n_written} bytes written, {expected_bytes} announced")

    def _write(self, chunks: Iterable[bytes | np.ndarray]) -> int:
        """Write the chunks and pad the file to the alignment; bytes without padding."""
        n_written = 0
        for chunk in chunks:
            data = memoryview(chunk if isinstance(chunk, bytes) else chunk.data).cast("B")
            self._file.write(data)
            n_written += data.nbytes
        self._file.write(bytes(-self._file.tell() % self._alignment))
        return n_written

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if exc_type is not None:
            self._discard()
            return
        try:
            if self._pending:
                raise ValueError(f"tensor {self._pending[-1][0]} was not written")
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self._path)
        except OSError as error:
            self._discard()
            raise self._explain(error) from None
        except BaseException:
            self._discard()
            raise

    def _discard(self) -> None:
        with contextlib.suppress(OSError):  # a full disk refuses what is still buffered; the file goes away anyway
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _explain(self, error: OSError) -> KsortError:
        hint = ": free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
        return KsortError(f"{self._path}: cannot be written: {error.strerror}{hint}")


def _header(values: Mapping[str, Value], infos: Sequence[TensorInfo], alignment: int) -> bytes:
    """Magic, counts, values and tensor infos (the GGUF specification's order)."""
    parts = [MAGIC, struct.pack("<IQQ", GGUF_VERSION, len(infos), len(values))]
    for key, value in values.items():
        parts += [encode_string(key), struct.pack("<I", value.type), value.raw]
    offset = 0
    for name, shape, tensor_type in infos:
        dims = tuple(reversed(shape))
        parts += [encode_string(name), struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor_type, offset)]
        offset += -(-encoded_bytes(shape, tensor_type) // alignment) * alignment
    return b"".join(parts)
