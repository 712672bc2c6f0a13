/* Eight stored values of a row as floats, and the sum of eight. */
#ifndef KSORT_FLOAT_ROWS_AVX2_H
#define KSORT_FLOAT_ROWS_AVX2_H

#include <immintrin.h>

#include "x86/x86.h"

/* Values i .. i+7 of a row. `type` is a constant. */
ALWAYS_INLINE __m256 load_values(const void *row, const uint32_t type, size_t i)
{
    if (type == KSORT_F32)
        return _mm256_loadu_ps((const float *)row + i);
    __m128i halves = _mm_loadu_si128((const __m128i *)((const uint16_t *)row + i));
    if (type == KSORT_F16)
        return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

ALWAYS_INLINE float sum_of_lanes(__m256 x)
{
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_hadd_ps(half, half);
    return _mm_cvtss_f32(_mm_hadd_ps(half, half));
}

#endif /* KSORT_FLOAT_ROWS_AVX2_H */
