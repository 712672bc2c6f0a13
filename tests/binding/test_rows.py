"""FloatRows: the one view of rows that crosses into the libraries."""

import numpy as np
import pytest
import torch

from ksort_gguf.binding.rows import FloatRows, address_of, type_name


@pytest.mark.parametrize("make", [np.zeros, torch.zeros], ids=["numpy", "torch"])
def test_shape_and_stride(make):
    """Catches strides in bytes, or those of a copy: NumPy counts bytes and torch elements."""
    array = make((5, 12))
    array = array.astype(np.float32) if isinstance(array, np.ndarray) else array
    rows = FloatRows(array[:, 2:8])
    assert (rows.n_rows, rows.width, rows.stride, rows.type_name) == (5, 6, 12, "f32")
    assert rows.address == address_of(array) + 2 * 4
    part = rows.columns(1, 4)
    assert (part.n_rows, part.width, part.stride, part.address) == (5, 3, 12, rows.address + 4)
    first = rows.first(2)
    assert (first.n_rows, first.width, first.stride, first.address) == (2, 6, 12, rows.address)


@pytest.mark.parametrize("make", [np.ones, torch.ones], ids=["numpy", "torch"])
def test_numpy_is_the_same_memory(make):
    """Catches a copy, into which an attention of one's own would write in vain."""
    array = make((2, 4))
    array = array.astype(np.float32) if isinstance(array, np.ndarray) else array
    FloatRows(array).numpy()[1, 2] = 9
    assert array[1, 2] == 9


def test_one_row_has_a_stride_of_at_least_its_width():
    """Catches the stride of a single row, which torch and NumPy leave open: the library refuses one below the width."""
    assert FloatRows(torch.zeros(1, 8)).stride == 8
    assert FloatRows(np.zeros((4, 8), np.float32)[:1, :3]).stride >= 3
    assert FloatRows(torch.zeros(8).as_strided((1, 8), (1, 1))).stride == 8


@pytest.mark.parametrize(
    "array", [np.zeros(4, np.float32), np.zeros((2, 2, 2), np.float32), np.zeros((4, 6), np.float32)[:, ::2],
              torch.zeros(4, 6).t(), torch.zeros(4, 6)[:, ::2]],
)  # fmt: skip
def test_what_is_no_rows_is_refused(array):
    """Catches rows read across their gaps: C sees an address and one stride."""
    with pytest.raises(ValueError, match=r"2-D|contiguous"):
        FloatRows(array)


def test_types():
    """Catches double precision taken for a type of the cache: its bytes would be read as two floats."""
    names = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
    assert {dtype: FloatRows(torch.zeros(1, 2, dtype=dtype)).type_name for dtype in names} == names
    assert type_name(np.zeros(1, np.float16)) == "f16"
    for array in (np.zeros((1, 1)), torch.zeros((1, 1), dtype=torch.int32)):
        with pytest.raises(KeyError):
            type_name(array)


def test_rows_keep_their_memory():
    """Catches an address whose array Python has freed."""
    rows = FloatRows(np.full((2, 3), 5, np.float32))
    assert (rows.numpy() == 5).all() and rows.array is rows.numpy()
