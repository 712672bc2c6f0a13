/* What the kernels that are written once for all vector levels (template/) need of AVX-512: registers of 16 floats.
 * "Values below n" of a load or store: those from n on are 0, or stay as they are. */
#ifndef KSORT_LANES_AVX512_H
#define KSORT_LANES_AVX512_H

#include <immintrin.h>

#include "x86/x86.h"

#define LANES 16
typedef __m512 lanes;
typedef int32_t lanes_int __attribute__((vector_size(64)));
typedef __mmask16 lanes_mask;

ALWAYS_INLINE lanes lanes_round(lanes x)
{
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

ALWAYS_INLINE lanes lanes_all(float x)
{
    return _mm512_set1_ps(x);
}

ALWAYS_INLINE lanes lanes_load(const float *x)
{
    return _mm512_loadu_ps(x);
}

ALWAYS_INLINE void lanes_store(float *x, lanes values)
{
    _mm512_storeu_ps(x, values);
}

/* a * b + c, rounded once. */
ALWAYS_INLINE lanes lanes_multiply_add(lanes a, lanes b, lanes c)
{
    return _mm512_fmadd_ps(a, b, c);
}

/* c - a * b, rounded once. */
ALWAYS_INLINE lanes lanes_minus_product(lanes c, lanes a, lanes b)
{
    return _mm512_fnmadd_ps(a, b, c);
}

ALWAYS_INLINE lanes lanes_min(lanes a, lanes b)
{
    return _mm512_min_ps(a, b);
}

ALWAYS_INLINE lanes lanes_max(lanes a, lanes b)
{
    return _mm512_max_ps(a, b);
}

ALWAYS_INLINE lanes_int lanes_max_int(lanes_int a, lanes_int b)
{
    return (lanes_int)_mm512_max_epi32((__m512i)a, (__m512i)b);
}

ALWAYS_INLINE lanes_int lanes_to_int(lanes x)
{
    return (lanes_int)_mm512_cvtps_epi32(x);
}

/* Four channels' mantissas as the bytes of 16 tokens' quads: first [4 channels][4 tokens] bytes in each 128-bit part. */
ALWAYS_INLINE lanes_int lanes_quad(lanes a, lanes b, lanes c, lanes d)
{
    const __m512i by_token =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    __m512i ab = _mm512_packs_epi32(_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b));
    __m512i cd = _mm512_packs_epi32(_mm512_cvtps_epi32(c), _mm512_cvtps_epi32(d));
    return (lanes_int)_mm512_shuffle_epi8(_mm512_packs_epi16(ab, cd), by_token);
}

/* Lane i in all lanes. */
ALWAYS_INLINE lanes lanes_broadcast(lanes x, uint32_t i)
{
    return _mm512_permutexvar_ps(_mm512_set1_epi32((int32_t)i), x);
}

/* Lanes begin .. end-1, begin <= end <= 16. */
ALWAYS_INLINE lanes_mask lanes_between(uint32_t begin, uint32_t end)
{
    return (lanes_mask)((1u << end) - (1u << begin));
}

/* Lanes outside the mask are 0, and their memory is not touched. */
ALWAYS_INLINE lanes load_masked(const float *x, lanes_mask mask)
{
    return _mm512_maskz_loadu_ps(mask, x);
}

/* Lanes of `inside` in the mask, of `outside` elsewhere. */
ALWAYS_INLINE lanes lanes_select(lanes_mask mask, lanes inside, lanes outside)
{
    return _mm512_mask_mov_ps(outside, mask, inside);
}

/* Values i .. i+15 of x, i < n, below n. Whole registers go without a mask, which costs time. */
ALWAYS_INLINE lanes load_below(const float *x, uint32_t n, uint32_t i)
{
    return n - i >= LANES ? _mm512_loadu_ps(x + i) : load_masked(x + i, lanes_between(0, n - i));
}

ALWAYS_INLINE void store_below(float *x, uint32_t n, uint32_t i, lanes values)
{
    if (n - i >= LANES)
        _mm512_storeu_ps(x + i, values);
    else
        _mm512_mask_storeu_ps(x + i, lanes_between(0, n - i), values);
}

/* Integers as bytes, n of them, n up to 16. */
ALWAYS_INLINE void store_bytes(int8_t *out, uint32_t n, lanes_int values)
{
    _mm512_mask_cvtepi32_storeu_epi8(out, lanes_between(0, n), (__m512i)values);
}

/* table[indices[i]] .. table[indices[i + 15]] of indices below n_indices. table [n] is aligned, with room up to a
 * multiple of 32. One instruction finds five bits of an index in a pair of registers; the higher bits choose among
 * pairs. An index from n on finds anything. */
ALWAYS_INLINE lanes look_up(const float *table, uint32_t n, const uint16_t *indices, uint32_t n_indices, uint32_t i)
{
    __m256i words = n_indices - i >= LANES ? _mm256_loadu_si256((const __m256i *)(indices + i))
                                           : _mm256_maskz_loadu_epi16(lanes_between(0, n_indices - i), indices + i);
    __m512i index = _mm512_cvtepu16_epi32(words);
    lanes found = _mm512_permutex2var_ps(_mm512_load_ps(table), index, _mm512_load_ps(table + 16));
    for (uint32_t first = 32; first < n; first += 32) {
        __mmask16 is_here = _mm512_cmpge_epu32_mask(index, _mm512_set1_epi32((int32_t)first));
        lanes here = _mm512_permutex2var_ps(_mm512_load_ps(table + first), index, _mm512_load_ps(table + first + 16));
        found = _mm512_mask_mov_ps(found, is_here, here);
    }
    return found;
}

/* out[c] lane r = rows[r] lane c. Pairs of rows, then fours within 128-bit parts, then the parts of four registers. */
ALWAYS_INLINE void transpose_lanes(const lanes rows[LANES], lanes out[LANES])
{
    __m512d pairs[16];
    lanes fours[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_castps_pd(_mm512_unpacklo_ps(rows[i], rows[i + 1]));
        pairs[i + 1] = _mm512_castps_pd(_mm512_unpackhi_ps(rows[i], rows[i + 1]));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) /* fours[i + k]: rows i .. i + 3 of columns k, 4 + k, 8 + k, 12 + k */
#pragma GCC unroll 2
        for (int k = 0; k < 2; k++) {
            fours[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs[i + k], pairs[i + 2 + k]));
            fours[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs[i + k], pairs[i + 2 + k]));
        }
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
        lanes upper_even = _mm512_shuffle_f32x4(fours[k], fours[4 + k], 0x88); /* columns k and 8 + k of rows 0 .. 7 */
        lanes upper_odd = _mm512_shuffle_f32x4(fours[k], fours[4 + k], 0xDD);  /* columns 4 + k and 12 + k */
        lanes lower_even = _mm512_shuffle_f32x4(fours[8 + k], fours[12 + k], 0x88);
        lanes lower_odd = _mm512_shuffle_f32x4(fours[8 + k], fours[12 + k], 0xDD);
        out[k] = _mm512_shuffle_f32x4(upper_even, lower_even, 0x88);
        out[4 + k] = _mm512_shuffle_f32x4(upper_odd, lower_odd, 0x88);
        out[8 + k] = _mm512_shuffle_f32x4(upper_even, lower_even, 0xDD);
        out[12 + k] = _mm512_shuffle_f32x4(upper_odd, lower_odd, 0xDD);
    }
}

#endif /* KSORT_LANES_AVX512_H */
