/* Rounding of LANES values in units of their blocks' steps. Included after a level's lanes_*.h, whose lanes_min
 * gives the second operand where the first is NaN. */
#ifndef KSORT_ENCODE_STEP_H
#define KSORT_ENCODE_STEP_H

#include "rounding.h"

/* struct block_step of LANES tokens or channels; see rounding.h. */
struct lanes_step {
    lanes first, second, step, low, high;
};

ALWAYS_INLINE lanes lanes_set(float x)
{
    return x - (lanes){0};
}

ALWAYS_INLINE lanes_int lanes_set_int(int32_t x)
{
    return x - (lanes_int){0};
}

/* 2^power, -126 to 127. */
ALWAYS_INLINE lanes lanes_power(lanes_int power)
{
    return (lanes)((power + 127) << 23);
}

ALWAYS_INLINE struct lanes_step lanes_step_of(lanes_int exponent, int32_t mantissa_bits)
{
    lanes_int power = mantissa_bits - 2 + 127 - exponent, half = power >> 1, rest = power - half;
    lanes_int is_stored = exponent != 0; /* all bits, or none */
    int32_t limit = 1 << (mantissa_bits - 1);
    return (struct lanes_step){
        .first = (lanes)((lanes_int)lanes_power(half) & is_stored),
        .second = lanes_power(rest),
        .step = lanes_power(-half) * lanes_power(-rest),
        .low = (lanes)((lanes_int)lanes_set((float)-limit) & is_stored),
        .high = (lanes)((lanes_int)lanes_set((float)(limit - 1)) & is_stored),
    };
}

/* Rounded to nearest within low .. high; NaN becomes `high`. */
ALWAYS_INLINE lanes lanes_mantissa(lanes u, lanes low, lanes high)
{
    return lanes_round(lanes_max(lanes_min(u, high), low));
}

#endif /* KSORT_ENCODE_STEP_H */
