/* Packing with Advanced SIMD, one head of one token a call, 8 channels at a time; a row's rest is the scalar level's,
 * or is copied to 8.
 *
 *     x [8] f32 --> block maximum (integer compare of magnitudes) --> exponent
 *     x [8] f32 --> x / step --> i32, ties to even --> i16, clamp --> i8 [8]
 *
 * Bytes moved: 4 head_dim in, head_dim + blocks out (to the stack; the words follow from there).
 */
#include <arm_neon.h>

#include "arm/arm.h"
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

/* Four channels in units of the step, to nearest even. Below 2^8: as 16 bits they are exact. */
ALWAYS_INLINE int16x4_t round_four(const float *x, struct step_inverse inverse)
{
    float32x4_t scaled = vmulq_n_f32(vld1q_f32(x), inverse.first);
    return vmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(scaled, inverse.second)));
}

/* Eight channels in units of the step, rounded and clamped to -limit .. limit, as bytes. */
ALWAYS_INLINE int8x8_t round_eight(const float *x, struct step_inverse inverse, int16_t limit)
{
    int16x8_t rounded = vcombine_s16(round_four(x, inverse), round_four(x + 4, inverse));
    rounded = vmaxq_s16(vminq_s16(rounded, vdupq_n_s16(limit)), vdupq_n_s16(-limit));
    return vmovn_s16(rounded);
}

/* Channels of one block with a nonzero exponent. */
static void round_block(const float *x, uint32_t n, uint32_t exponent, uint32_t mantissa_bits, int8_t *mantissas)
{
    struct step_inverse inverse = step_inverse_of(exponent, mantissa_bits);
    int16_t limit = (int16_t)((1 << (mantissa_bits - 1)) - 1);
    uint32_t c = 0;
    for (; c + 8 <= n; c += 8)
        vst1_s8(mantissas + c, round_eight(x + c, inverse, limit));
    if (c < n) {
        float rest[8] = {0};
        memcpy(rest, x + c, (n - c) * sizeof *x);
        int8x8_t bytes = round_eight(rest, inverse, limit);
        memcpy(mantissas + c, &bytes, n - c);
    }
}

void ksort_neon_round_bfp(const float *x, uint32_t head_dim, uint32_t block_size, uint32_t mantissa_bits,
                          int8_t *mantissas, uint8_t *exponents)
{
    for (uint32_t begin = 0; begin < head_dim; begin += block_size) {
        uint32_t n = (uint32_t)min_size(block_size, head_dim - begin);
        uint32_t exponent = ksort_neon_max_magnitude(x + begin, n) >> 23;
        *exponents++ = (uint8_t)exponent;
        if (exponent == 0)
            memset(mantissas + begin, 0, n);
        else
            round_block(x + begin, n, exponent, mantissa_bits, mantissas + begin);
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
