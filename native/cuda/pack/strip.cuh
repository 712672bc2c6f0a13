/* What both ways of rounding see of a strip, and what they share in shared memory; pack/kernel.cuh draws the whole. */
#ifndef KSORT_CUDA_PACK_STRIP_CUH
#define KSORT_CUDA_PACK_STRIP_CUH

#include "common/encode.cuh"

constexpr int FEEDBACK_ROWS = 16;  /* that come through shared memory together: half a register's channels */
constexpr int FEEDBACK_STAGES = 3; /* such panels: one in use, two on their way */

/* Keys or values of a job. */
struct pack_side {
    device_cache cache;
    ksort_transform transform;
    const void *x;
    bool is_transformed;
    bool has_rope;
};

/* A pack_job as the kernel takes it: its sides, one or two, are chosen by number. */
struct pack_work {
    pack_side sides[2];
    uint32_t n_sides;
    uint32_t block_heads; /* nearest rounding: heads of a thread block */
    uint32_t n_kv_heads;
    ksort_cuda_tokens tokens;
    ksort_rope rope;
    size_t token_stride, context_stride; /* of x, elements */
    uint32_t x_type;
};

/* How a thread block holds the heads of a strip. */
template <int HEAD_DIM>
struct strip_shape {
    static constexpr int LANES = HEAD_DIM <= 64 ? 8 : HEAD_DIM <= 128 ? 16 : WARP; /* a token's share of threads */
    static constexpr int THREADS = STRIP_TOKENS * LANES;
    static constexpr int TOKENS_A_WARP = WARP / LANES;
    static constexpr int REGISTERS = CHANNELS_A_LANE<HEAD_DIM>; /* of a lane for a token of the warp's */
    static constexpr int PADDED_DIM = REGISTERS * WARP;
    static constexpr int QUAD_STRIDE = HEAD_DIM / 4 + 2; /* half is odd: 16 tokens' pairs fill all banks */
    static constexpr int FLOATS_A_ROW = HEAD_DIM + 4;    /* tokens begin in different banks, at 16 bytes */
};

/* Of transformed heads. */
template <int HEAD_DIM>
struct pack_smem {
    alignas(16) float rows[STRIP_TOKENS][strip_shape<HEAD_DIM>::FLOATS_A_ROW]; /* heads on their way to other lanes */
    alignas(16) uint32_t quads[STRIP_TOKENS][strip_shape<HEAD_DIM>::QUAD_STRIDE];
    uint8_t exponents[MAX_BLOCKS][STRIP_TOKENS];
    bool is_stored[STRIP_TOKENS];
    float feedback[FEEDBACK_STAGES][FEEDBACK_ROWS][strip_shape<HEAD_DIM>::PADDED_DIM];
};

/* A thread block's strip. */
struct strip_place {
    uint8_t *tile;
    uint32_t first_token; /* in the tile: 0, 16, 32 or 48 */
    uint32_t first_slot;
    uint32_t context;
    uint32_t kv_head;
    uint32_t first_new; /* slots first_new .. end_new - 1 of the context are new */
    uint32_t end_new;

    __device__ bool is_new(uint32_t s) const { return first_slot + s >= first_new && first_slot + s < end_new; }
};

/* Finds the index-th strip of the context's new slots. False where none of its slots are new, or (reported) it is
 * beyond the cache. */
__device__ inline bool find_strip(const pack_work &work, const pack_side &side, uint32_t index, uint32_t kv_head,
                                  strip_place &strip)
{
    strip.context = blockIdx.z;
    strip.kv_head = kv_head;
    strip.first_new = (uint32_t)work.tokens.n_cached[strip.context];
    strip.end_new = strip.first_new + n_new_of(work.tokens, strip.context);
    strip.first_slot = (strip.first_new / STRIP_TOKENS + index) * STRIP_TOKENS;
    if (strip.first_slot >= strip.end_new || strip.first_new == strip.end_new)
        return false;
    if (strip.first_slot >= n_slots(side.cache.pages)) {
        if (threadIdx.x == 0)
            report(work.tokens, KSORT_ERR_ARGUMENT);
        return false;
    }
    strip.first_token = strip.first_slot % KSORT_TILE_TOKENS;
    strip.tile = tile_at(side.cache.pages, strip.context, strip.first_slot / KSORT_TILE_TOKENS, strip.kv_head);
    return true;
}

/* Whether the strip's token s is to be packed; positions without RoPE rows are reported. */
__device__ inline bool is_wanted(const pack_work &work, const strip_place &strip, uint32_t s)
{
    if (!strip.is_new(s))
        return false;
    if (!work.rope.partner || strip.first_slot + s < work.tokens.n_positions)
        return true;
    report(work.tokens, KSORT_ERR_ROPE);
    return false;
}

/* Element of x where a head of the strip's token s begins. */
template <int HEAD_DIM>
__device__ inline size_t head_at(const pack_work &work, const strip_place &strip, uint32_t kv_head, uint32_t s)
{
    const uint32_t token = strip.first_slot + s - strip.first_new;
    return strip.context * work.context_stride + token * work.token_stride + (size_t)kv_head * HEAD_DIM;
}

/* The largest magnitude, as float bits, that may be stored: ksort_pack's rule. */
__device__ inline uint32_t largest_storable(const pack_side &side)
{
    const uint32_t type = side.cache.layout.type;
    if (side.is_transformed)
        return float_bits(0x1p120f) - 1;
    return type == KSORT_F16 ? float_bits(65504.0f) : type == KSORT_BF16 ? 0x7F7F0000u : FLOAT_MAGNITUDE_INF - 1;
}

/* Whether a head is stored, agreed on by its lanes (`mask`): reported where it is not. before and after: the lane's
 * largest magnitudes of x and of what is to be rounded. */
__device__ inline bool may_store(const pack_work &work, const pack_side &side, bool wanted, uint32_t before,
                                 uint32_t after, uint32_t mask)
{
    const bool non_finite = __ballot_sync(ALL_LANES, before >= FLOAT_MAGNITUDE_INF) & mask;
    const bool too_large = __ballot_sync(ALL_LANES, after > largest_storable(side)) & mask;
    if (wanted && (non_finite || too_large) && __ffs(mask) - 1 == (int)lane_of_thread())
        report(work.tokens, non_finite ? KSORT_ERR_NON_FINITE : KSORT_ERR_RANGE);
    return wanted && !non_finite && !too_large;
}

/* Four low bits of each byte of two quads, side by side. */
__device__ inline uint32_t nibbles(uint32_t low, uint32_t high)
{
    return (low & 0x0F0F0F0Fu) | (high & 0x0F0F0F0Fu) << 4;
}

/* Stores channels 16 * unit onwards of a token, four quads, as FORMAT.md, "Tiles", packs them into words. */
__device__ inline void store_quads(const head_layout &layout, uint8_t *tile, uint32_t token, uint32_t unit,
                                   const uint32_t (&quads)[4])
{
    const uint32_t n_words = layout.mantissa_bits / 2;
    uint32_t *to = reinterpret_cast<uint32_t *>(tile + word_offset(&layout, unit * n_words, token));
    if (layout.mantissa_bits == 8) {
#pragma unroll
        for (int q = 0; q < 4; q++)
            to[q * STRIP_TOKENS] = quads[q];
        return;
    }
    to[0] = nibbles(quads[0], quads[1]);
    to[STRIP_TOKENS] = nibbles(quads[2], quads[3]);
    if (layout.mantissa_bits == 4)
        return;
    uint32_t upper = 0;
#pragma unroll
    for (int q = 0; q < 4; q++)
        upper |= (quads[q] >> 4 & 0x03030303u) << 2 * q;
    to[2 * STRIP_TOKENS] = upper;
}

#endif /* KSORT_CUDA_PACK_STRIP_CUH */
