"""KL divergence base files: the quantized log-probabilities that llama-perplexity writes and reads.

Layout, little-endian:

    "_logits_"                                                    8 bytes
    int32 n_ctx, n_vocab, n_chunks
    int32 tokens[n_chunks * n_ctx]                                as they are in the text, before BOS replaces any
    rows[n_chunks][n_ctx - 1 - n_ctx / 2]                         one a scored position:
        float32 scale, float32 minimum
        uint16 q[n_vocab], and one of padding if n_vocab is odd   log-probability = scale * q + minimum

The minimum is at most 16 below the largest; what lies under it is stored as the minimum.
"""

import os
from collections.abc import Sequence
from errno import EISDIR
from pathlib import Path

import numpy as np
import torch

from ksort_gguf.errors import KsortError

MAGIC = b"_logits_"
_LARGEST_SPAN = 16.0  # of stored log-probabilities
_LARGEST_Q = 65535
_ROW_HEAD = 4  # uint16 words of scale and minimum
_HEAD_BYTES = len(MAGIC) + 3 * 4


def first_scored(n_ctx: int) -> int:
    """First position of a chunk whose prediction (of the next token) is scored; the last is n_ctx - 2."""
    return n_ctx // 2


def n_scored(n_ctx: int) -> int:
    """Scored positions of a chunk."""
    return n_ctx - 1 - first_scored(n_ctx)


def log_sum_exp(logits: torch.Tensor) -> torch.Tensor:
    """log(sum(exp(logits))) by rows: float32 [rows, n_vocab] -> float64 [rows], summed in double as llama.cpp does."""
    largest = logits.amax(dim=-1, keepdim=True)
    return torch.log(torch.exp(logits - largest).sum(dim=-1, dtype=torch.float64)) + largest[:, 0].double()


def encode_rows(logits: torch.Tensor) -> np.ndarray:
    """Rows of a base file from logits: float32 [rows, n_vocab] -> uint16 [rows, row words]."""
    n_rows, n_vocab = logits.shape
    largest = logits.amax(dim=-1, keepdim=True)
    smallest = torch.maximum(logits.amin(dim=-1, keepdim=True), largest - _LARGEST_SPAN)
    scale = (largest - smallest) / _LARGEST_Q
    log_sum = (log_sum_exp(logits)[:, None] - largest).float()
    inverse = torch.where(scale > 0, 1 / scale, 0.0)  # equal logits: every q is 0
    q = torch.round(inverse * (logits - smallest)).clamp_(0, _LARGEST_Q)
    rows = np.zeros((n_rows, _row_words(n_vocab)), dtype="<u2")
    head = torch.cat([scale, smallest - largest - log_sum], dim=1).numpy()
    rows[:, :_ROW_HEAD] = head.astype("<f4").view("<u2")
    rows[:, _ROW_HEAD : _ROW_HEAD + n_vocab] = q.to(torch.int32).numpy()
    return rows


class BaseWriter:
    """Writes a base file row by row. The file appears under its name when all its rows were written.

    Use as a context manager: leaving it early, or by an exception, removes what was written.
    """

    def __init__(self, path: str | Path, n_ctx: int, n_vocab: int, tokens: Sequence[int]):
        """`tokens` are those of all chunks, n_chunks * n_ctx. Nothing is written before the context is entered."""
        self._path = Path(path)
        self._temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
        self._n_vocab = n_vocab
        n_chunks = len(tokens) // n_ctx
        self._rows_left = n_chunks * n_scored(n_ctx)
        self._head = MAGIC + np.array([n_ctx, n_vocab, n_chunks, *tokens], dtype="<i4").tobytes()

    def __enter__(self) -> "BaseWriter":
        """Raises KsortError if the file cannot be written."""
        try:
            if self._path.is_dir():
                raise IsADirectoryError(EISDIR, os.strerror(EISDIR))
            self._file = open(self._temporary, "wb")
        except OSError as error:
            raise self._refused(error) from None
        try:
            self._put(self._head)
        except KsortError:
            self.__exit__(KsortError)
            raise
        return self

    def write(self, logits: torch.Tensor) -> None:
        """Append the rows of `logits`, float32 [rows, n_vocab]. Raises KsortError if the disk is full."""
        if logits.shape[1] != self._n_vocab or logits.shape[0] > self._rows_left:
            raise ValueError(f"got logits {tuple(logits.shape)} for {self._rows_left} rows of {self._n_vocab}")
        self._rows_left -= logits.shape[0]
        self._put(encode_rows(logits).tobytes())

    def __exit__(self, exception: type[BaseException] | None, *details: object) -> None:
        try:
            self._file.close()
            if self._rows_left == 0 and exception is None:
                self._temporary.replace(self._path)
        except OSError as error:
            if exception is None:
                raise self._refused(error) from None
        finally:
            self._temporary.unlink(missing_ok=True)

    def _put(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise self._refused(error) from None

    def _refused(self, error: OSError) -> KsortError:
        return KsortError(f"{self._path}: cannot be written: {error.strerror}")


class Base:
    """A base file opened for reading: n_ctx, n_vocab, n_chunks, tokens int32 [n_chunks, n_ctx], then rows in order."""

    def __init__(self, path: str | Path, n_vocab: int):
        """Open `path` for a model of `n_vocab` tokens.

        Raises KsortError naming the file if it is no base file, for another vocabulary, damaged or cut short.
        """
        try:
            self._file = open(path, "rb")  # noqa: SIM115 - closed by __exit__
        except OSError as error:
            raise KsortError(f"{path}: cannot be read: {error.strerror}") from None
        try:
            self._read_head(path, n_vocab)
        except KsortError:
            self._file.close()
            raise

    def _read_head(self, path: str | Path, n_vocab: int) -> None:
        head = self._file.read(_HEAD_BYTES)
        if len(head) < _HEAD_BYTES or not head.startswith(MAGIC):
            raise KsortError(f"{path}: is not a KL divergence base file: write one with `kl_divergence_base` alone")
        self.n_ctx, self.n_vocab, self.n_chunks = (int(n) for n in np.frombuffer(head, "<i4", offset=len(MAGIC)))
        if self.n_vocab != n_vocab:
            raise KsortError(f"{path}: was written for a vocabulary of {self.n_vocab}, the model has {n_vocab}")
        if self.n_ctx < 3 or self.n_chunks < 1:
            raise KsortError(f"{path}: has {self.n_chunks} chunks of {self.n_ctx} tokens: damaged, write it again")
        row_bytes = 2 * _row_words(n_vocab)
        expected = _HEAD_BYTES + self.n_chunks * (4 * self.n_ctx + n_scored(self.n_ctx) * row_bytes)
        actual = os.fstat(self._file.fileno()).st_size
        if actual != expected:
            raise KsortError(f"{path}: has {actual} bytes where {expected} are due: write it again")
        tokens = np.frombuffer(self._file.read(4 * self.n_chunks * self.n_ctx), "<i4")
        if tokens.min() < 0 or tokens.max() >= n_vocab:
            raise KsortError(f"{path}: holds token ids outside of the vocabulary: damaged, write it again")
        self.tokens = tokens.reshape(self.n_chunks, self.n_ctx)

    def read(self, n_rows: int) -> torch.Tensor:
        """The next `n_rows` rows as log-probabilities, float32 [n_rows, n_vocab]."""
        words = _row_words(self.n_vocab)
        rows = np.frombuffer(self._file.read(2 * n_rows * words), "<u2").reshape(n_rows, words)
        head = np.ascontiguousarray(rows[:, :_ROW_HEAD]).view("<f4")
        values = torch.from_numpy(rows[:, _ROW_HEAD : _ROW_HEAD + self.n_vocab].astype(np.float32))
        scale, minimum = torch.from_numpy(head[:, :1].copy()), torch.from_numpy(head[:, 1:].copy())
        return values.mul_(scale).add_(minimum)

    def __enter__(self) -> "Base":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def _row_words(n_vocab: int) -> int:
    """uint16 words of a row: two floats, and an even number of values."""
    return _ROW_HEAD + 2 * ((n_vocab + 1) // 2)
