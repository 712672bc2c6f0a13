/* Sixteen stored values of a row, as floats. */
#ifndef KSORT_FLOAT_ROWS_AVX512_H
#define KSORT_FLOAT_ROWS_AVX512_H

#include <immintrin.h>

#include "x86/x86.h"

/* Values i .. i+15 of a row; `lanes` says which exist, the others are 0. `type` is a constant. */
ALWAYS_INLINE __m512 load_values(const void *row, const uint32_t type, size_t i, __mmask16 lanes)
{
    if (type == KSORT_F32)
        return _mm512_maskz_loadu_ps(lanes, (const float *)row + i);
    __m256i halves = _mm256_maskz_loadu_epi16(lanes, (const uint16_t *)row + i);
    if (type == KSORT_F16)
        return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

/* Lanes of values i .. i+15 that lie below n. */
ALWAYS_INLINE __mmask16 lanes_below(uint32_t n, uint32_t i)
{
    return (__mmask16)(i >= n ? 0 : n - i < 16 ? (1u << (n - i)) - 1 : 0xFFFFu);
}

#endif /* KSORT_FLOAT_ROWS_AVX512_H */
