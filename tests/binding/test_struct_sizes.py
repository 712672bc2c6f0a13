"""Structs of older and newer headers, as programs that were built with them give them: ksort.h promises to take both.

That every size is taken or refused is tested in C (tests/native/struct_sizes.c); here, what the taken ones mean.
"""

import numpy as np
import pytest
import torch
from native_calls import BINDING, FFI, HEAD_DIM, LIB, N_KV_HEADS, Calls

from ksort_gguf.binding.ffi import loaded

MANDATORY = {  # the last mandatory field of each struct that has others behind it
    "ksort_pack_args": "n_tokens",
    "ksort_attend_args": "scale",
    "ksort_transform": "rotate",
    "ksort_linear_args": "type",
    "ksort_rms_norm_args": "epsilon",
}


def resized(struct, n_bytes: int, rest: int = 0):
    """A copy of a struct (a pointer) that says it has `n_bytes`; what is behind those, or it, is all `rest`.

    Returns the pointer and the memory that it is good for.
    """
    kind = FFI.typeof(struct[0])
    memory = FFI.new("char[]", 8192)
    FFI.memmove(memory, bytes([rest]) * 8192, 8192)
    FFI.memmove(memory, FFI.buffer(struct)[:], min(n_bytes, FFI.sizeof(kind)))
    copy = FFI.cast(f"{kind.cname} *", memory)
    copy.struct_size = n_bytes
    return copy, memory


def old_size(struct) -> int:
    """sizeof of the struct in the oldest header: up to the last mandatory field, in whole pointers."""
    kind = FFI.typeof(struct[0])
    fields = dict(kind.fields)
    last = fields[MANDATORY[kind.cname]]
    return -(-(last.offset + FFI.sizeof(last.type)) // 8) * 8


def packed(calls: Calls, pack) -> bytes:
    """The tiles that both parts of ksort_pack leave."""
    calls.k_tiles[:] = 0
    for ith in range(2):
        assert LIB.ksort_pack(pack, ith, 2) == LIB.KSORT_OK
    return calls.k_tiles.tobytes()


def attended(calls: Calls, attend) -> bytes:
    """The output of both parts of attend and merge."""
    calls.out[:] = 0
    for call in (LIB.ksort_attend, LIB.ksort_attend_merge):
        for ith in range(2):
            assert call(attend, ith, 2) == LIB.KSORT_OK
    return calls.out.tobytes()


def filled() -> Calls:
    """Calls over a cache whose first slots are packed."""
    calls = Calls()
    calls.v_cache.pack(np.random.default_rng(5).standard_normal((5, N_KV_HEADS, HEAD_DIM)), 0)
    for first_slot in (0, 2, 3):
        calls.pack.first_slot = first_slot
        assert LIB.ksort_pack(calls.pack, 0, 1) == LIB.KSORT_OK
    return calls


def test_an_old_pack_has_no_rope_and_no_transform():
    """Catches fields behind a short struct's end that are read: here they are no pointers at all."""
    calls = Calls()
    old, memory = resized(calls.pack, old_size(calls.pack), rest=0xFF)
    short = packed(calls, old)
    whole = packed(calls, calls.pack)
    calls.pack.rope = calls.pack.transform = FFI.NULL
    assert short == packed(calls, calls.pack) != whole
    assert len(memory)


def test_an_old_attend_has_no_window_rope_or_transforms():
    """Catches a window made of what follows a short struct in memory."""
    calls = filled()
    calls.attend.window = 1
    old, memory = resized(calls.attend, old_size(calls.attend), rest=0xFF)
    short, whole = attended(calls, old), attended(calls, calls.attend)
    calls.attend.window, calls.attend.rope, calls.attend.k_transform = 0, FFI.NULL, FFI.NULL
    assert short == attended(calls, calls.attend) != whole
    assert len(memory)


def test_an_old_transform_only_rotates():
    """Catches tables read behind a short struct."""
    calls = Calls()
    old, memory = resized(calls.transform, old_size(calls.transform), rest=0xFF)
    calls.pack.transform = old
    short = packed(calls, calls.pack)
    only_rotates = BINDING.new("ksort_transform")
    only_rotates.rotate = 1
    calls.pack.transform = only_rotates
    assert short == packed(calls, calls.pack)
    assert len(memory)


def test_old_linear_and_norm():
    """Catches a bias, or rows to add, made of what follows a short struct (heads shares epsilon's eight bytes)."""
    run = loaded("ksort_run")
    weights, bias, x = torch.randn(3, 8), torch.randn(3), torch.randn(2, 8)
    y = torch.zeros(2, 3)
    linear = run.new("ksort_linear_args")
    linear.weights, linear.bias = run.array("void *", weights), run.array("float *", bias)
    linear.x, linear.y = run.array("float *", x), run.array("float *", y)
    linear.x_row_stride, linear.y_row_stride, linear.n_out, linear.n_in, linear.n_rows = 8, 3, 3, 8, 2
    old, memory = resized(linear, old_size(linear), rest=0xFF)
    assert run.lib.ksort_linear(old, 0, 1) == LIB.KSORT_OK
    assert torch.allclose(y, x @ weights.T, atol=1e-5)
    gain, added, y = torch.ones(4), torch.ones(2, 8), torch.zeros(2, 8)
    norm = run.new("ksort_rms_norm_args")
    norm.x, norm.gain, norm.y, norm.added = (run.array("float *", t) for t in (x, gain, y, added))
    norm.x_row_stride = norm.y_row_stride = norm.added_row_stride = 8
    norm.n, norm.n_rows, norm.heads, norm.added_scale = 4, 2, 2, 5
    before = x.clone()
    old, memory = resized(norm, old_size(norm), rest=0xFF)
    assert run.lib.ksort_rms_norm(old, 0, 1) == LIB.KSORT_OK
    assert torch.equal(x, before)
    assert torch.allclose(y, torch.nn.functional.rms_norm(x.view(2, 2, 4), (4,), eps=0.0).view(2, 8), rtol=1e-5)
    norm.heads, norm.added_scale = 0, 0  # both count as 1
    assert run.lib.ksort_rms_norm(norm, 0, 1) == LIB.KSORT_OK
    assert torch.equal(x[:, :4], before[:, :4] + 1) and torch.equal(x[:, 4:], before[:, 4:])
    assert len(memory)


@pytest.mark.parametrize("name", ["pack", "attend", "k", "rope", "transform"])
def test_newer_structs(name):
    """Catches longer structs refused although nothing new is asked for, or taken although something is."""
    calls = filled()
    outputs = []
    for extra in (0, 8, 64):
        struct = getattr(calls, name)
        new, memory = resized(struct, FFI.sizeof(FFI.typeof(struct[0])) + extra)
        parts = {"pack": calls.pack, "attend": calls.attend, name: new}
        for args in (calls.pack, calls.attend):
            for field in {"k": ("cache", "k"), "transform": ("transform", "k_transform")}.get(name, (name,)):
                if field in dict(FFI.typeof(args[0]).fields):
                    setattr(args, field, new)
        outputs.append(packed(calls, parts["pack"]) + attended(calls, parts["attend"]))
        if extra:
            FFI.buffer(memory)[FFI.sizeof(FFI.typeof(struct[0])) + extra - 1] = b"\1"  # asks for what is not known
            assert LIB.ksort_pack(parts["pack"], 0, 1) == LIB.KSORT_ERR_STRUCT_SIZE or name == "attend"
            assert LIB.ksort_attend(parts["attend"], 0, 1) == LIB.KSORT_ERR_STRUCT_SIZE or name == "pack"
    assert len(set(outputs)) == 1


def test_every_struct_of_the_binding_says_its_size():
    """Catches a struct that a header declares and Binding.new cannot make, or whose size is not its first field."""
    structs = [name for name in FFI.list_types()[0] if name.startswith("ksort_") and FFI.typeof(name).kind == "struct"]
    sized = [name for name in structs if name != "ksort_pool"]
    assert set(MANDATORY) < set(sized)
    for name in sized:
        assert FFI.typeof(name).fields[0][0] == "struct_size", name
        assert BINDING.new(name).struct_size == FFI.sizeof(name)
    assert np.dtype(np.uintp).itemsize == FFI.sizeof("size_t")
