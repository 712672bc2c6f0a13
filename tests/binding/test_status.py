"""Bad arguments: each status of ksort.h, from each call that can return it, and nothing written then."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from native_calls import BINDING, FFI, HEAD_DIM, LIB, N_HEADS, N_KV_HEADS, N_SLOTS, Calls

from ksort_gguf.binding import files, levels, status
from ksort_gguf.binding.ffi import loaded
from ksort_gguf.binding.run import Pool
from ksort_gguf.errors import CacheTypeError, KsortError, PlanError

RUN = loaded("ksort_run").lib
NATIVE = Path(__file__).parents[2] / "native"

# Each line: the struct and field to damage, its bad value, the status it is, and the calls that must return that.
CACHE_CALLS = ("pack", "attend", "merge", "workspace_bytes", "unpack")
FORMAT_CALLS = (*CACHE_CALLS, "tile_bytes")
MEMORY_CALLS = ("pack", "attend", "merge", "unpack")  # workspace_bytes looks at no pointer to data
ATTEND_CALLS = ("attend", "merge", "workspace_bytes")
TRANSFORM_CALLS = ("pack", "attend", "merge")
BAD_FIELDS = [
    ("k.format.struct_size", 3, "STRUCT_SIZE", FORMAT_CALLS),
    ("k.format.type", 8, "TYPE", FORMAT_CALLS),
    ("k.format.type", 2**32 - 1, "TYPE", FORMAT_CALLS),
    ("k.format.head_dim", 0, "HEAD_DIM", FORMAT_CALLS),
    ("k.format.head_dim", 31, "HEAD_DIM", FORMAT_CALLS),
    ("k.format.head_dim", 258, "HEAD_DIM", FORMAT_CALLS),
    ("k.format.head_dim", 2**32 - 2, "HEAD_DIM", FORMAT_CALLS),
    ("k.format.block_size", 0, "BLOCK_SIZE", FORMAT_CALLS),
    ("k.format.block_size", 7, "BLOCK_SIZE", FORMAT_CALLS),
    ("k.format.block_size", 64, "BLOCK_SIZE", FORMAT_CALLS),
    ("k.format.block_size", 256, "BLOCK_SIZE", FORMAT_CALLS),
    ("k.struct_size", 0, "STRUCT_SIZE", CACHE_CALLS),
    ("k.base", None, "ARGUMENT", MEMORY_CALLS),
    ("k.base", "misaligned", "ALIGNMENT", MEMORY_CALLS),
    ("k.tile_stride", 1000, "ALIGNMENT", CACHE_CALLS),
    ("k.head_stride", 1, "ALIGNMENT", CACHE_CALLS),
    ("k.n_kv_heads", 0, "ARGUMENT", CACHE_CALLS),
    ("k.tile_stride", 2**63, "ARGUMENT", CACHE_CALLS),
    ("k.tile_stride", 0, "ARGUMENT", CACHE_CALLS),
    ("k.head_stride", 64, "ARGUMENT", CACHE_CALLS),
    ("k.n_slots", 4, "ARGUMENT", CACHE_CALLS),
    ("k.n_slots", 0, "ARGUMENT", CACHE_CALLS),
    ("rope.struct_size", 1, "STRUCT_SIZE", ("pack", "attend")),
    ("rope.n_frequencies", 0, "ARGUMENT", ("pack", "attend")),
    ("rope.n_frequencies", 1, "ROPE", ("pack", "attend")),
    ("rope.partner", None, "ARGUMENT", ("pack", "attend")),
    ("rope.sign", None, "ARGUMENT", ("pack", "attend")),
    ("rope.frequency", None, "ARGUMENT", ("pack", "attend")),
    ("rope.cos", None, "ARGUMENT", ("pack", "attend")),
    ("rope.sin", None, "ARGUMENT", ("pack", "attend")),
    ("transform.struct_size", 4, "STRUCT_SIZE", TRANSFORM_CALLS),
    ("transform.rotate", 2, "TRANSFORM", TRANSFORM_CALLS),
    ("transform.rotate", 2**32 - 1, "TRANSFORM", TRANSFORM_CALLS),
    ("pack.struct_size", 8, "STRUCT_SIZE", ("pack",)),
    ("pack.cache", None, "ARGUMENT", ("pack",)),
    ("pack.x", None, "ARGUMENT", ("pack",)),
    ("pack.x_token_stride", N_KV_HEADS * HEAD_DIM - 1, "ARGUMENT", ("pack",)),
    ("pack.x_token_stride", 2**64 - 4, "ARGUMENT", ("pack",)),
    ("pack.x_token_stride", 2**62 - 1, "ARGUMENT", ("pack",)),
    ("pack.n_tokens", 0, "ARGUMENT", ("pack",)),
    ("pack.n_tokens", N_SLOTS - 2, "ARGUMENT", ("pack",)),
    ("pack.first_slot", N_SLOTS - 1, "ARGUMENT", ("pack",)),
    ("pack.first_slot", 2**64 - 1, "ARGUMENT", ("pack",)),
    ("attend.struct_size", 8, "STRUCT_SIZE", ATTEND_CALLS),
    ("attend.k", None, "ARGUMENT", ATTEND_CALLS),
    ("attend.v", None, "ARGUMENT", ATTEND_CALLS),
    ("attend.q", None, "ARGUMENT", ("attend",)),
    ("attend.out", None, "ARGUMENT", ("attend", "merge")),
    ("attend.q_token_stride", N_HEADS * HEAD_DIM - 1, "ARGUMENT", ("attend",)),
    ("attend.q_token_stride", 2**62 - 1, "ARGUMENT", ("attend",)),
    ("attend.out_token_stride", 2**64 - 4, "ARGUMENT", ("attend", "merge")),
    ("attend.out_token_stride", N_HEADS * HEAD_DIM - 1, "ARGUMENT", ("attend", "merge")),
    ("attend.n_queries", 0, "ARGUMENT", ATTEND_CALLS),
    ("attend.first_slot", N_SLOTS - 1, "ARGUMENT", ATTEND_CALLS),
    ("attend.first_slot", 2**64 - 1, "ARGUMENT", ATTEND_CALLS),
    ("attend.n_heads", 0, "ARGUMENT", ATTEND_CALLS),
    ("attend.n_heads", 3, "HEADS", ATTEND_CALLS),
    ("attend.query_type", 5, "TYPE", ATTEND_CALLS),
    ("attend.query_type", 1, "TYPE", ATTEND_CALLS),
    ("attend.scale", float("nan"), "ARGUMENT", ATTEND_CALLS),
    ("attend.workspace", None, "ARGUMENT", ("attend", "merge")),
    ("attend.workspace", "misaligned", "ALIGNMENT", ("attend", "merge")),
    ("attend.workspace_bytes", "one less", "WORKSPACE", ("attend", "merge")),
    ("v.format.type", 8, "TYPE", ATTEND_CALLS),
    ("v.format.head_dim", 30, "HEAD_DIM", ATTEND_CALLS),
    ("v.n_kv_heads", 1, "HEADS", ATTEND_CALLS),
    ("v.n_slots", 4, "ARGUMENT", ATTEND_CALLS),
]


def damage(calls: Calls, field: str, value) -> None:
    """Set a struct's field, written "struct.field", to a bad value."""
    struct, *inner, name = field.split(".")
    owner = getattr(calls, struct)
    for part in inner:
        owner = getattr(owner, part)
    if value is None:
        value = FFI.NULL
    elif value == "misaligned":
        value = FFI.cast("char *", getattr(owner, name)) + 16
    elif value == "one less":
        value = getattr(owner, name) - 1
    setattr(owner, name, value)


def test_valid_calls_succeed():
    """Catches a table of bad fields whose base case is already refused, which would prove nothing."""
    calls = Calls()
    for name in (*FORMAT_CALLS, "merge"):
        assert getattr(calls, f"run_{name}")() == LIB.KSORT_OK, name


@pytest.mark.parametrize(("field", "value", "error", "names"), BAD_FIELDS)
def test_bad_field(field, value, error, names):
    """Catches a missing check: the named status of each call, and neither cache nor output changed."""
    for name in names:
        calls = Calls()
        damage(calls, field, value)
        assert getattr(calls, f"run_{name}")() == getattr(LIB, f"KSORT_ERR_{error}"), name
        assert (calls.k_tiles == 0xA5).all(), name
        assert (calls.out == -7).all(), name


@pytest.mark.parametrize("call", ATTEND_CALLS)
def test_value_block_size(call):
    """Catches block sizes of BFP values that are not checked because keys have their own."""
    calls = Calls()
    calls.v.format.type, calls.v.format.block_size = LIB.KSORT_BFP16, 32
    assert getattr(calls, f"run_{call}")() == LIB.KSORT_OK
    for bad in (0, 24, 64):
        calls.v.format.block_size = bad
        assert getattr(calls, f"run_{call}")() == LIB.KSORT_ERR_BLOCK_SIZE


@pytest.mark.parametrize("call", ["ksort_pack", "ksort_attend", "ksort_attend_merge"])
def test_parts_out_of_range(call):
    """Catches parts that do not exist doing work."""
    calls = Calls()
    args = calls.pack if call == "ksort_pack" else calls.attend
    for ith, nth in ((0, 0), (2, 2), (2**32 - 1, 2)):
        assert getattr(LIB, call)(args, ith, nth) == LIB.KSORT_ERR_ARGUMENT


def test_null_arguments():
    """Catches a null pointer that is followed."""
    calls, null = Calls(), FFI.NULL
    n_bytes = FFI.new("size_t *")
    out = BINDING.array("float *", calls.out)
    for found in (
        LIB.ksort_pack(null, 0, 1),
        LIB.ksort_attend(null, 0, 1),
        LIB.ksort_attend_merge(null, 0, 1),
        LIB.ksort_attend_workspace_bytes(null, 1, n_bytes),
        LIB.ksort_attend_workspace_bytes(calls.attend, 1, null),
        LIB.ksort_attend_workspace_bytes(calls.attend, 0, n_bytes),
        LIB.ksort_unpack(null, 0, 1, out),
        LIB.ksort_unpack(calls.k, 0, 1, null),
        LIB.ksort_unpack(calls.k, 0, 0, out),
        LIB.ksort_unpack(calls.k, N_SLOTS, 1, out),
        LIB.ksort_unpack(calls.k, 2**64 - 1, 2, out),
        LIB.ksort_tile_bytes(null, n_bytes),
        LIB.ksort_tile_bytes(FFI.addressof(calls.k, "format"), null),
        RUN.ksort_pool_create(0, FFI.new("ksort_pool **")),
        RUN.ksort_pool_create(1, null),
        RUN.ksort_pool_step(null, calls.pack, null, null),
        RUN.ksort_linear(null, 0, 1),
        RUN.ksort_rms_norm(null, 0, 1),
        RUN.ksort_swiglu(null, 0, 1),
    ):
        assert found == LIB.KSORT_ERR_ARGUMENT
    RUN.ksort_pool_destroy(null)


def test_non_finite_query_leaves_out_alone(level):
    """Catches a part that answers its own rows although another part's query is NaN."""
    for bad in range(2 * N_HEADS):
        calls = Calls()
        assert LIB.ksort_pack(calls.pack, 0, 1) == LIB.KSORT_OK
        calls.x[bad // N_HEADS, bad % N_HEADS, -1] = np.nan
        for ith in range(2):
            assert LIB.ksort_attend(calls.attend, ith, 2) == LIB.KSORT_ERR_NON_FINITE
        assert (calls.out == -7).all()


def test_workspace_is_bounded():
    """Catches a workspace that grows with the prompt, which an embedder could not plan for."""
    calls, sizes = Calls(), []
    calls.k.n_slots = calls.v.n_slots = 2**20
    calls.attend.first_slot = 0
    for n_queries in (1, 64, 4096, 2**19):
        calls.attend.n_queries = n_queries
        n_bytes = FFI.new("size_t *")
        assert LIB.ksort_attend_workspace_bytes(calls.attend, 4, n_bytes) == LIB.KSORT_OK
        sizes.append(n_bytes[0])
    assert sizes[-1] == sizes[-2]


@pytest.mark.parametrize("n_queries", [1, 2])
@pytest.mark.parametrize("query_type", [LIB.KSORT_F32, LIB.KSORT_BFP16])
def test_workspace_contents_do_not_matter(level, n_queries, query_type):
    """Catches accumulators, states or query padding that are only right in zeroed memory."""
    outs = []
    for fill in (0, 0xFF):
        calls = Calls()
        calls.attend.n_queries, calls.attend.query_type = n_queries, query_type
        calls.k_tiles[..., :-192], calls.k_tiles[..., -192:] = 0x12, 127  # small mantissas, then exponents of 2^0
        calls.v_tiles[:] = 0x3C  # about 1
        calls.workspace[:] = fill
        for call in (LIB.ksort_attend, LIB.ksort_attend_merge):
            for ith in (1, 0):
                assert call(calls.attend, ith, 2) == LIB.KSORT_OK
        outs.append(calls.out)
    assert np.isfinite(outs[0]).all()
    assert outs[0].tobytes() == outs[1].tobytes()


def test_kernel_levels():
    """Catches an unknown level accepted, or the level in use lost by a refused choice."""
    before = levels.kernels()
    assert before in status.LEVELS
    assert LIB.ksort_select_kernels(b"sse9") == LIB.KSORT_ERR_KERNELS
    assert levels.kernels() == before
    levels.select_kernels("scalar")
    assert levels.kernels() == "scalar"
    levels.select_kernels(None)
    assert levels.kernels() == before


def test_every_status_has_its_text():
    """Catches a status added without a text, or two with the same."""
    texts = [FFI.string(LIB.ksort_status_text(code)) for code in range(15)]
    assert len(set(texts)) == 15
    assert FFI.string(LIB.ksort_status_text(15)) == b"unknown status"
    assert all(texts)


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
@pytest.mark.parametrize(
    ("name", "headers"),
    [("ksort", ["include/ksort.h", "core/step.h"]), ("ksort_run", ["run/ksort_run.h"])],  # step.h: for libksort_run
)
def test_only_the_abi_is_exported(name, headers):
    """Catches internal functions that leak from a library and clash with an embedder's."""
    listed = subprocess.run(
        ["nm", "-gPD", "--defined-only", files.library_path(name)], check=True, capture_output=True, text=True
    ).stdout
    exported = {line.split()[0] for line in listed.splitlines() if line.split()[1] in "TDBR"}
    declared = "".join((NATIVE / header).read_text() for header in headers)
    assert exported == set(re.findall(r"^\w.*?\b(ksort_\w+)\(", declared, flags=re.MULTILINE))


def test_errors_of_the_user_are_typed():
    """Catches a status that becomes a programming error although the user can act, or says no place."""
    messages = {name: status.user_error(name, " (layer 3)") for name in dir(LIB) if name.startswith("KSORT_ERR_")}
    kinds = {name.removeprefix("KSORT_ERR_"): type(error) for name, error in messages.items() if error is not None}
    assert kinds == {
        "NON_FINITE": KsortError, "RANGE": CacheTypeError, "TRANSFORM": PlanError, "THREADS": KsortError,
        "KERNELS": KsortError,
    }  # fmt: skip
    for name in ("NON_FINITE", "RANGE", "TRANSFORM"):
        assert "(layer 3)" in str(messages[f"KSORT_ERR_{name}"])
    with pytest.raises(ValueError, match=r"status 7\) here"):
        BINDING.check(LIB.KSORT_ERR_ALIGNMENT, " here")
    BINDING.check(LIB.KSORT_OK)


def test_many_threads_are_refused():
    """Catches a pool that takes the machine's memory for a count that cannot be meant."""
    with pytest.raises(ValueError, match="status"):
        Pool(65536)
    with pytest.raises(ValueError, match="status"):
        Pool(0)
