/* Scale bytes of transformed heads, as FORMAT.md section 3 chooses them: two are tried, and that which leaves the
 * smaller squared error is taken. A quad is four neighbouring channels, a unit 16, as there are partial sums.
 */
#ifndef KSORT_CUDA_PACK_SCALES_CUH
#define KSORT_CUDA_PACK_SCALES_CUH

#include "common/encode.cuh"

constexpr int QUAD_CHANNELS = 4, UNIT_LANES = 4, UNIT_CHANNELS = 16;

/* 1 / scale, rounded, of a scale that SBFP has: 1, 1.25, 1.5 or 1.75 times a power of two. Without a division, whose
 * rare cases are branches. */
__device__ inline float inverse_of_scale(float scale)
{
    const uint32_t bits = float_bits(scale), quarters = bits >> 21 & 3;
    const uint32_t mantissa = quarters == 1   ? float_bits(1.6f)
                              : quarters == 2 ? float_bits(1.33333333f)
                                              : float_bits(1.14285714f);
    const uint32_t power = (254u << 23) - (bits & 0x7F800000u); /* 1 / 2^floor(log2(scale)) */
    return bits_float((bits & 0x80000000u) | (quarters == 0 ? power : power - (128u << 23) + mantissa));
}

/* How values of a block with this scale byte are rounded: block_step_of and scaled_block_step_of, without divisions. */
template <bool SCALED>
__device__ inline block_step step_of_byte(uint32_t byte, uint32_t mantissa_bits)
{
    block_step step = unit_step(mantissa_bits);
    if (SCALED) {
        step.step = scale_of_code(byte);
        step.inverse.first = byte == 0 ? 0.0f : inverse_of_scale(step.step);
    } else {
        step.inverse = step_inverse_of(byte, mantissa_bits);
        const auto inverse_of_power = [](float power) { return bits_float((254u << 23) - float_bits(power)); };
        step.step =
            byte == 0 ? 0.0f : __fmul_rn(inverse_of_power(step.inverse.first), inverse_of_power(step.inverse.second));
    }
    step.low = byte == 0 ? 0.0f : step.low;
    step.high = byte == 0 ? 0.0f : step.high;
    return step;
}

/* y in units of a step. */
template <bool SCALED>
__device__ inline float units_of(float y, const step_inverse &inverse)
{
    return SCALED ? __fmul_rn(y, inverse.first) : units_of_step(y, inverse);
}

/* The value of larger magnitude; of equal ones the first. */
__device__ inline float larger_of(float first, float second)
{
    return fabsf(second) > fabsf(first) ? second : first;
}

/* The two scale bytes that a block may have, and the squared errors of both. */
template <bool SCALED>
struct scale_trial {
    block_step unit; /* limits of mantissas */
    uint32_t byte;   /* the first; the other is one less */
    bool may_lower;
    step_inverse inverses[2];
    float weights[2]; /* of squared errors in units of a step */

    /* first_largest: the value of largest magnitude, the first of equal ones. */
    __device__ void begin(float first_largest, uint32_t mantissa_bits)
    {
        unit = unit_step(mantissa_bits);
        const float largest = fabsf(first_largest);
        if (SCALED) {
            /* the largest over 2^(mantissa_bits - 1) */
            const uint32_t above =
                min(scale_code_above(__fmul_rn(largest, bits_float((128 - mantissa_bits) << 23))), 0x7Bu);
            byte = above | (first_largest > 0.0f && above > 0 ? 0x80u : 0u);
            may_lower = above > 1;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const block_step step = step_of_byte<SCALED>(byte - (may_lower ? i : 0), mantissa_bits);
                inverses[i] = step.inverse;
                weights[i] = __fmul_rn(step.step, step.step);
            }
        } else {
            byte = float_bits(largest) >> 23;
            may_lower = byte > 1;
            inverses[0] = step_inverse_of(byte, mantissa_bits);
            weights[0] = 4.0f, weights[1] = 1.0f;
        }
    }

    /* What the two leave of y, in units of their steps. */
    __device__ void errors(float y, float (&r)[2]) const
    {
        float u[2];
        u[0] = units_of<SCALED>(y, inverses[0]);
        u[1] = SCALED ? units_of<SCALED>(y, inverses[1]) : __fmul_rn(2.0f, u[0]);
#pragma unroll
        for (int i = 0; i < 2; i++)
            r[i] = __fsub_rn(u[i], mantissa_of(mantissa_bits_of(u[i], unit.low, unit.high)));
    }

    /* The scale byte. sums: of squared errors, of both. */
    __device__ uint32_t choose(float sum, float sum_of_lower) const
    {
        return may_lower && __fmul_rn(sum_of_lower, weights[1]) < __fmul_rn(sum, weights[0]) ? byte - 1 : byte;
    }
};

#endif /* KSORT_CUDA_PACK_SCALES_CUH */
