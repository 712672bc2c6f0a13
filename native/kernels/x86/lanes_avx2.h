/* What the kernels that are written once for all vector levels (template/) need of AVX2: registers of 8 floats. See
 * lanes_avx512.h. */
#ifndef KSORT_LANES_AVX2_H
#define KSORT_LANES_AVX2_H

#include <immintrin.h>

#include "x86/x86.h"

#define LANES 8
typedef __m256 lanes;
typedef int32_t lanes_int __attribute__((vector_size(32)));
typedef __m256i lanes_mask; /* all bits of a lane, or none */

ALWAYS_INLINE lanes lanes_round(lanes x)
{
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

ALWAYS_INLINE lanes lanes_all(float x)
{
    return _mm256_set1_ps(x);
}

ALWAYS_INLINE lanes lanes_load(const float *x)
{
    return _mm256_loadu_ps(x);
}

ALWAYS_INLINE void lanes_store(float *x, lanes values)
{
    _mm256_storeu_ps(x, values);
}

/* a * b + c, rounded once. */
ALWAYS_INLINE lanes lanes_multiply_add(lanes a, lanes b, lanes c)
{
    return _mm256_fmadd_ps(a, b, c);
}

/* c - a * b, rounded once. */
ALWAYS_INLINE lanes lanes_minus_product(lanes c, lanes a, lanes b)
{
    return _mm256_fnmadd_ps(a, b, c);
}

ALWAYS_INLINE lanes lanes_min(lanes a, lanes b)
{
    return _mm256_min_ps(a, b);
}

ALWAYS_INLINE lanes lanes_max(lanes a, lanes b)
{
    return _mm256_max_ps(a, b);
}

ALWAYS_INLINE lanes_int lanes_max_int(lanes_int a, lanes_int b)
{
    return (lanes_int)_mm256_max_epi32((__m256i)a, (__m256i)b);
}

ALWAYS_INLINE lanes_int lanes_to_int(lanes x)
{
    return (lanes_int)_mm256_cvtps_epi32(x);
}

/* Four channels' mantissas as the bytes of 8 tokens' quads: first [4 channels][4 tokens] bytes in each 128-bit half. */
ALWAYS_INLINE lanes_int lanes_quad(lanes a, lanes b, lanes c, lanes d)
{
    const __m256i by_token = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0, 4, 8, 12, 1, 5,
                                              9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m256i ab = _mm256_packs_epi32(_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b));
    __m256i cd = _mm256_packs_epi32(_mm256_cvtps_epi32(c), _mm256_cvtps_epi32(d));
    return (lanes_int)_mm256_shuffle_epi8(_mm256_packs_epi16(ab, cd), by_token);
}

/* Lane i in all lanes. */
ALWAYS_INLINE lanes lanes_broadcast(lanes x, uint32_t i)
{
    return _mm256_permutevar8x32_ps(x, _mm256_set1_epi32((int32_t)i));
}

/* Lanes begin .. end-1. */
ALWAYS_INLINE lanes_mask lanes_between(uint32_t begin, uint32_t end)
{
    const lanes_int lane = {0, 1, 2, 3, 4, 5, 6, 7};
    return (lanes_mask)((lane >= (int32_t)begin) & (lane < (int32_t)end));
}

/* Lanes outside the mask are 0, and their memory is not touched. */
ALWAYS_INLINE lanes load_masked(const float *x, lanes_mask mask)
{
    return _mm256_maskload_ps(x, mask);
}

/* Lanes of `inside` in the mask, of `outside` elsewhere. */
ALWAYS_INLINE lanes lanes_select(lanes_mask mask, lanes inside, lanes outside)
{
    return _mm256_blendv_ps(outside, inside, _mm256_castsi256_ps(mask));
}

/* Values i .. i+7 of x, i < n, below n. */
ALWAYS_INLINE lanes load_below(const float *x, uint32_t n, uint32_t i)
{
    return n - i >= LANES ? _mm256_loadu_ps(x + i) : load_masked(x + i, lanes_between(0, n - i));
}

ALWAYS_INLINE void store_below(float *x, uint32_t n, uint32_t i, lanes values)
{
    if (n - i >= LANES)
        _mm256_storeu_ps(x + i, values);
    else
        _mm256_maskstore_ps(x + i, lanes_between(0, n - i), values);
}

/* Integers as bytes, n of them, n up to 8. */
ALWAYS_INLINE void store_bytes(int8_t *out, uint32_t n, lanes_int values)
{
    __m256i x = (__m256i)values;
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    int64_t bytes = _mm_cvtsi128_si64(_mm_packs_epi16(words, words));
    memcpy(out, &bytes, n);
}

/* table[indices[0]] .. table[indices[7]], by eight loads: on Zen 4 they take less time than a gather. */
ALWAYS_INLINE lanes look_up_eight(const float *table, const uint16_t *indices)
{
    return _mm256_setr_ps(table[indices[0]], table[indices[1]], table[indices[2]], table[indices[3]], table[indices[4]],
                          table[indices[5]], table[indices[6]], table[indices[7]]);
}

/* table[indices[i]] .. table[indices[i + 7]] of indices below n_indices; all of them are below n. */
ALWAYS_INLINE lanes look_up(const float *table, uint32_t n, const uint16_t *indices, uint32_t n_indices, uint32_t i)
{
    (void)n;
    if (n_indices - i >= LANES)
        return look_up_eight(table, indices + i);
    uint16_t rest[LANES] = {0};
    memcpy(rest, indices + i, (n_indices - i) * sizeof *indices);
    return look_up_eight(table, rest);
}

/* out[c] lane r = rows[r] lane c. Pairs of rows, then fours within 128-bit halves, then the halves of two registers. */
ALWAYS_INLINE void transpose_lanes(const lanes rows[LANES], lanes out[LANES])
{
    lanes pairs[8], fours[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) /* fours[i + k]: rows i .. i + 3 of columns k and 4 + k */
#pragma GCC unroll 2
        for (int k = 0; k < 2; k++) {
            fours[i + 2 * k] = _mm256_shuffle_ps(pairs[i + k], pairs[i + 2 + k], 0x44);
            fours[i + 2 * k + 1] = _mm256_shuffle_ps(pairs[i + k], pairs[i + 2 + k], 0xEE);
        }
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
        out[k] = _mm256_permute2f128_ps(fours[k], fours[4 + k], 0x20);
        out[4 + k] = _mm256_permute2f128_ps(fours[k], fours[4 + k], 0x31);
    }
}

#endif /* KSORT_LANES_AVX2_H */
