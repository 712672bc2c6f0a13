"""Reading GGUF files: what other readers find, and one line for files that are cut off or of another time."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoint_support import LLAMA, random_weights, write_checkpoint

from ksort_gguf.errors import KsortError
from ksort_gguf.models.gguf_source import open_gguf
from ksort_gguf.plan.convert import convert


@pytest.fixture
def stock_gguf(tmp_path: Path, rng) -> Path:
    directory = write_checkpoint(tmp_path / "llama", LLAMA, random_weights(rng))
    return convert(directory, tmp_path / "stock.gguf", plan="none", outtype="f32", block_size=16).path


def test_gguf_package_reads_the_same(stock_gguf: Path):
    """Catches headers that only our own reader understands, and tensors read from the wrong offset."""
    theirs = gguf.GGUFReader(stock_gguf)
    with open_gguf(stock_gguf) as ours:
        assert [t.name for t in theirs.tensors] == list(ours.tensors)
        for tensor in theirs.tensors:
            assert np.array_equal(ours.tensors[tensor.name].read_f32().ravel(), tensor.data.ravel())
        for key, value in ours.metadata.items():
            assert theirs.fields[key].contents() == value


def test_chunks_are_the_tensor(stock_gguf: Path, monkeypatch):
    """Catches chunked copies that skip or repeat rows at the seams."""
    with open_gguf(stock_gguf) as source:
        tensor = source.tensors["token_embd.weight"]
        monkeypatch.setattr("ksort_gguf.container.tensors.CHUNK_BYTES", 13 * tensor.row_bytes)
        chunks = list(tensor.chunks())
        assert [chunk.nbytes // tensor.row_bytes for chunk in chunks] == [13, 13, 13, 1]
        assert np.array_equal(np.concatenate(chunks), tensor.read())


@pytest.mark.parametrize("keep", [3, 40, 5000, -1])
def test_truncated_gguf_is_one_line(stock_gguf: Path, tmp_path: Path, keep: int):
    """Catches struct errors or short reads where a download was cut off, in the header or in a tensor."""
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(stock_gguf.read_bytes()[:keep])
    with pytest.raises(KsortError, match=r"^[^\n]*cut\.gguf[^\n]*$"):
        open_gguf(cut)


def test_newer_gguf_version_names_both_numbers(stock_gguf: Path):
    """Catches a reader that goes on parsing a layout it does not know."""
    data = bytearray(stock_gguf.read_bytes())
    struct.pack_into("<I", data, 4, 4)
    stock_gguf.write_bytes(data)
    with pytest.raises(KsortError, match=r"version 4 .* 3"):
        open_gguf(stock_gguf)


def test_unknown_tensor_type_names_the_tensor(stock_gguf: Path):
    """Catches a bare ValueError for weight types from the future."""
    data = bytearray(stock_gguf.read_bytes())
    name = b"token_embd.weight"
    struct.pack_into("<I", data, data.index(name) + len(name) + 4 + 2 * 8, 9999)
    stock_gguf.write_bytes(data)
    with pytest.raises(KsortError, match=r"token_embd\.weight has type 9999"):
        open_gguf(stock_gguf)
