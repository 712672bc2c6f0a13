/* Half a strip's stored words and exponents, in AVX2 registers whose lanes are its 8 tokens; see quads_avx512.h. */
#ifndef KSORT_QUADS_AVX2_H
#define KSORT_QUADS_AVX2_H

#include "x86/lanes_avx2.h"

typedef __m256i quad_lanes;

/* The scales of a block of 8 tokens: 2^(exponent - 127), or SBFP's own, the upper bytes of f16. is_scaled is a
 * constant. */
ALWAYS_INLINE lanes block_scales(const uint8_t *codes, const bool is_scaled)
{
    __m128i bytes = _mm_loadl_epi64((const __m128i *)codes);
    if (is_scaled)
        return _mm256_cvtph_ps(_mm_unpacklo_epi8(_mm_setzero_si128(), bytes));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu8_epi32(bytes), 23));
}

ALWAYS_INLINE lanes quads_to_float(quad_lanes sums)
{
    return _mm256_cvtepi32_ps(sums);
}

/* Byte `byte` of every lane, sign-extended, as float. `byte` is a constant. */
ALWAYS_INLINE lanes byte_to_float(quad_lanes quad, const int byte)
{
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(quad, 24 - 8 * byte), 24));
}

ALWAYS_INLINE __m256i mask_bytes(__m256i x, char mask)
{
    return _mm256_and_si256(x, _mm256_set1_epi8(mask));
}

/* Mantissas of fewer than 8 bits, in the low bits of bytes: flip the sign bit, then subtract its weight. */
ALWAYS_INLINE __m256i sign_extend(__m256i bytes, char sign_bit)
{
    const __m256i sign = _mm256_set1_epi8(sign_bit);
    return _mm256_sub_epi8(_mm256_xor_si256(bytes, sign), sign);
}

/* Word w of the 8 tokens from first_token on. */
ALWAYS_INLINE __m256i load_word(const struct tile_span *span, uint32_t w, uint32_t first_token)
{
    return _mm256_loadu_si256((const __m256i *)(span->tile + word_offset(span->layout, w, first_token)));
}

/* Words 0, 1, 2 of a group of SBFP11 -> 8 quads. */
ALWAYS_INLINE void unpack_sbfp11(__m256i low0123, __m256i low4567, __m256i high, __m256i quads[8])
{
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        __m256i low = mask_bytes(_mm256_srli_epi32(i < 4 ? low0123 : low4567, 2 * (i % 4)), 0x03);
        __m256i sign = i < 2 ? _mm256_slli_epi32(high, 2 - i) : _mm256_srli_epi32(high, i - 2);
        quads[i] = sign_extend(_mm256_or_si256(low, mask_bytes(sign, 0x04)), 0x04);
    }
}

/* All quads of the 8 tokens from first_token on, mantissas sign-extended to bytes. */
ALWAYS_INLINE void unpack_quads(const struct tile_span *span, uint32_t first_token, __m256i *quads)
{
    const uint32_t n_words = span->layout->n_words;
    if (span->layout->mantissa_bits == 4) {
        for (uint32_t w = 0; w < n_words; w++) {
            __m256i word = load_word(span, w, first_token);
            quads[2 * w] = sign_extend(mask_bytes(word, 0x0F), 0x08);
            quads[2 * w + 1] = sign_extend(mask_bytes(_mm256_srli_epi32(word, 4), 0x0F), 0x08);
        }
    } else if (span->layout->mantissa_bits == 6) {
        for (uint32_t w = 0; w < n_words; w += 3, quads += 4) {
            __m256i low01 = load_word(span, w, first_token), low23 = load_word(span, w + 1, first_token);
            __m256i high = load_word(span, w + 2, first_token);
            __m256i low[4] = {low01, _mm256_srli_epi32(low01, 4), low23, _mm256_srli_epi32(low23, 4)};
            __m256i high_at_4[4] = {_mm256_slli_epi32(high, 4), _mm256_slli_epi32(high, 2), high,
                                    _mm256_srli_epi32(high, 2)};
            for (int i = 0; i < 4; i++)
                quads[i] = sign_extend(_mm256_or_si256(mask_bytes(low[i], 0x0F), mask_bytes(high_at_4[i], 0x30)), 0x20);
        }
    } else if (span->layout->mantissa_bits == 3) {
        for (uint32_t w = 0; w < n_words; w += 3, quads += 8)
            unpack_sbfp11(load_word(span, w, first_token), load_word(span, w + 1, first_token),
                          load_word(span, w + 2, first_token), quads);
    } else {
        for (uint32_t w = 0; w < n_words; w++)
            quads[w] = load_word(span, w, first_token);
    }
}

/* Transposes four neighbouring quads of 8 tokens: token t's 16 mantissas go to rows[t]. Within each 128-bit half, which
 * holds four tokens, it is a 4 x 4 transposition. */
ALWAYS_INLINE void store_mantissa_rows(const __m256i quads[4], int8_t rows[LANES][16])
{
    __m256i low01 = _mm256_unpacklo_epi32(quads[0], quads[1]), high01 = _mm256_unpackhi_epi32(quads[0], quads[1]);
    __m256i low23 = _mm256_unpacklo_epi32(quads[2], quads[3]), high23 = _mm256_unpackhi_epi32(quads[2], quads[3]);
    __m256i tokens[4] = {_mm256_unpacklo_epi64(low01, low23), _mm256_unpackhi_epi64(low01, low23),
                         _mm256_unpacklo_epi64(high01, high23), _mm256_unpackhi_epi64(high01, high23)};
    for (int i = 0; i < 4; i++) {
        _mm_storeu_si128((__m128i *)rows[i], _mm256_castsi256_si128(tokens[i]));
        _mm_storeu_si128((__m128i *)rows[i + 4], _mm256_extracti128_si256(tokens[i], 1));
    }
}

#endif /* KSORT_QUADS_AVX2_H */
