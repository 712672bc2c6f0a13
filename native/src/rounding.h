/* The factor that takes a BFP block to units of its step, shared by every level. */
#ifndef KSORT_ROUNDING_H
#define KSORT_ROUNDING_H

#include "common.h"

/* x / step = (x * first) * second, with step = 2^(e - (mantissa_bits - 2)) and e = exponent - 127 from -126 to 127.
 * 1 / step may be 2^132, beyond float32, and 2^-e alone may be subnormal; two halves of the exponent are not. Both
 * products are exact wherever the result is 2^-2 or more, so the one rounding that counts is the last. */
struct step_inverse {
    float first;
    float second;
};

static inline struct step_inverse step_inverse_of(uint32_t exponent, uint32_t mantissa_bits)
{
    int32_t power = (int32_t)(mantissa_bits - 2) - ((int32_t)exponent - 127);
    int32_t half = power / 2;
    return (struct step_inverse){bits_float((uint32_t)(half + 127) << 23),
                                 bits_float((uint32_t)(power - half + 127) << 23)};
}

#endif /* KSORT_ROUNDING_H */
