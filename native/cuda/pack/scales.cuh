/* Scale bytes of transformed heads, as FORMAT.md section 3 chooses them: two are tried, and that which leaves the
 * smaller squared error is taken. Lanes hold quads, four neighbouring channels of a token; four neighbouring lanes a
 * unit of 16 channels:
 *
 *     lane % 4             0            1            2            3
 *     channels of a unit   0 1 2 3      4 5 6 7      8 9 10 11    12 13 14 15
 *     partial sums         0 1 2 3      4 5 6 7      ...                         sum c % 16 is in the lane of channel c
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

/* The largest value of a block and the largest of its negatives, both at least 0; of BFP only the larger counts. */
struct extremes {
    float top, bottom;

    __device__ void add(const float (&y)[QUAD_CHANNELS])
    {
#pragma unroll
        for (int j = 0; j < QUAD_CHANNELS; j++)
            top = fmaxf(top, y[j]), bottom = fmaxf(bottom, -y[j]);
    }
    __device__ void add(const extremes &other) { top = fmaxf(top, other.top), bottom = fmaxf(bottom, other.bottom); }
    /* Those of lanes that differ in one bit become the same. */
    __device__ void share(uint32_t apart)
    {
        add(extremes{__shfl_xor_sync(ALL_LANES, top, apart), __shfl_xor_sync(ALL_LANES, bottom, apart)});
    }
    /* The first of the largest magnitudes decides the sign. */
    __device__ bool is_tie() const { return top == bottom && top > 0.0f; }
};

/* A bit for each block of a head's row in shared memory: whether the first of its largest magnitudes is positive. Slow:
 * for ties. */
template <int HEAD_DIM, class Channel>
__device__ inline uint32_t signs_of_blocks(uint32_t block_size, Channel channel)
{
    uint32_t positive = 0;
    float largest = 0.0f;
#pragma unroll 1
    for (uint32_t c = 0; c < HEAD_DIM; c++) {
        const uint32_t bit = 1u << c / UNIT_CHANNELS / (block_size / UNIT_CHANNELS);
        const float y = channel(c);
        if ((c & (block_size - 1)) == 0)
            largest = 0.0f;
        if (fabsf(y) > largest) {
            largest = fabsf(y);
            positive = y > 0.0f ? positive | bit : positive & ~bit;
        }
    }
    return positive;
}

/* The two scale bytes that a block may have, and the squared errors of both. */
template <bool SCALED>
struct scale_trial {
    block_step unit; /* limits of mantissas */
    uint32_t byte;   /* the first; the other is one less */
    bool may_lower;
    step_inverse inverses[2];
    float weights[2]; /* of squared errors in units of a step */

    __device__ void begin(const extremes &block, bool is_positive, uint32_t mantissa_bits)
    {
        unit = unit_step(mantissa_bits);
        const float largest = fmaxf(block.top, block.bottom);
        if (SCALED) {
            /* the largest over 2^(mantissa_bits - 1) */
            const uint32_t above =
                min(scale_code_above(__fmul_rn(largest, bits_float((128 - mantissa_bits) << 23))), 0x7Bu);
            byte = above | (is_positive && above > 0 ? 0x80u : 0u);
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

    /* The scale byte. sums: of the lane's partial sums. */
    __device__ uint32_t choose(float (&sums)[2][QUAD_CHANNELS]) const
    {
        float total[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
            for (uint32_t apart = 2; apart > 0; apart /= 2)
#pragma unroll
                for (int j = 0; j < QUAD_CHANNELS; j++)
                    sums[i][j] = __fadd_rn(sums[i][j], __shfl_xor_sync(ALL_LANES, sums[i][j], apart));
            total[i] = __fadd_rn(__fadd_rn(sums[i][0], sums[i][2]), __fadd_rn(sums[i][1], sums[i][3]));
            total[i] = __fmul_rn(total[i], weights[i]);
        }
        return may_lower && total[1] < total[0] ? byte - 1 : byte;
    }
};

#endif /* KSORT_CUDA_PACK_SCALES_CUH */
