/* What both ways of nearest rounding (pack/rope.cuh, pack/plain.cuh) share: a thread block's slots, which of them are
 * packed, and how refused heads are reported. */
#ifndef KSORT_CUDA_PACK_GROUP_CUH
#define KSORT_CUDA_PACK_GROUP_CUH

#include "common/chunks.cuh"
#include "pack/work.cuh"

constexpr int GROUP_SLOTS = WARP; /* of a thread block: half a tile */

/* Heads of a thread block. One where two leave rows of x and the rope table no room in 99 KB of shared memory. */
template <int HEAD_DIM, uint32_t X_TYPE>
constexpr int GROUP_HEADS = HEAD_DIM == 256 && X_TYPE == KSORT_F32 ? 1 : 2;

/* New slots of a context, and the group of them that a thread block packs. */
struct slot_group {
    uint32_t context;
    uint32_t first;    /* slot of the group: a multiple of GROUP_SLOTS */
    uint32_t n_cached; /* the first new slot */
    uint32_t end_new;
};

/* The index-th group of the context's new slots. */
__device__ inline slot_group find_group(const pack_work &work, uint32_t index)
{
    slot_group group;
    group.context = blockIdx.z;
    group.n_cached = (uint32_t)work.tokens.n_cached[group.context];
    group.end_new = group.n_cached + n_new_of(work.tokens, group.context);
    group.first = (group.n_cached / GROUP_SLOTS + index) * GROUP_SLOTS;
    return group;
}

/* Slots from n_cached on that a side's cache and the RoPE rows suffice for. What they don't suffice for is reported by
 * one thread of each block. */
__device__ inline uint32_t count_packed(const pack_work &work, const pack_side &side, const slot_group &group)
{
    const uint32_t in_cache = min(group.end_new, n_slots(side.cache.pages));
    const uint32_t end = work.rope.partner ? min(in_cache, work.tokens.n_positions) : in_cache;
    if (threadIdx.x == 0 && end < group.end_new && group.n_cached < group.end_new) {
        if (in_cache < group.end_new)
            report(work.tokens, KSORT_ERR_ARGUMENT);
        if (end < in_cache && group.n_cached < in_cache)
            report(work.tokens, KSORT_ERR_ROPE);
    }
    return end > group.n_cached ? end - group.n_cached : 0;
}

/* Element of x where a head begins, of a slot that may stand before the first new one. */
template <int HEAD_DIM>
__device__ inline int64_t head_of_slot(const pack_work &work, const slot_group &group, uint32_t slot, uint32_t head)
{
    const int64_t token = (int32_t)(slot - group.n_cached), stride = (int64_t)work.token_stride;
    return (int64_t)(group.context * work.context_stride + (size_t)head * HEAD_DIM) + token * stride;
}

/* The group's tile of a head. */
__device__ inline uint8_t *tile_of_group(const pack_side &side, const slot_group &group, uint32_t head)
{
    return tile_at(side.cache.pages, group.context, group.first / KSORT_TILE_TOKENS, head);
}

/* Reports why a head is refused: for x itself, or for what RoPE or the type makes of it. */
template <int HEAD_DIM, uint32_t X_TYPE>
__device__ inline void tell_refusal(const pack_work &work, const pack_side &side, const slot_group &group,
                                    uint32_t slot, uint32_t head)
{
    const int64_t at = head_of_slot<HEAD_DIM>(work, group, slot, head);
    bool finite = true;
#pragma unroll 1
    for (uint32_t c = 0; c < HEAD_DIM; c++)
        finite = finite && magnitude_bits(load_float(side.x, X_TYPE, at + c)) < FLOAT_MAGNITUDE_INF;
    report(work.tokens, finite ? KSORT_ERR_RANGE : KSORT_ERR_NON_FINITE);
}

/* The nearest of SBFP's codes to s, ties to the even one; s is at most SCALE_MAX. */
__device__ inline uint32_t nearest_scale_code(float s)
{
    if (s < 0x1p-14f) /* counts of 2^-16 */
        return (uint32_t)__float2int_rn(__fmul_rn(s, 0x1p16f));
    const uint32_t bits = float_bits(s); /* the code's exponent and two bits of mantissa, and 21 bits more */
    return min(((bits + 0xFFFFFu + (bits >> 21 & 1)) >> 21) - (112u << 2), 0x7Bu);
}

/* The nearest encoder on values of a block, whose largest magnitude is given as float bits. rounded: as clamped_quad
 * takes it. Returns the scale byte. */
template <bool MAY_BE_TINY = true, int N>
__device__ inline uint32_t round_nearest(const head_layout &layout, uint32_t largest, float (&y)[N],
                                         uint32_t (&rounded)[N])
{
    if (!layout.is_scaled) {
        round_to_units<MAY_BE_TINY>(largest >> 23, layout.mantissa_bits, y, rounded);
        return largest >> 23;
    }
    const float scale = __fdiv_rn(bits_float(largest), (float)((1 << (layout.mantissa_bits - 1)) - 1));
    const uint32_t code = nearest_scale_code(scale);
#pragma unroll
    for (int j = 0; j < N; j++)
        rounded[j] = float_bits(__fadd_rn(code == 0 ? 0.0f : __fdiv_rn(y[j], scale), UNITS));
    return code;
}

#endif /* KSORT_CUDA_PACK_GROUP_CUH */
