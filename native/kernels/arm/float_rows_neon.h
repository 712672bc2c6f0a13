/* Stored values of a row as floats, four of them or the last two. `type` is a constant. */
#ifndef KSORT_FLOAT_ROWS_NEON_H
#define KSORT_FLOAT_ROWS_NEON_H

#include <arm_neon.h>

#include "arm/arm.h"

ALWAYS_INLINE float32x4_t halves_as_float(uint16x4_t halves, const uint32_t type)
{
    if (type == KSORT_F16)
        return vcvt_f32_f16(vreinterpret_f16_u16(halves));
    return vreinterpretq_f32_u32(vshll_n_u16(halves, 16));
}

/* Values i .. i+3 of a row. */
ALWAYS_INLINE float32x4_t load_values(const void *row, const uint32_t type, size_t i)
{
    if (type == KSORT_F32)
        return vld1q_f32((const float *)row + i);
    return halves_as_float(vld1_u16((const uint16_t *)row + i), type);
}

/* Values i and i+1 of a row, then zeros. */
ALWAYS_INLINE float32x4_t load_two_values(const void *row, const uint32_t type, size_t i)
{
    if (type == KSORT_F32)
        return vcombine_f32(vld1_f32((const float *)row + i), vdup_n_f32(0.0f));
    uint32_t two;
    memcpy(&two, (const uint16_t *)row + i, sizeof two);
    return halves_as_float(vreinterpret_u16_u32(vset_lane_u32(two, vdup_n_u32(0), 0)), type);
}

#endif /* KSORT_FLOAT_ROWS_NEON_H */
