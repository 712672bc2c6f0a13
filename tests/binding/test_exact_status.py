"""Bad exact rows: the status of each, and nothing written then."""

import numpy as np
import pytest
from native_calls import FFI, HEAD_DIM, LIB, N_KV_HEADS, Calls

from ksort_gguf.binding import cpu, ffi

CALLS = ("pack", "attend", "merge", "workspace_bytes")
MEMORY_CALLS = ("pack", "attend", "merge")
ATTEND_CALLS = ("attend", "merge", "workspace_bytes")
BAD_FIELDS = [
    ("struct_size", 8, "STRUCT_SIZE", CALLS),
    ("base", None, "ARGUMENT", MEMORY_CALLS),
    ("base", "misaligned", "ALIGNMENT", MEMORY_CALLS),
    ("tile_stride", 1000, "ALIGNMENT", CALLS),
    ("head_stride", 32, "ALIGNMENT", CALLS),
    ("tile_stride", 0, "ARGUMENT", CALLS),
    ("tile_stride", 2**63, "ARGUMENT", CALLS),
    ("head_stride", 64, "ARGUMENT", CALLS),
    ("n_sinks", 65, "ARGUMENT", CALLS),
    ("n_sinks", 2**32 - 1, "ARGUMENT", CALLS),
    ("n_tiles", 0, "ARGUMENT", ATTEND_CALLS),  # a ring without room for the tail
]


class ExactCalls(Calls):
    """Calls on a K cache that has exact rows."""

    def __init__(self):
        super().__init__()
        self.memory = ffi.aligned_buffer(2 * N_KV_HEADS * 64 * HEAD_DIM * 2)
        self.memory[:] = 0xA5
        self.rows = cpu.ExactRows(HEAD_DIM, N_KV_HEADS, 63, 4, 1, self.memory)
        self.k.exact = self.rows.struct

    def run(self, name: str) -> int:
        return getattr(self, f"run_{name}")()


def test_valid_calls_succeed():
    """Catches a base case that is refused, which would prove nothing."""
    calls = ExactCalls()
    assert [calls.run(name) for name in CALLS] == [LIB.KSORT_OK] * len(CALLS)
    assert calls.run("unpack") == LIB.KSORT_OK
    assert (calls.memory != 0xA5).any()


@pytest.mark.parametrize(("field", "value", "error", "names"), BAD_FIELDS)
def test_bad_field(field, value, error, names):
    """Catches a bad field that is taken, another status, or bytes written all the same."""
    for name in names:
        calls = ExactCalls()
        if value is None:
            value = FFI.NULL
        elif isinstance(value, str):
            value = FFI.cast("char *", calls.rows.struct.base) + 16
        setattr(calls.rows.struct, field, value)
        assert calls.run(name) == getattr(LIB, f"KSORT_ERR_{error}"), name
        assert (calls.memory == 0xA5).all() and (calls.k_tiles == 0xA5).all() and (calls.out == -7).all()


def test_float_caches_have_none():
    """Catches exact rows beside f16, which would be read in the place of as many others."""
    calls = ExactCalls()
    calls.v.exact = calls.rows.struct
    assert [calls.run(name) for name in ATTEND_CALLS] == [LIB.KSORT_ERR_TYPE] * len(ATTEND_CALLS)
    calls.pack.cache, calls.pack.transform = calls.v, FFI.NULL
    assert calls.run("pack") == LIB.KSORT_ERR_TYPE


@pytest.mark.parametrize("field", ["n_tail", "n_sinks", "begin"])
def test_keys_and_values_are_cut_alike(field):
    """Catches a tile whose keys are read from one place and whose values from the other's."""
    calls = ExactCalls()
    v = cpu.PackedHeads("bfp12", HEAD_DIM, 16, N_KV_HEADS, 100)
    other = cpu.ExactRows(HEAD_DIM, N_KV_HEADS, 63, 4, 1)
    v.struct.exact, calls.attend.v = other.struct, v.struct
    assert calls.run("workspace_bytes") == LIB.KSORT_OK
    setattr(other.struct, field, getattr(other.struct, field) + 1)
    assert [calls.run(name) for name in ATTEND_CALLS] == [LIB.KSORT_ERR_ARGUMENT] * len(ATTEND_CALLS)


@pytest.mark.parametrize("has_transform", [False, True])
def test_beyond_f16_is_a_range_error(level, has_transform):
    """Catches a row of infinity, and packed tiles written beside it; the limit itself is stored."""
    calls = ExactCalls()
    calls.pack.rope = FFI.NULL
    if not has_transform:
        calls.pack.transform = FFI.NULL
    calls.transform.shift = calls.transform.scale = FFI.NULL
    calls.transform.rotate = 0
    for value, status in ((65504.0, LIB.KSORT_OK), (65505.0, LIB.KSORT_ERR_RANGE), (1e30, LIB.KSORT_ERR_RANGE)):
        calls.memory[:], calls.k_tiles[:] = 0xA5, 0xA5
        calls.x[1, 1, 5] = -value
        assert calls.run_pack() == status
        assert (calls.memory == 0xA5).all() == (calls.k_tiles == 0xA5).all() == (status != LIB.KSORT_OK)
    calls.x[1, 1, 5] = np.nan
    assert calls.run_pack() == LIB.KSORT_ERR_NON_FINITE
