/* Rounding of a head to BFP by one warp, as FORMAT.md sections 1 and 3 have it, in common/transform.cuh's layout:
 * channel c = WARP * i + lane is register x[i] of N. A block of 16 channels is half of a warp's register, one of 32 a
 * register, one of 64 or 128 two or four registers.
 */
#ifndef KSORT_CUDA_COMMON_ENCODE_CUH
#define KSORT_CUDA_COMMON_ENCODE_CUH

#include "common/transform.cuh"
#include "rounding.h"

/* 1.5 * 2^23: floats next to it count units, so adding it rounds u, |u| <= 2^22, half to even, and the integer stands
 * in the sum's low bits in two's complement. */
constexpr float UNITS = 12582912.0f;

/* The mantissa of u = x / step, in the low 8 bits. NaN becomes `high`, as on the CPU: the minimum drops it. */
__device__ inline uint32_t mantissa_bits_of(float u, float low, float high)
{
    return float_bits(__fadd_rn(fmaxf(fminf(u, high), low), UNITS));
}

/* The same as a number; never -0. */
__device__ inline float mantissa_of(uint32_t bits)
{
    return __fsub_rn(bits_float(bits), UNITS);
}

__device__ inline float units_of_step(float x, const struct step_inverse &inverse)
{
    return __fmul_rn(__fmul_rn(x, inverse.first), inverse.second);
}

__device__ inline uint32_t magnitude_bits(float x)
{
    return float_bits(x) & 0x7FFFFFFFu;
}

/* The larger of |a| and |b|; NaN where either is. */
__device__ inline float larger_magnitude(float a, float b)
{
    float larger;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(fabsf(a)), "f"(fabsf(b)));
    return larger;
}

/* Each register's magnitudes[i]: the largest |x| of the block it belongs to, as float bits. */
template <int N>
__device__ inline void block_magnitudes(const float (&x)[N], uint32_t block_size, uint32_t (&magnitudes)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++) {
        magnitudes[i] = magnitude_bits(x[i]);
        if (block_size >= WARP) {
            magnitudes[i] = __reduce_max_sync(ALL_LANES, magnitudes[i]);
            continue;
        }
#pragma unroll
        for (int apart = 1; apart < 16; apart *= 2)
            magnitudes[i] = max(magnitudes[i], __shfl_xor_sync(ALL_LANES, magnitudes[i], apart));
    }
#pragma unroll
    for (int apart = 1; apart < N; apart *= 2)
#pragma unroll
        for (int i = 0; i + apart < N; i++)
            if (!(i & apart) && apart * WARP < (int)block_size)
                magnitudes[i] = magnitudes[i + apart] = max(magnitudes[i], magnitudes[i + apart]);
}

#endif /* KSORT_CUDA_COMMON_ENCODE_CUH */
