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

/* sums[i]: of the squares of the block that register i belongs to. Channel c of the block adds to partial sum c mod 16
 * in the order of channels, and the 16 are added in halves: the order that FORMAT.md fixes. */
template <int N>
__device__ inline void block_sums(const float (&squares)[N], uint32_t block_size, float (&sums)[N])
{
    const int last_of_block = (int)block_size / WARP - 1; /* in i modulo the block's registers; -1: half a register */
    float running = 0.0f;
#pragma unroll
    for (int i = 0; i < N; i++) {
        float low = __shfl_sync(ALL_LANES, squares[i], lane_of_thread() % 16);
        float high = __shfl_sync(ALL_LANES, squares[i], lane_of_thread() % 16 + 16);
        running = last_of_block < 0 || !(i & last_of_block) ? 0.0f : running;
        running = __fadd_rn(__fadd_rn(running, low), high);
        sums[i] = last_of_block < 0 ? squares[i] : running;
    }
#pragma unroll
    for (int i = N - 2; i >= 0; i--)
        if (last_of_block > 0 && (i & last_of_block) != last_of_block)
            sums[i] = sums[i + 1]; /* the whole block's stands in its last register */
#pragma unroll
    for (int i = 0; i < N; i++)
#pragma unroll
        for (int half = 8; half > 0; half /= 2)
            sums[i] = __fadd_rn(sums[i], __shfl_xor_sync(ALL_LANES, sums[i], half));
}

/* (u - mantissa of u)^2 */
__device__ inline float squared_error(float u, const struct block_step &unit)
{
    float error = __fsub_rn(u, mantissa_of(mantissa_bits_of(u, unit.low, unit.high)));
    return __fmul_rn(error, error);
}

/* exponents[i] of the block that register i belongs to: of the natural one and one less, that which leaves the smaller
 * squared error. */
template <int N>
__device__ inline void least_error_exponents(const float (&x)[N], const head_layout &layout, uint32_t (&exponents)[N])
{
    const struct block_step unit = unit_step(layout.mantissa_bits);
    block_magnitudes<N>(x, layout.block_size, exponents);
    float own[N], halved[N], own_sums[N], halved_sums[N];
#pragma unroll
    for (int i = 0; i < N; i++) {
        exponents[i] >>= 23;
        float u = units_of_step(x[i], step_inverse_of(exponents[i], layout.mantissa_bits));
        own[i] = squared_error(u, unit);
        halved[i] = squared_error(__fmul_rn(2.0f, u), unit);
    }
    block_sums<N>(own, layout.block_size, own_sums);
    block_sums<N>(halved, layout.block_size, halved_sums);
#pragma unroll
    for (int i = 0; i < N; i++)
        if (exponents[i] > 1 && halved_sums[i] < __fmul_rn(4.0f, own_sums[i]))
            exponents[i]--;
}

#endif /* KSORT_CUDA_COMMON_ENCODE_CUH */
