/* Reductions of several registers side by side. */
#ifndef KSORT_REDUCE_AVX512_H
#define KSORT_REDUCE_AVX512_H

#include <immintrin.h>

#include "common.h"

ALWAYS_INLINE __m256 halves_maximum(__m512 x)
{
    return _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
}

/* Element i: the largest lane of x[i]. */
ALWAYS_INLINE __m128 maxima_of_four(const __m512 x[4])
{
    __m256 a = halves_maximum(x[0]), b = halves_maximum(x[1]), c = halves_maximum(x[2]), d = halves_maximum(x[3]);
    __m256 ab = _mm256_max_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)); /* a b a b in each half */
    __m256 cd = _mm256_max_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    __m256 abcd = _mm256_max_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE));
    return _mm_max_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
}

/* Element i: the sum of the lanes of x[i]. */
ALWAYS_INLINE __m128 sums_of_four(const __m512 x[4])
{
    __m128 quarters[4];
    for (int i = 0; i < 4; i++) {
        __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x[i]), _mm512_extractf32x8_ps(x[i], 1));
        quarters[i] = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    }
    return _mm_hadd_ps(_mm_hadd_ps(quarters[0], quarters[1]), _mm_hadd_ps(quarters[2], quarters[3]));
}

#endif /* KSORT_REDUCE_AVX512_H */
