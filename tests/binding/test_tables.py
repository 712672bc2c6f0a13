"""Tables that calls read: RoPE tables and transforms that would be read out of bounds, or that describe none."""

import numpy as np
import pytest
from native_calls import FFI, HEAD_DIM, LIB, N_KV_HEADS, Calls

TRANSFORM_CALLS = ("pack", "attend", "merge")


@pytest.mark.parametrize(("table", "value"), [
    ("partner", HEAD_DIM), ("partner", 65535), ("partner", "itself"), ("sign", 2), ("sign", -128),
    ("frequency", 4), ("frequency", 65535),
])  # fmt: skip
def test_bad_rope_tables(table, value):
    """Catches a table entry that would read out of bounds, or turn a channel with one that is not its partner."""
    for call in ("pack", "attend"):
        calls = Calls()
        sign = np.frombuffer(FFI.buffer(calls.rope.sign, HEAD_DIM), np.int8)
        channel = int(np.flatnonzero(sign)[3])
        getattr(calls.rope, table)[channel] = channel if value == "itself" else value
        assert getattr(calls, f"run_{call}")() == LIB.KSORT_ERR_ROPE
        assert (calls.k_tiles == 0xA5).all()


@pytest.mark.parametrize("mutation", ["same signs", "one-sided", "partner not rotated"])
def test_partners_must_pair_up(mutation):
    """Catches tables whose entries are in range but do not describe rotations of pairs."""
    for call in ("pack", "attend"):
        calls = Calls()
        sign = np.frombuffer(FFI.buffer(calls.rope.sign, HEAD_DIM), np.int8)
        first, other = (int(c) for c in np.flatnonzero(sign)[:2])
        if mutation == "same signs":
            calls.rope.sign[calls.rope.partner[first]] = calls.rope.sign[first]
        elif mutation == "one-sided":
            calls.rope.partner[first] = next(
                int(c) for c in np.flatnonzero(sign) if c not in (first, calls.rope.partner[first])
            )
        else:
            calls.rope.sign[calls.rope.partner[other]] = 0
        assert getattr(calls, f"run_{call}")() == LIB.KSORT_ERR_ROPE


@pytest.mark.parametrize("place", [(0, 0), (N_KV_HEADS - 1, HEAD_DIM - 1)])
@pytest.mark.parametrize(("table", "value"), [
    ("shift", np.nan), ("shift", -np.inf), ("scale", 0), ("scale", -1), ("scale", np.nan), ("scale", np.inf),
])  # fmt: skip
def test_bad_transform_tables(table, value, place):
    """Catches a scale that makes queries infinite or swaps signs, in any channel; workspace_bytes reads no table."""
    for call in TRANSFORM_CALLS:
        calls = Calls()
        getattr(calls.tables, table)[place] = value
        assert getattr(calls, f"run_{call}")() == LIB.KSORT_ERR_TRANSFORM
        assert calls.run_workspace_bytes() == LIB.KSORT_OK
        assert (calls.k_tiles == 0xA5).all()
        assert (calls.out == -7).all()


@pytest.mark.parametrize("value", [HEAD_DIM, 65535, "another place's"])
def test_bad_permutation(value):
    """Catches a channel read out of bounds, or stored twice while another is lost, in any head."""
    for call in TRANSFORM_CALLS:
        calls = Calls()
        calls.permutation[-1, -1] = calls.permutation[-1, 0] if value == "another place's" else value
        assert getattr(calls, f"run_{call}")() == LIB.KSORT_ERR_TRANSFORM
        assert (calls.k_tiles == 0xA5).all()
        assert (calls.out == -7).all()


@pytest.mark.parametrize("call", TRANSFORM_CALLS)
def test_transforms_are_for_bfp_types(call):
    """Catches float rows stored without the transform that attention then undoes; here values are f16."""
    calls = Calls()
    calls.pack.cache, calls.attend.v_transform = calls.v, calls.transform
    assert getattr(calls, f"run_{call}")() == LIB.KSORT_ERR_TYPE
    assert not calls.v_tiles.any()
    assert (calls.out == -7).all()


def test_feedback_is_not_checked():
    """Catches a check of a whole matrix in every call, and a crash where its entries are not numbers."""
    calls = Calls()
    calls.tables.feedback[:] = np.nan
    assert calls.run_pack() == LIB.KSORT_OK
    calls.transform.feedback = FFI.NULL
    assert calls.run_pack() == LIB.KSORT_OK
