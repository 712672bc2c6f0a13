/* What every way of rounding sees of a call, and how words are stored; pack/kernel.cuh draws the whole. */
#ifndef KSORT_CUDA_PACK_WORK_CUH
#define KSORT_CUDA_PACK_WORK_CUH

#include "common/encode.cuh"

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

/* Threads of a block: nearest rounding, and few transformed tokens. */
template <int HEAD_DIM>
constexpr int PACK_THREADS = STRIP_TOKENS * (HEAD_DIM <= 64    ? 8
                                             : HEAD_DIM <= 128 ? 16
                                                               : WARP);

/* The largest magnitude, as float bits, that may be stored: ksort_pack's rule. */
__device__ inline uint32_t largest_storable(const pack_side &side)
{
    const head_layout &layout = side.cache.layout;
    if (layout.is_scaled)
        return float_bits(((1 << (layout.mantissa_bits - 1)) - 1) * SCALE_MAX);
    if (side.is_transformed)
        return float_bits(0x1p120f) - 1;
    return layout.type == KSORT_F16    ? float_bits(65504.0f)
           : layout.type == KSORT_BF16 ? 0x7F7F0000u
                                       : FLOAT_MAGNITUDE_INF - 1;
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

/* Words of a token whose mantissas one lane has, stored unit after unit: 16 channels each, as four quads. SBFP11's
 * groups of 32 channels are two units. */
struct word_writer {
    const head_layout &layout;
    uint8_t *tile;
    uint32_t token;     /* in the tile */
    uint32_t upper = 0; /* SBFP11: the group's third word, as far as it is known */

    __device__ uint32_t *word(uint32_t w) const
    {
        return reinterpret_cast<uint32_t *>(tile + word_offset(&layout, w, token));
    }

    __device__ void store_sbfp11(uint32_t unit, const uint32_t (&quads)[4])
    {
        const uint32_t half = unit % 2;
        uint32_t lower = 0;
        upper = half ? upper : 0;
#pragma unroll
        for (int q = 0; q < 4; q++) {
            lower |= (quads[q] & 0x03030303u) << 2 * q;
            upper |= (quads[q] >> 2 & 0x01010101u) << (4 * half + q);
        }
        uint32_t *to = word(unit / 2 * 3);
        to[half * STRIP_TOKENS] = lower;
        const bool is_last = 4 * (unit + 1) >= layout.head_dim / 4;
        if (!half && is_last)
            to[STRIP_TOKENS] = 0; /* padding */
        if (half || is_last)
            to[2 * STRIP_TOKENS] = upper;
    }

    __device__ void store(uint32_t unit, const uint32_t (&quads)[4])
    {
        if (layout.mantissa_bits == 3) {
            store_sbfp11(unit, quads);
            return;
        }
        uint32_t *to = word(unit * (layout.mantissa_bits / 2));
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
        uint32_t high = 0;
#pragma unroll
        for (int q = 0; q < 4; q++)
            high |= (quads[q] >> 4 & 0x03030303u) << 2 * q;
        to[2 * STRIP_TOKENS] = high;
    }
};

#endif /* KSORT_CUDA_PACK_WORK_CUH */
