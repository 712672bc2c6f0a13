/* What takes a block to units of its step and back, and the segments of rotating; shared by every level. */
#ifndef KSORT_ROUNDING_H
#define KSORT_ROUNDING_H

#include <math.h>

#include "common.h"

/* x / step = (x * first) * second, with step = 2^(e - (mantissa_bits - 2)) and e = exponent - 127 from -126 to 127.
 * 1 / step may be 2^132, beyond float32, and 2^-e alone may be subnormal; two halves of the exponent are not. Both
 * products are exact wherever the result is 2^-2 or more, so the one rounding that counts is the last. */
struct step_inverse {
    float first;
    float second;
};

static inline HOST_DEVICE struct step_inverse step_inverse_of(uint32_t exponent, uint32_t mantissa_bits)
{
    int32_t power = (int32_t)(mantissa_bits - 2) - ((int32_t)exponent - 127);
    int32_t half = power / 2;
    return (struct step_inverse){bits_float((uint32_t)(half + 127) << 23),
                                 bits_float((uint32_t)(power - half + 127) << 23)};
}

/* How the encoder of transformed heads rounds the channels of one block: mantissa = round(clamp(y / step, low, high)).
 * All zero for a zero block, whose mantissas are 0 whatever y has become. */
struct block_step {
    struct step_inverse inverse; /* SBFP: 1 / step, rounded, and 1 */
    float step;                  /* BFP: from 2^-132, subnormal, to 2^127; SBFP: the signed scale */
    float low;                   /* -2^(mantissa_bits-1) */
    float high;                  /* 2^(mantissa_bits-1) - 1 */
};

/* Values that are in units of the step already. */
static inline HOST_DEVICE struct block_step unit_step(uint32_t mantissa_bits)
{
    float limit = (float)(1 << (mantissa_bits - 1));
    return (struct block_step){{1.0f, 1.0f}, 1.0f, -limit, limit - 1.0f};
}

static inline HOST_DEVICE struct block_step block_step_of(uint32_t exponent, uint32_t mantissa_bits)
{
    if (exponent == 0)
        return (struct block_step){.step = 0.0f};
    struct block_step step = unit_step(mantissa_bits);
    step.inverse = step_inverse_of(exponent, mantissa_bits);
    step.step = (1.0f / step.inverse.first) * (1.0f / step.inverse.second); /* powers of two: exact */
    return step;
}

#define SCALE_MAX 57344.0f /* SBFP's largest scale, of code 0x7B */

/* The signed scale of a byte that an SBFP encoder makes: five bits of exponent, biased by 15, or 0 for a subnormal one, and
 * two of mantissa. As a float's they give 2^-112 times as much. */
static inline HOST_DEVICE float scale_of_code(uint32_t code)
{
    float magnitude = bits_float((code & 0x7F) << 21) * 0x1p112f;
    return code & 0x80 ? -magnitude : magnitude;
}

static inline HOST_DEVICE struct block_step scaled_block_step_of(uint32_t code, uint32_t mantissa_bits)
{
    if (code == 0)
        return (struct block_step){.step = 0.0f};
    struct block_step step = unit_step(mantissa_bits);
    step.step = scale_of_code(code);
    step.inverse.first = 1.0f / step.step;
    return step;
}

/* The first of SBFP's scale bytes whose scale is at least x, 0 <= x <= 57344. From 2^-14 on it is x's own exponent and
 * two bits of its mantissa, rounded up; below, a count of 2^-16. */
static inline HOST_DEVICE uint32_t scale_code_above(float x)
{
    if (x <= 0x1p-14f)
        return (uint32_t)ceilf(x * 0x1p16f);
    return ((float_bits(x) + 0x1FFFFFu) >> 21) - (112u << 2);
}

/* n > 0. Rotating cuts a head into segments of falling powers of two. */
static inline uint32_t largest_power_of_two(uint32_t n)
{
    return 1u << (31 - __builtin_clz(n));
}

/* What makes the Walsh-Hadamard transform of n channels orthonormal. */
static inline float rotation_factor(uint32_t n)
{
    return (float)(1.0 / sqrt((double)n));
}

#endif /* KSORT_ROUNDING_H */
