/* Statuses of libksort_cuda: those of arguments, which are returned, and those that kernels report. */
#include <cstddef>

#include "cuda_reference.h"

namespace {

/* Valid arguments of both calls; pointers to device memory are only looked at, never followed. */
struct calls {
    calls() {
        size_t tile = 0;
        CHECK_OK(ksort_tile_bytes(&k.format, &tile));
        k.head_stride = v.head_stride = tile, k.tile_stride = v.tile_stride = tile * 2;
        k.page_stride = v.page_stride = tile * 4;
        pack.k_transform = attend.k_transform = pack.v_transform = attend.v_transform = &transform;
    }

    void *memory = reinterpret_cast<void *>(0x10000);
    const int32_t *integers = static_cast<const int32_t *>(memory);
    const uint16_t *shorts = static_cast<const uint16_t *>(memory);
    const float *floats = static_cast<const float *>(memory);
    ksort_cuda_tokens tokens = {sizeof tokens, integers, integers, 3, 4, 1000, static_cast<int32_t *>(memory)};
    ksort_cuda_cache k = {sizeof k, {sizeof k.format, KSORT_BFP12, 64, 32}, memory, 0, 0, 0, integers, 5, 2, 3, 2};
    ksort_cuda_cache v = k;
    ksort_cuda_exact exact = {sizeof exact, memory, 49152, 16384, 8192, 2, 64, 4, integers};
    ksort_rope rope = {sizeof rope, 32, shorts, static_cast<const int8_t *>(memory), shorts, floats, floats};
    ksort_transform transform = {sizeof transform, 1, floats, floats, floats, shorts};
    ksort_cuda_pack_args pack = {sizeof pack, &tokens, &k, &v, memory, memory, 128, 512, KSORT_F16, &rope};
    ksort_cuda_attend_args attend = {sizeof attend, &tokens, &k, &v, memory, memory, 512, 2048, 512, 2048,
                                     KSORT_F16, 8, 0, 640, 0.125f, memory, SIZE_MAX, &rope};
};

/* What a call returns after a change of valid arguments. */
template <typename F>
ksort_status pack_status(F change) {
    calls c;
    change(c);
    return ksort_cuda_pack(&c.pack, nullptr);
}

template <typename F>
ksort_status attend_status(F change) {
    calls c;
    change(c);
    size_t bytes = 0;
    ksort_status status = ksort_cuda_attend(&c.attend, nullptr);
    ksort_status of_bytes = ksort_cuda_attend_workspace_bytes(&c.attend, &bytes);
    CHECK(of_bytes == status || of_bytes == KSORT_OK); /* sizing looks at all but data */
    return status;
}

template <typename F>
void both(F change, ksort_status expected) {
    CHECK(pack_status(change) == expected);
    CHECK(attend_status(change) == expected);
}

/* What sizing a workspace says, which needs no device, after a change of valid arguments. */
template <typename F>
ksort_status sizing_status(F change) {
    calls c;
    change(c);
    size_t bytes = 0;
    return ksort_cuda_attend_workspace_bytes(&c.attend, &bytes);
}

/* Fields beyond a struct's size are not looked at. */
void check_shorter_structs() {
    CHECK_OK(sizing_status([](calls &c) { c.attend.struct_size = offsetof(ksort_cuda_attend_args, rope), c.rope = {}; }));
    CHECK_OK(sizing_status([](calls &c) { c.transform.struct_size = offsetof(ksort_transform, permutation); }));
    both([](calls &c) { c.pack.struct_size = c.attend.struct_size = 64; }, KSORT_ERR_STRUCT_SIZE);
    both([](calls &c) { c.k.struct_size -= 16; }, KSORT_ERR_STRUCT_SIZE);
    CHECK_OK(sizing_status([](calls &c) { c.k.struct_size = offsetof(ksort_cuda_cache, exact), c.k.exact = &c.exact; }));
    both([](calls &c) { c.tokens.struct_size -= 8; }, KSORT_ERR_STRUCT_SIZE);
    both([](calls &c) { c.rope.struct_size -= 8; }, KSORT_ERR_STRUCT_SIZE);
}

/* Fields that the library does not know are 0. */
void check_longer_structs() {
    struct {
        ksort_cuda_tokens known;
        uint64_t unknown = 0;
    } tokens;
    const auto lengthen = [&](calls &c) {
        tokens.known = c.tokens;
        tokens.known.struct_size = sizeof tokens;
        c.pack.tokens = c.attend.tokens = &tokens.known;
    };
    CHECK_OK(sizing_status(lengthen));
    tokens.unknown = uint64_t(1) << 63;
    both(lengthen, KSORT_ERR_STRUCT_SIZE);
    both([](calls &c) { c.tokens.struct_size = SIZE_MAX / 8 * 8; }, KSORT_ERR_STRUCT_SIZE);
}

/* Strides wide enough for tiles of any type. */
void spread(ksort_cuda_cache *cache) {
    cache->head_stride = 1 << 17, cache->tile_stride = 1 << 20, cache->page_stride = 1 << 23;
}

void check_shared_arguments() {
    both([](calls &c) { c.pack.struct_size--, c.attend.struct_size--; }, KSORT_ERR_STRUCT_SIZE);
    both([](calls &c) { c.k.struct_size = 0; }, KSORT_ERR_STRUCT_SIZE);
    both([](calls &c) { c.v.format.struct_size = 0; }, KSORT_ERR_STRUCT_SIZE);
    both([](calls &c) { c.tokens.struct_size = 0; }, KSORT_ERR_STRUCT_SIZE);
    both([](calls &c) { c.rope.struct_size = 0; }, KSORT_ERR_STRUCT_SIZE);
    both([](calls &c) { c.transform.struct_size = 0; }, KSORT_ERR_STRUCT_SIZE);
    both([](calls &c) { c.k.format.type = KSORT_F16; }, KSORT_ERR_TYPE);
    both([](calls &c) { c.k.format.type = KSORT_SBFP11 + 1; }, KSORT_ERR_TYPE);
    both([](calls &c) { c.v.format.type = KSORT_BFP14; }, KSORT_ERR_TYPE);
    both([](calls &c) { c.v.format.type = KSORT_F32; }, KSORT_ERR_TYPE);
    both([](calls &c) { c.v.format.type = KSORT_F16, spread(&c.v); }, KSORT_ERR_TYPE); /* a transform of float values */
    both([](calls &c) { c.pack.x_type = c.attend.x_type = KSORT_BFP16; }, KSORT_ERR_TYPE);
    both([](calls &c) { c.k.format.head_dim = 72; }, KSORT_ERR_HEAD_DIM);
    both([](calls &c) { c.k.format.head_dim = 512; }, KSORT_ERR_HEAD_DIM);
    both([](calls &c) { c.v.format.head_dim = 80, spread(&c.v); }, KSORT_ERR_HEAD_DIM);
    both([](calls &c) { c.k.format.block_size = 48; }, KSORT_ERR_BLOCK_SIZE);
    both([](calls &c) { c.v.format.block_size = 128; }, KSORT_ERR_BLOCK_SIZE);
    both([](calls &c) { c.v.n_kv_heads = 1; }, KSORT_ERR_HEADS);
    both([](calls &c) { c.transform.rotate = 2; }, KSORT_ERR_TRANSFORM);
}

void check_shared_memory() {
    both([](calls &c) { c.k.base = nullptr; }, KSORT_ERR_ARGUMENT);
    both([](calls &c) { c.k.base = static_cast<uint8_t *>(c.memory) + 32; }, KSORT_ERR_ALIGNMENT);
    both([](calls &c) { c.k.tile_stride += 32; }, KSORT_ERR_ALIGNMENT);
    both([](calls &c) { c.v.head_stride += 16; }, KSORT_ERR_ALIGNMENT);
    both([](calls &c) { c.v.page_stride += 8; }, KSORT_ERR_ALIGNMENT);
    both([](calls &c) { c.k.head_stride -= 64; }, KSORT_ERR_ARGUMENT); /* overlapping tiles; the two below too */
    both([](calls &c) { c.k.tile_stride -= 64; }, KSORT_ERR_ARGUMENT);
    both([](calls &c) { c.k.page_stride -= 64; }, KSORT_ERR_ARGUMENT);
    both([](calls &c) { c.k.page_stride = SIZE_MAX / 2 / 64 * 64; }, KSORT_ERR_ARGUMENT);
    both([](calls &c) { c.k.n_kv_heads = 0; }, KSORT_ERR_ARGUMENT);
    both([](calls &c) { c.k.n_kv_heads = 65536; }, KSORT_ERR_ARGUMENT);
    both([](calls &c) { c.v.n_contexts = 0; }, KSORT_ERR_ARGUMENT);
    both([](calls &c) { c.v.n_contexts = 4; }, KSORT_ERR_ARGUMENT);
    both([](calls &c) { c.k.context_pages = 0; }, KSORT_ERR_ARGUMENT);
    both([](calls &c) { c.k.context_pages = 1u << 30; }, KSORT_ERR_ARGUMENT);
    both([](calls &c) { c.k.page_tiles = 0; }, KSORT_ERR_ARGUMENT);
    both([](calls &c) { c.pack.tokens = c.attend.tokens = nullptr; }, KSORT_ERR_ARGUMENT);
    both([](calls &c) { c.tokens.n_cached = nullptr; }, KSORT_ERR_ARGUMENT);
    both([](calls &c) { c.tokens.device_status = nullptr; }, KSORT_ERR_ARGUMENT);
    both([](calls &c) { c.tokens.n_tokens = 0; }, KSORT_ERR_ARGUMENT);
    both([](calls &c) { c.tokens.n_contexts = 2; }, KSORT_ERR_ARGUMENT);
    both([](calls &c) { c.tokens.n_positions = 0; }, KSORT_ERR_ARGUMENT);
    both([](calls &c) { c.rope.n_frequencies = 0; }, KSORT_ERR_ARGUMENT);
    both([](calls &c) { c.rope.sin = nullptr; }, KSORT_ERR_ARGUMENT);
}

/* Valid exact rows beside keys and values, and a change of them. */
template <typename F>
void both_with_exact(F change, ksort_status expected) {
    both(
        [=](calls &c) {
            c.k.exact = c.v.exact = &c.exact;
            change(c);
        },
        expected);
}

void check_exact() {
    CHECK_OK(sizing_status([](calls &c) { c.k.exact = c.v.exact = &c.exact; }));
    both_with_exact([](calls &c) { c.exact.struct_size -= 8; }, KSORT_ERR_STRUCT_SIZE);
    both_with_exact([](calls &c) { c.exact.base = nullptr; }, KSORT_ERR_ARGUMENT);
    both_with_exact([](calls &c) { c.exact.begin = nullptr; }, KSORT_ERR_ARGUMENT);
    both_with_exact([](calls &c) { c.exact.base = static_cast<uint8_t *>(c.memory) + 32; }, KSORT_ERR_ALIGNMENT);
    both_with_exact([](calls &c) { c.exact.tile_stride += 32; }, KSORT_ERR_ALIGNMENT);
    both_with_exact([](calls &c) { c.exact.head_stride -= 64; }, KSORT_ERR_ARGUMENT); /* overlapping */
    both_with_exact([](calls &c) { c.exact.context_stride -= 64; }, KSORT_ERR_ARGUMENT);
    both_with_exact([](calls &c) { c.exact.n_tiles = 3; }, KSORT_ERR_ARGUMENT);
    both_with_exact([](calls &c) { c.exact.n_sinks = KSORT_TILE_TOKENS + 1; }, KSORT_ERR_ARGUMENT);
    both_with_exact([](calls &c) { c.v.format.type = KSORT_F16, spread(&c.v); }, KSORT_ERR_TYPE);
    const auto attend_with = [](auto change) {
        return attend_status([=](calls &c) {
            c.k.exact = c.v.exact = &c.exact;
            change(c);
        });
    };
    CHECK(attend_with([](calls &c) { c.k.exact = nullptr; }) == KSORT_ERR_ARGUMENT);
    CHECK(attend_with([](calls &c) { c.v.exact = nullptr; }) == KSORT_ERR_ARGUMENT);
    CHECK(attend_with([](calls &c) { c.exact.n_tail = 126; }) == KSORT_ERR_ARGUMENT); /* the ring is too short */
    const auto with_f16 = [](calls &c) {
        c.k.exact = &c.exact, c.attend.v_transform = nullptr;
        c.v.format.type = KSORT_F16, spread(&c.v);
    };
    CHECK_OK(sizing_status(with_f16));
    CHECK(attend_status([=](calls &c) {
              with_f16(c);
              c.v.format.type = KSORT_BF16;
          }) == KSORT_ERR_TYPE);
}

void check_pack_arguments() {
    CHECK(ksort_cuda_pack(nullptr, nullptr) == KSORT_ERR_ARGUMENT);
    CHECK(pack_status([](calls &c) { c.pack.k = c.pack.v = nullptr; }) == KSORT_ERR_ARGUMENT);
    CHECK(pack_status([](calls &c) { c.pack.k_x = nullptr; }) == KSORT_ERR_ARGUMENT);
    CHECK(pack_status([](calls &c) { c.pack.v_x = static_cast<uint8_t *>(c.memory) + 8; }) == KSORT_ERR_ALIGNMENT);
    CHECK(pack_status([](calls &c) { c.pack.token_stride += 4; }) == KSORT_ERR_ALIGNMENT);
    CHECK(pack_status([](calls &c) { c.pack.context_stride += 4; }) == KSORT_ERR_ALIGNMENT);
    CHECK(pack_status([](calls &c) { c.pack.token_stride -= 8; }) == KSORT_ERR_ARGUMENT);
    CHECK(pack_status([](calls &c) { c.pack.context_stride -= 8; }) == KSORT_ERR_ARGUMENT);
}

void check_attend_arguments() {
    size_t bytes = 0;
    calls valid;
    CHECK(ksort_cuda_attend(nullptr, nullptr) == KSORT_ERR_ARGUMENT);
    CHECK(ksort_cuda_attend_workspace_bytes(nullptr, &bytes) == KSORT_ERR_ARGUMENT);
    CHECK(ksort_cuda_attend_workspace_bytes(&valid.attend, nullptr) == KSORT_ERR_ARGUMENT);
    CHECK(attend_status([](calls &c) { c.attend.k = nullptr; }) == KSORT_ERR_ARGUMENT);
    CHECK(attend_status([](calls &c) { c.attend.v = nullptr; }) == KSORT_ERR_ARGUMENT);
    CHECK(attend_status([](calls &c) { c.attend.q = nullptr; }) == KSORT_ERR_ARGUMENT);
    CHECK(attend_status([](calls &c) { c.attend.out = static_cast<uint8_t *>(c.memory) + 8; }) == KSORT_ERR_ALIGNMENT);
    CHECK(attend_status([](calls &c) { c.attend.q_token_stride += 4; }) == KSORT_ERR_ALIGNMENT);
    CHECK(attend_status([](calls &c) { c.attend.out_context_stride += 4; }) == KSORT_ERR_ALIGNMENT);
    CHECK(attend_status([](calls &c) { c.attend.q_context_stride -= 8; }) == KSORT_ERR_ARGUMENT);
    CHECK(attend_status([](calls &c) { c.attend.out_token_stride -= 8; }) == KSORT_ERR_ARGUMENT);
    CHECK(attend_status([](calls &c) { c.attend.n_heads = 0; }) == KSORT_ERR_ARGUMENT);
    CHECK(attend_status([](calls &c) { c.attend.n_heads = 7; }) == KSORT_ERR_HEADS);
    CHECK(attend_status([](calls &c) { c.attend.max_slots = 0; }) == KSORT_ERR_ARGUMENT);
    CHECK(attend_status([](calls &c) { c.attend.max_slots = 641; }) == KSORT_ERR_ARGUMENT);
    CHECK(attend_status([](calls &c) { c.attend.scale = NAN; }) == KSORT_ERR_ARGUMENT);
    CHECK(attend_status([](calls &c) { c.attend.workspace = nullptr; }) == KSORT_ERR_ARGUMENT);
    CHECK(attend_status([](calls &c) { c.attend.workspace = static_cast<uint8_t *>(c.memory) + 64; }) ==
          KSORT_ERR_ALIGNMENT);
    CHECK_OK(ksort_cuda_attend_workspace_bytes(&valid.attend, &bytes)); /* a prompt's: needs no device */
    CHECK(attend_status([&](calls &c) { c.attend.workspace_bytes = bytes - 1; }) == KSORT_ERR_WORKSPACE);
}

} // namespace

void check_arguments() {
    CHECK(ksort_cuda_abi_version() == KSORT_CUDA_ABI_VERSION);
    check_shorter_structs();
    check_longer_structs();
    check_shared_arguments();
    check_shared_memory();
    check_exact();
    check_pack_arguments();
    check_attend_arguments();
}
