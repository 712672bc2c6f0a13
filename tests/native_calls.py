"""Valid structs for every call of libksort, for tests that damage one field at a time."""

import numpy as np
from native_support import new_cache, random_transform, rope_for

from ksort_gguf.binding import ffi, structs

BINDING = ffi.loaded()
FFI, LIB = BINDING.ffi, BINDING.lib
N_HEADS, N_KV_HEADS, HEAD_DIM, N_SLOTS = 4, 2, 36, 100  # 36: padded words, 3 blocks of 16


class Calls:
    """Valid structs for every call, to be damaged one field at a time. All output bytes start as 0xA5."""

    def __init__(self):
        rng = np.random.default_rng(1)
        self.k_cache, self.k_tiles = new_cache("bfp12", HEAD_DIM, 16, N_KV_HEADS, N_SLOTS, fill=0xA5)
        self.v_cache, self.v_tiles = new_cache("f16", HEAD_DIM, 16, N_KV_HEADS, N_SLOTS)
        self.k, self.v = self.k_cache.struct, self.v_cache.struct
        _, rope = rope_for(rng, N_KV_HEADS, HEAD_DIM, 8, "half", 2)
        self.rope_arrays = structs.Rope(BINDING, rope["rope"], (N_KV_HEADS, HEAD_DIM))
        self.rope = self.rope_arrays.with_positions(rope["cos"], rope["sin"], 2).pointer
        self.tables = random_transform(rng, N_KV_HEADS, HEAD_DIM)
        self.transform = BINDING.new("ksort_transform")
        self.transform.rotate = 1
        for name in ("shift", "scale", "feedback"):
            setattr(self.transform, name, BINDING.array("float *", getattr(self.tables, name)))
        self.permutation = self.tables.permutation.astype(np.uint16)
        self.transform.permutation = BINDING.array("uint16_t *", self.permutation)
        self.x = rng.standard_normal((2, N_HEADS, HEAD_DIM)).astype(np.float32)
        self.out = np.full((2, N_HEADS, HEAD_DIM), -7, np.float32)
        self.pack = BINDING.new("ksort_pack_args")
        self.pack.cache, self.pack.rope, self.pack.x = self.k, self.rope, BINDING.array("float *", self.x)
        self.pack.transform = self.transform
        self.pack.x_token_stride, self.pack.first_slot, self.pack.n_tokens = N_HEADS * HEAD_DIM, 3, 2
        self.attend = attend = BINDING.new("ksort_attend_args")
        attend.k, attend.v, attend.rope = self.k, self.v, self.rope
        attend.k_transform = self.transform
        attend.q, attend.out = BINDING.array("float *", self.x), BINDING.array("float *", self.out)
        attend.q_token_stride = attend.out_token_stride = N_HEADS * HEAD_DIM
        attend.first_slot, attend.n_queries, attend.n_heads, attend.scale = 3, 2, N_HEADS, 0.2
        attend.query_type = LIB.KSORT_BFP16
        n_bytes = FFI.new("size_t *")
        assert LIB.ksort_attend_workspace_bytes(attend, 2, n_bytes) == LIB.KSORT_OK
        self.workspace = ffi.aligned_buffer(n_bytes[0])
        attend.workspace, attend.workspace_bytes = BINDING.array("void *", self.workspace), n_bytes[0]

    def run_pack(self) -> int:
        return LIB.ksort_pack(self.pack, 1, 2)

    def run_attend(self) -> int:
        return LIB.ksort_attend(self.attend, 1, 2)

    def run_merge(self) -> int:
        return LIB.ksort_attend_merge(self.attend, 1, 2)

    def run_workspace_bytes(self) -> int:
        return LIB.ksort_attend_workspace_bytes(self.attend, 2, FFI.new("size_t *"))

    def run_unpack(self) -> int:
        return LIB.ksort_unpack(self.k, 3, 2, BINDING.array("float *", self.out))

    def run_tile_bytes(self) -> int:
        return LIB.ksort_tile_bytes(FFI.addressof(self.k, "format"), FFI.new("size_t *"))
