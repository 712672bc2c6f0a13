/* float32 <-> f16, bf16 and the scale bytes of SBFP, round to nearest even. */
#ifndef KSORT_HALF_H
#define KSORT_HALF_H

#include "common.h"

#define F16_MAX 65504.0f
#define BF16_MAX 3.38953138925153547590e38f /* bits 0x7F7F0000 */

/* x is finite and |x| <= BF16_MAX: rounding cannot reach infinity. */
static inline uint16_t bf16_of_float(float x)
{
    uint32_t bits = float_bits(x);
    return (uint16_t)((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

static inline float float_of_bf16(uint16_t x)
{
    return bits_float((uint32_t)x << 16);
}

/* x is finite and |x| <= F16_MAX. */
static inline uint16_t f16_of_float(float x)
{
    uint32_t bits = float_bits(x);
    uint32_t sign = bits >> 16 & 0x8000u;
    uint32_t magnitude = bits & 0x7FFFFFFFu;
    if (magnitude < 0x38800000u) {
        /* Below 2^-14 an f16 counts steps of 2^-24. A float32 between 0.5 and 1 has that step: adding 0.5 rounds. */
        float rounded = bits_float(magnitude) + 0.5f;
        return (uint16_t)(sign | (float_bits(rounded) - 0x3F000000u));
    }
    /* Round away 13 mantissa bits, then move the exponent's bias from 127 to 15. */
    uint32_t rounded = magnitude + 0xFFFu + (magnitude >> 13 & 1);
    return (uint16_t)(sign | (rounded - (112u << 23)) >> 13);
}

static inline float float_of_f16(uint16_t x)
{
    uint32_t sign = (uint32_t)(x & 0x8000u) << 16;
    uint32_t magnitude = x & 0x7FFFu;
    if (magnitude >= 0x7C00u) /* infinity and NaN: never packed, but every decoder reads every pattern */
        return bits_float(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
    if (magnitude < 0x0400u) { /* zero or subnormal: a count of 2^-24 */
        float value = (float)magnitude * 0x1p-24f;
        return bits_float(sign | float_bits(value));
    }
    return bits_float(sign | (magnitude + (112u << 10)) << 13);
}

#define SCALE_MAX 57344.0f /* SBFP's largest scale, of code 0x7B */

/* SBFP's signed scale of any byte: the f16 whose upper byte it is. */
static inline float float_of_scale(uint8_t code)
{
    return float_of_f16((uint16_t)(code << 8));
}

/* The code whose scale is nearest to x, 0 <= x <= SCALE_MAX. */
static inline uint8_t scale_of_float(float x)
{
    uint32_t bits = float_bits(x);
    if (x < 0x1p-14f) /* scales count steps of 2^-16 there, as float32 does between 128 and 256 */
        return (uint8_t)(float_bits(x + 128.0f) - float_bits(128.0f));
    /* Round away 21 mantissa bits, then move the exponent's bias from 127 to 15. */
    uint32_t rounded = bits + 0xFFFFFu + (bits >> 21 & 1);
    return (uint8_t)((rounded - (112u << 23)) >> 21);
}

/* Value i of a row of f32, f16 or bf16. */
static inline float load_value(const void *row, uint32_t type, size_t i)
{
    if (type == KSORT_F32)
        return ((const float *)row)[i];
    uint16_t half = ((const uint16_t *)row)[i];
    return type == KSORT_F16 ? float_of_f16(half) : float_of_bf16(half);
}

#endif /* KSORT_HALF_H */
