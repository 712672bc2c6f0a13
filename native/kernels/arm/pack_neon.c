/* Packing with Advanced SIMD, one head of one token a call, 8 channels at a time; a row's rest is the scalar level's,
 * or is copied to 8.
 *
 *     x [8] f32 --> block maximum (integer compare of magnitudes) --> exponent, or SBFP's scale
 *     x [8] f32 --> x / step --> i32, ties to even --> i16, clamp --> i8 [8]
 *
 * Bytes moved: 4 head_dim in, head_dim + blocks out (to the stack; the words follow from there).
 */
#include <arm_neon.h>

#include "arm/arm.h"
#include "half.h"
#include "rounding.h"
#include "scalar/scalar.h"

ALWAYS_INLINE uint32x4_t load_magnitudes(const float *x)
{
    return vandq_u32(vreinterpretq_u32_f32(vld1q_f32(x)), vdupq_n_u32(0x7FFFFFFF));
}

uint32_t ksort_neon_max_magnitude(const float *x, size_t n)
{
    uint32x4_t max[2] = {vdupq_n_u32(0), vdupq_n_u32(0)};
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        max[0] = vmaxq_u32(max[0], load_magnitudes(x + i));
        max[1] = vmaxq_u32(max[1], load_magnitudes(x + i + 4));
    }
    uint32_t of_registers = vmaxvq_u32(vmaxq_u32(max[0], max[1]));
    uint32_t of_rest = ksort_scalar_max_magnitude(x + i, n - i);
    return of_registers > of_rest ? of_registers : of_rest;
}

/* Four channels in units of a block's step: times its inverse, or divided by `first`, an SBFP scale before rounding.
 * Below 2^8: as 16 bits they are exact. */
typedef float32x4_t units_function(const float *x, struct step_inverse inverse);

ALWAYS_INLINE float32x4_t units_of_exponent(const float *x, struct step_inverse inverse)
{
    return vmulq_n_f32(vmulq_n_f32(vld1q_f32(x), inverse.first), inverse.second);
}

ALWAYS_INLINE float32x4_t units_of_scale(const float *x, struct step_inverse scale)
{
    return vdivq_f32(vld1q_f32(x), vdupq_n_f32(scale.first));
}

/* Eight channels, to nearest even, clamped to -limit .. limit, as bytes. */
ALWAYS_INLINE int8x8_t round_eight(const float *x, struct step_inverse inverse, units_function *units, int16_t limit)
{
    int16x4_t low = vmovn_s32(vcvtnq_s32_f32(units(x, inverse)));
    int16x8_t rounded = vcombine_s16(low, vmovn_s32(vcvtnq_s32_f32(units(x + 4, inverse))));
    rounded = vmaxq_s16(vminq_s16(rounded, vdupq_n_s16(limit)), vdupq_n_s16(-limit));
    return vmovn_s16(rounded);
}

/* Channels of one block that is not stored as zeros. */
ALWAYS_INLINE void round_block(const float *x, uint32_t n, struct step_inverse inverse, units_function *units,
                               int16_t limit, int8_t *mantissas)
{
    uint32_t c = 0;
    for (; c + 8 <= n; c += 8)
        vst1_s8(mantissas + c, round_eight(x + c, inverse, units, limit));
    if (c < n) {
        float rest[8] = {0};
        memcpy(rest, x + c, (n - c) * sizeof *x);
        int8x8_t bytes = round_eight(rest, inverse, units, limit);
        memcpy(mantissas + c, &bytes, n - c);
    }
}

void ksort_neon_round_bfp(const float *x, uint32_t head_dim, uint32_t block_size, uint32_t mantissa_bits,
                          int8_t *mantissas, uint8_t *exponents)
{
    const int16_t limit = (int16_t)((1 << (mantissa_bits - 1)) - 1);
    for (uint32_t begin = 0; begin < head_dim; begin += block_size) {
        uint32_t n = (uint32_t)min_size(block_size, head_dim - begin);
        uint32_t exponent = ksort_neon_max_magnitude(x + begin, n) >> 23;
        *exponents++ = (uint8_t)exponent;
        if (exponent == 0)
            memset(mantissas + begin, 0, n);
        else
            round_block(x + begin, n, step_inverse_of(exponent, mantissa_bits), units_of_exponent, limit,
                        mantissas + begin);
    }
}

void ksort_neon_round_sbfp(const float *x, uint32_t head_dim, uint32_t block_size, uint32_t mantissa_bits,
                           int8_t *mantissas, uint8_t *codes)
{
    const int16_t limit = (int16_t)((1 << (mantissa_bits - 1)) - 1);
    for (uint32_t begin = 0; begin < head_dim; begin += block_size) {
        uint32_t n = (uint32_t)min_size(block_size, head_dim - begin);
        float scale = bits_float(ksort_neon_max_magnitude(x + begin, n)) / (float)limit;
        *codes = scale_of_float(scale);
        if (*codes++ == 0)
            memset(mantissas + begin, 0, n);
        else
            round_block(x + begin, n, (struct step_inverse){scale, 1.0f}, units_of_scale, limit, mantissas + begin);
    }
}

void ksort_neon_store_f16(const float *x, uint32_t n, uint16_t *out)
{
    uint32_t i = 0;
    for (; i + 4 <= n; i += 4)
        vst1_u16(out + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(x + i))));
    ksort_scalar_store_f16(x + i, n - i, out + i);
}

/* The upper half of bits + (0x7FFF + lowest kept bit): half.h. */
void ksort_neon_store_bf16(const float *x, uint32_t n, uint16_t *out)
{
    uint32_t i = 0;
    for (; i + 4 <= n; i += 4) {
        uint32x4_t bits = vreinterpretq_u32_f32(vld1q_f32(x + i));
        uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        vst1_u16(out + i, vaddhn_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF))));
    }
    ksort_scalar_store_bf16(x + i, n - i, out + i);
}
