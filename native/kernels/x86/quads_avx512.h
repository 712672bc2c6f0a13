/* A strip's stored words and exponents, in AVX-512 registers whose lanes are its 16 tokens: words as quads, quads as rows
 * of mantissas. */
#ifndef KSORT_QUADS_AVX512_H
#define KSORT_QUADS_AVX512_H

#include "x86/lanes_avx512.h"

typedef __m512i quad_lanes;

/* The scales of a block of 16 tokens: 2^(exponent - 127), or SBFP's own, the upper bytes of f16. is_scaled is a
 * constant. */
ALWAYS_INLINE lanes block_scales(const uint8_t *codes, const bool is_scaled)
{
    __m128i bytes = _mm_loadu_si128((const __m128i *)codes);
    if (is_scaled)
        return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes), 23));
}

ALWAYS_INLINE lanes quads_to_float(quad_lanes sums)
{
    return _mm512_cvtepi32_ps(sums);
}

/* Byte `byte` of every lane, sign-extended, as float. `byte` is a constant. */
ALWAYS_INLINE lanes byte_to_float(quad_lanes quad, const int byte)
{
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(quad, 24 - 8 * byte), 24));
}

ALWAYS_INLINE __m512i mask_bytes(__m512i x, char mask)
{
    return _mm512_and_si512(x, _mm512_set1_epi8(mask));
}

/* Words 0, 1, 2 of a group of SBFP11 -> 8 quads, mantissas plus 4 less `bias`. */
ALWAYS_INLINE void unpack_flipped_sbfp11(const __m512i words[3], __m512i bias, __m512i quads[8])
{
    const __m512i high = _mm512_xor_si512(words[2], _mm512_set1_epi8(-1));
#pragma GCC unroll 8
    for (uint32_t i = 0; i < 8; i++) {
        __m512i low = mask_bytes(_mm512_srli_epi32(words[i / 4], 2 * (i % 4)), 0x03);
        __m512i sign = i < 2 ? _mm512_slli_epi32(high, 2 - i) : _mm512_srli_epi32(high, i - 2);
        quads[i] = _mm512_sub_epi8(_mm512_or_si512(low, mask_bytes(sign, 0x04)), bias);
    }
}

/* All quads of the 16 tokens from first_token on, mantissas plus 2^(mantissa_bits-1), less `bias`, in bytes. Flipping a
 * mantissa's sign bit adds that number; as the words hold sign bits at fixed places, one exclusive or a word flips them
 * all. */
ALWAYS_INLINE void unpack_flipped_quads(const struct tile_span *span, uint32_t first_token, __m512i bias,
                                        __m512i *quads)
{
    const struct head_layout *layout = span->layout;
    const __m512i *in = (const __m512i *)(span->tile + word_offset(layout, 0, first_token));
    if (layout->mantissa_bits == 4) {
        for (uint32_t w = 0; w < layout->n_words; w++) {
            __m512i word = _mm512_xor_si512(in[w], _mm512_set1_epi8((char)0x88));
            quads[2 * w] = _mm512_sub_epi8(mask_bytes(word, 0x0F), bias);
            quads[2 * w + 1] = _mm512_sub_epi8(mask_bytes(_mm512_srli_epi32(word, 4), 0x0F), bias);
        }
    } else if (layout->mantissa_bits == 6) {
        for (uint32_t w = 0; w < layout->n_words; w += 3, quads += 4) {
            __m512i high = _mm512_xor_si512(in[w + 2], _mm512_set1_epi8((char)0xAA));
            __m512i q0 = _mm512_or_si512(mask_bytes(in[w], 0x0F), mask_bytes(_mm512_slli_epi32(high, 4), 0x30));
            __m512i q1 = _mm512_or_si512(mask_bytes(_mm512_srli_epi32(in[w], 4), 0x0F),
                                         mask_bytes(_mm512_slli_epi32(high, 2), 0x30));
            __m512i q2 = _mm512_or_si512(mask_bytes(in[w + 1], 0x0F), mask_bytes(high, 0x30));
            __m512i q3 = _mm512_or_si512(mask_bytes(_mm512_srli_epi32(in[w + 1], 4), 0x0F),
                                         mask_bytes(_mm512_srli_epi32(high, 2), 0x30));
            quads[0] = _mm512_sub_epi8(q0, bias);
            quads[1] = _mm512_sub_epi8(q1, bias);
            quads[2] = _mm512_sub_epi8(q2, bias);
            quads[3] = _mm512_sub_epi8(q3, bias);
        }
    } else if (layout->mantissa_bits == 3) {
        for (uint32_t w = 0; w < layout->n_words; w += 3, quads += 8)
            unpack_flipped_sbfp11(in + w, bias, quads);
    } else {
        for (uint32_t w = 0; w < layout->n_words; w++)
            quads[w] = _mm512_sub_epi8(_mm512_xor_si512(in[w], _mm512_set1_epi8((char)0x80)), bias);
    }
}

/* The same with mantissas as they are. */
ALWAYS_INLINE void unpack_quads(const struct tile_span *span, uint32_t first_token, __m512i *quads)
{
    const __m512i bias = _mm512_set1_epi8((char)(1 << (span->layout->mantissa_bits - 1)));
    unpack_flipped_quads(span, first_token, bias, quads);
}

/* Transposes four neighbouring quads of 16 tokens: token t's 16 mantissas go to rows[t]. Two rounds of interleaving,
 * first 32-bit lanes, then 64-bit lanes:
 *     q0 = a0 b0 c0 ..   q1 = a1 b1 c1 ..   ->   a0 a1 b0 b1 ..       (a, b, c: tokens)
 *     a0 a1 b0 b1 ..     a2 a3 b2 b3 ..     ->   a0 a1 a2 a3 b0 b1 b2 b3 ..
 */
ALWAYS_INLINE void store_mantissa_rows(const __m512i quads[4], int8_t rows[STRIP_TOKENS][16])
{
    const __m512i low32 = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high32 = _mm512_add_epi32(low32, _mm512_set1_epi32(8));
    const __m512i low64 = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
    const __m512i high64 = _mm512_add_epi64(low64, _mm512_set1_epi64(4));
    for (int half = 0; half < 2; half++) {
        const __m512i index = half ? high32 : low32;
        __m512i first = _mm512_permutex2var_epi32(quads[0], index, quads[1]);
        __m512i second = _mm512_permutex2var_epi32(quads[2], index, quads[3]);
        _mm512_storeu_si512(rows[8 * half], _mm512_permutex2var_epi64(first, low64, second));
        _mm512_storeu_si512(rows[8 * half + 4], _mm512_permutex2var_epi64(first, high64, second));
    }
}

#endif /* KSORT_QUADS_AVX512_H */
