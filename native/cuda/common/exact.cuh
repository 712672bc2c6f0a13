/* Exact rows as attention reads them: which of the slots that a query sees they are, and queries in two f16 parts. */
#ifndef KSORT_CUDA_COMMON_EXACT_CUH
#define KSORT_CUDA_COMMON_EXACT_CUH

#include "common/device.cuh"

/* The slots first .. end-1 that a query sees, in three sections, of which any may be empty:
 *
 *     | sinks |---- packed ----|-- tail --|
 *     first   sinks_end        tail_begin end
 */
struct slot_sections {
    uint32_t first, sinks_end, tail_begin, end;
};

/* exact: zeros where a cache has none, then all slots are packed. begin: exact.begin of the context. */
__device__ inline slot_sections sections_of(const ksort_cuda_exact &exact, uint32_t begin, uint32_t first, uint32_t end)
{
    const uint32_t sinks_end = min(max(exact.n_sinks, first), end);
    const uint32_t tail_begin = min(max(end - min(exact.n_tail, end), begin), end);
    return {first, sinks_end, max(tail_begin, sinks_end), end};
}

__device__ inline uint32_t exact_begin(const ksort_cuda_exact &exact, uint32_t context)
{
    return exact.begin ? (uint32_t)exact.begin[context] : 0;
}

/* A query is factor times an array of numbers below 2^11 in magnitude, `inverse` times the query: each the sum of two
 * f16 numbers, the second what rounding to the first left, but for 2^-25. So 2^-36 of the largest is lost, or, of
 * numbers that are near it, 2^-24. */
struct query_scale {
    float inverse, factor;
};

/* largest: the row's largest magnitude as float bits; a row that is not finite becomes zeros. */
__device__ inline query_scale query_scale_of(uint32_t largest)
{
    constexpr uint32_t TOP = 10, LEAST = TOP + 1, INFINITE = 0xFF; /* exponents */
    const uint32_t exponent = max(largest >> 23, LEAST);
    if (exponent >= INFINITE)
        return {0.0f, 0.0f};
    return {__uint_as_float((127 + 127 + TOP - exponent) << 23), __uint_as_float((exponent - TOP) << 23)};
}

struct query_parts {
    __half high, low;
};

__device__ inline query_parts parts_of_query(float x, const query_scale &scale)
{
    if (scale.inverse == 0.0f)
        return {__float2half_rn(0.0f), __float2half_rn(0.0f)};
    const __half high = __float2half_rn(x * scale.inverse);
    return {high, __float2half_rn(x * scale.inverse - __half2float(high))};
}

#endif /* KSORT_CUDA_COMMON_EXACT_CUH */
