/* What the kernels that are written once for all vector levels (template/) need of Advanced SIMD: registers of 4 floats.
 * See x86/lanes_avx512.h. There are no masked loads; but masks are of a head's channels, whose number is even, so the
 * lanes to load are all four or the lower two. */
#ifndef KSORT_LANES_NEON_H
#define KSORT_LANES_NEON_H

#include <arm_neon.h>

#include "arm/arm.h"

#define LANES 4
typedef float32x4_t lanes;
typedef int32_t lanes_int __attribute__((vector_size(16)));
typedef struct lanes_mask {
    uint32x4_t bits; /* all of a lane, or none */
    bool has_upper;  /* lanes 2 and 3 may be loaded */
} lanes_mask;

ALWAYS_INLINE lanes lanes_round(lanes x)
{
    return vrndnq_f32(x);
}

/* a * b + c, rounded once. */
ALWAYS_INLINE lanes lanes_multiply_add(lanes a, lanes b, lanes c)
{
    return vfmaq_f32(c, a, b);
}

/* c - a * b, rounded once. */
ALWAYS_INLINE lanes lanes_minus_product(lanes c, lanes a, lanes b)
{
    return vfmsq_f32(c, a, b);
}

/* The number, where one is NaN. */
ALWAYS_INLINE lanes lanes_min(lanes a, lanes b)
{
    return vminnmq_f32(a, b);
}

ALWAYS_INLINE lanes lanes_max(lanes a, lanes b)
{
    return vmaxnmq_f32(a, b);
}

ALWAYS_INLINE lanes_int lanes_max_int(lanes_int a, lanes_int b)
{
    return (lanes_int)vmaxq_s32((int32x4_t)a, (int32x4_t)b);
}

ALWAYS_INLINE lanes_int lanes_to_int(lanes x)
{
    return (lanes_int)vcvtnq_s32_f32(x);
}

/* Four channels' mantissas as the bytes of 4 tokens' quads. */
ALWAYS_INLINE lanes_int lanes_quad(lanes a, lanes b, lanes c, lanes d)
{
    int32x4_t quad = vsliq_n_s32(vcvtnq_s32_f32(a), vcvtnq_s32_f32(b), 8);
    quad = vsliq_n_s32(quad, vcvtnq_s32_f32(c), 16);
    return (lanes_int)vsliq_n_s32(quad, vcvtnq_s32_f32(d), 24);
}

/* Lane i in all lanes: a table lookup of its four bytes, as an index that is no constant would go through memory. */
ALWAYS_INLINE lanes lanes_broadcast(lanes x, uint32_t i)
{
    uint8x16_t bytes = vreinterpretq_u8_u32(vdupq_n_u32(0x03020100u + 0x04040404u * i));
    return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(x), bytes));
}

/* Lanes begin .. end-1. */
ALWAYS_INLINE lanes_mask lanes_between(uint32_t begin, uint32_t end)
{
    const uint32x4_t lane = {0, 1, 2, 3};
    uint32x4_t bits = vandq_u32(vcgeq_u32(lane, vdupq_n_u32(begin)), vcltq_u32(lane, vdupq_n_u32(end)));
    return (lanes_mask){bits, end > 2};
}

ALWAYS_INLINE lanes load_pair(const float *x)
{
    return vcombine_f32(vld1_f32(x), vdup_n_f32(0.0f));
}

/* Lanes from the end of the mask on are 0, and their memory is not touched; lanes before its begin may be anything. */
ALWAYS_INLINE lanes load_masked(const float *x, lanes_mask mask)
{
    return mask.has_upper ? vld1q_f32(x) : load_pair(x);
}

/* Lanes of `inside` in the mask, of `outside` elsewhere. */
ALWAYS_INLINE lanes lanes_select(lanes_mask mask, lanes inside, lanes outside)
{
    return vbslq_f32(mask.bits, inside, outside);
}

/* Values i .. i+3 of x, i < n, below n. */
ALWAYS_INLINE lanes load_below(const float *x, uint32_t n, uint32_t i)
{
    switch (n - i) {
    case 1: return (lanes){x[i], 0.0f, 0.0f, 0.0f};
    case 2: return load_pair(x + i);
    case 3: return (lanes){x[i], x[i + 1], x[i + 2], 0.0f};
    default: return vld1q_f32(x + i);
    }
}

ALWAYS_INLINE void store_below(float *x, uint32_t n, uint32_t i, lanes values)
{
    switch (n - i) {
    case 1: vst1q_lane_f32(x + i, values, 0); break;
    case 3: vst1q_lane_f32(x + i + 2, values, 2); /* fall through */
    case 2: vst1_f32(x + i, vget_low_f32(values)); break;
    default: vst1q_f32(x + i, values);
    }
}

/* Integers as bytes, n of them, n up to 4. */
ALWAYS_INLINE void store_bytes(int8_t *out, uint32_t n, lanes_int values)
{
    int16x8_t words = vcombine_s16(vmovn_s32((int32x4_t)values), vdup_n_s16(0));
    int8x8_t bytes = vmovn_s16(words);
    memcpy(out, &bytes, n);
}

/* table[indices[0]] .. table[indices[3]]: lookup instructions reach 16 floats, loads any. */
ALWAYS_INLINE lanes look_up_four(const float *table, const uint16_t *indices)
{
    return (lanes){table[indices[0]], table[indices[1]], table[indices[2]], table[indices[3]]};
}

/* table[indices[i]] .. table[indices[i + 3]] of indices below n_indices; all of them are below n. */
ALWAYS_INLINE lanes look_up(const float *table, uint32_t n, const uint16_t *indices, uint32_t n_indices, uint32_t i)
{
    (void)n;
    if (n_indices - i >= LANES)
        return look_up_four(table, indices + i);
    return (lanes){table[indices[i]], table[indices[i + 1]], 0.0f, 0.0f};
}

/* out[c] lane r = rows[r] lane c. Pairs of rows, then their halves. */
ALWAYS_INLINE void transpose_lanes(const lanes rows[LANES], lanes out[LANES])
{
    float64x2_t even[2], odd[2];
    for (int pair = 0; pair < 2; pair++) {
        even[pair] = vreinterpretq_f64_f32(vtrn1q_f32(rows[2 * pair], rows[2 * pair + 1]));
        odd[pair] = vreinterpretq_f64_f32(vtrn2q_f32(rows[2 * pair], rows[2 * pair + 1]));
    }
    out[0] = vreinterpretq_f32_f64(vtrn1q_f64(even[0], even[1]));
    out[1] = vreinterpretq_f32_f64(vtrn1q_f64(odd[0], odd[1]));
    out[2] = vreinterpretq_f32_f64(vtrn2q_f64(even[0], even[1]));
    out[3] = vreinterpretq_f32_f64(vtrn2q_f64(odd[0], odd[1]));
}

/* sum + values[0] * x[0] + ... + values[3] * x[3], multiply-adds by element. */
ALWAYS_INLINE lanes add_products(lanes sum, const lanes values[4], lanes x)
{
    sum = vfmaq_laneq_f32(sum, values[0], x, 0);
    sum = vfmaq_laneq_f32(sum, values[1], x, 1);
    sum = vfmaq_laneq_f32(sum, values[2], x, 2);
    return vfmaq_laneq_f32(sum, values[3], x, 3);
}

#endif /* KSORT_LANES_NEON_H */
