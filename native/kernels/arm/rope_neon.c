/* RoPE with Advanced SIMD, 4 channels a register:
 *
 *     y[c] = x[c] * cos[frequency[c]] + (sign[c] * x[partner[c]]) * sin[frequency[c]]
 *                   lookup                         lookup           lookup
 *
 * Lookups are loads (lanes_neon.h), 12 of them for 4 channels, and bound the loop. The last register of a head begins
 * so early that it is whole.
 * Bytes moved: 4 head_dim in and out, 5 head_dim of tables from L1, 8 n_frequencies of cos and sin.
 */
#include "arm/lanes_neon.h"
#include "scalar/scalar.h"

/* Frequencies of 4 channels. Those of channels that don't turn may be any: they become one that exists. */
ALWAYS_INLINE void load_frequencies(const struct rope_row *rope, uint32_t c, uint16_t frequencies[LANES])
{
    uint16x4_t last = vdup_n_u16((uint16_t)min_size(rope->n_frequencies - 1, UINT16_MAX));
    vst1_u16(frequencies, vmin_u16(vld1_u16(rope->frequency + c), last));
}

/* 4 signs, -1, 0 or +1, as integers. */
ALWAYS_INLINE int32x4_t load_signs(const int8_t *signs)
{
    int32_t four;
    memcpy(&four, signs, sizeof four);
    int8x8_t bytes = vreinterpret_s8_s32(vdup_n_s32(four));
    return vmovl_s16(vget_low_s16(vmovl_s8(bytes)));
}

ALWAYS_INLINE void rope_four(const struct rope_row *rope, const float *x, uint32_t c, float *y)
{
    uint16_t frequencies[LANES];
    load_frequencies(rope, c, frequencies);
    int32x4_t signs = load_signs(rope->sign + c);
    uint32x4_t stays = vceqzq_s32(signs);
    lanes own = vld1q_f32(x + c);
    lanes turned = vcvtq_f32_s32(signs) * look_up_four(x, rope->partner + c);
    lanes sum = own * look_up_four(rope->cos, frequencies) + turned * look_up_four(rope->sin, frequencies);
    vst1q_f32(y + c, vbslq_f32(stays, own, sum));
}

void ksort_neon_rope(const struct rope_row *rope, const float *x, uint32_t head_dim, float *y)
{
    if (head_dim < LANES) {
        ksort_scalar_rope(rope, x, head_dim, y);
        return;
    }
    for (uint32_t c = 0; c < head_dim; c += LANES)
        rope_four(rope, x, (uint32_t)min_size(c, head_dim - LANES), y);
}
