/* Scale bytes and rounding of LANES values at a time, in units of their blocks' steps. Included after a level's lanes_*.h,
 * whose lanes_min gives the second operand where the first is NaN. is_scaled (SBFP) is a constant throughout. */
#ifndef KSORT_ENCODE_STEP_H
#define KSORT_ENCODE_STEP_H

#include "rounding.h"

/* struct block_step of LANES tokens or channels; see rounding.h. SBFP has no `second`. */
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

/* Lanes where `mask` has all bits, zero where it has none. */
ALWAYS_INLINE lanes lanes_where(lanes_int mask, lanes x)
{
    return (lanes)((lanes_int)x & mask);
}

ALWAYS_INLINE lanes lanes_either(lanes_int mask, lanes inside, lanes outside)
{
    return (lanes)(((lanes_int)inside & mask) | ((lanes_int)outside & ~mask));
}

ALWAYS_INLINE lanes lanes_magnitude(lanes x)
{
    return (lanes)((lanes_int)x & 0x7FFFFFFF);
}

ALWAYS_INLINE struct lanes_step lanes_step_of(lanes_int code, int32_t mantissa_bits, const bool is_scaled)
{
    lanes_int is_stored = code != 0; /* all bits, or none */
    int32_t limit = 1 << (mantissa_bits - 1);
    struct lanes_step step = {.low = lanes_where(is_stored, lanes_set((float)-limit)),
                              .high = lanes_where(is_stored, lanes_set((float)(limit - 1)))};
    if (is_scaled) { /* scale_of_code */
        lanes magnitude = (lanes)((code & 0x7F) << 21) * 0x1p112f;
        step.step = (lanes)((lanes_int)magnitude | (code & 0x80) << 24);
        step.first = lanes_where(is_stored, 1.0f / step.step);
        return step;
    }
    lanes_int power = mantissa_bits - 2 + 127 - code, half = power >> 1, rest = power - half;
    step.first = lanes_where(is_stored, lanes_power(half));
    step.second = lanes_power(rest);
    step.step = lanes_power(-half) * lanes_power(-rest);
    return step;
}

ALWAYS_INLINE lanes lanes_units(lanes y, const struct lanes_step *step, const bool is_scaled)
{
    return is_scaled ? y * step->first : y * step->first * step->second;
}

/* Rounded to nearest within low .. high; NaN becomes `high`. */
ALWAYS_INLINE lanes lanes_mantissa(lanes u, const struct lanes_step *step)
{
    return lanes_round(lanes_max(lanes_min(u, step->high), step->low));
}

/* sum + the squared error of y, in units of the step. */
ALWAYS_INLINE lanes lanes_add_square(lanes sum, lanes y, const struct lanes_step *step, const bool is_scaled)
{
    lanes u = lanes_units(y, step, is_scaled), error = u - lanes_mantissa(u, step);
    return lanes_multiply_add(error, error, sum);
}

/* The larger of the two scale bytes between which the squared error decides, of blocks whose largest value is given: the
 * natural exponent, or the signed scale that takes that value to the lowest mantissa (scale_code_above). */
ALWAYS_INLINE lanes_int lanes_larger_code(lanes largest, int32_t mantissa_bits, const bool is_scaled)
{
    lanes magnitude = lanes_magnitude(largest);
    if (!is_scaled)
        return (lanes_int)magnitude >> 23;
    lanes scale = magnitude * (1.0f / (float)(1 << (mantissa_bits - 1)));
    lanes_int from_bits = (((lanes_int)scale + 0x1FFFFF) >> 21) - (112 << 2);
    lanes count = lanes_min(scale * 0x1p16f, lanes_set(4.0f)); /* up to 4 it is at least from_bits, beyond at most */
    lanes_int whole = lanes_to_int(lanes_round(count));
    lanes_int code = lanes_max_int(from_bits, whole - (count > lanes_round(count))); /* a true comparison is -1 */
    return code | (((lanes_int)(largest > 0.0f) & (code > 0)) & 0x80);
}

ALWAYS_INLINE lanes_int lanes_code_magnitude(lanes_int code, const bool is_scaled)
{
    return is_scaled ? code & 0x7F : code;
}

#endif /* KSORT_ENCODE_STEP_H */
