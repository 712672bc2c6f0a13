/* One strip of packed keys in AVX-512 registers, whose 32-bit lanes are the strip's 16 tokens:
 *
 *     word w of 16 tokens (64 bytes)  --unpack-->  quads: register q holds channels 4q .. 4q+3 of 16 tokens
 *     for up to 8 rows at once: dots of every block += quad x (query quad, the same in all lanes)
 *     scores[row][16 tokens] += dot * 2^exponent of 16 tokens * the row's factor
 *
 * No sum runs across lanes. The quads of a strip (up to 4 KB, on the stack) are unpacked once for all rows; 8 rows keep
 * 8 dots and 8 scores in registers and use each loaded quad 8 times.
 */
#ifndef KSORT_STRIP_AVX512_H
#define KSORT_STRIP_AVX512_H

#include "x86/quads_avx512.h"

#define ROWS_AT_ONCE 8

struct strip_avx512 {
    const struct head_layout *layout;
    __m512i quads[MAX_QUADS];
    __m512 scales[MAX_BLOCKS]; /* 2^(exponent - 127) of the 16 tokens, 0 where the block is zero */
};

/* sum + four products of bytes in every lane; `query` is one quad. */
typedef __m512i dot_quad_function(__m512i sum, __m512i key, int32_t query);

ALWAYS_INLINE void load_strip(const struct tile_span *keys, uint32_t first_token, bool signed_bytes,
                              struct strip_avx512 *strip)
{
    strip->layout = keys->layout;
    unpack_quads(keys->layout, keys->tile + word_offset(keys->layout, 0, first_token), signed_bytes, strip->quads);
    for (uint32_t b = 0; b < keys->layout->n_blocks; b++) {
        const uint8_t *exponents = keys->tile + exponent_offset(keys->layout, b, first_token);
        __m512i bits = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)exponents));
        strip->scales[b] = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 23));
    }
}

/* Quads of block b end here; the padding after the last channel belongs to the last block. */
ALWAYS_INLINE uint32_t block_quads_end(const struct head_layout *layout, uint32_t b)
{
    return b + 1 < layout->n_blocks ? (b + 1) * layout->block_size / 4 : layout->n_quads;
}

/* Rows first_row .. first_row+n_rows-1 by integer products. n_rows is a constant up to ROWS_AT_ONCE. */
ALWAYS_INLINE void strip_rows_by_bfp(const struct strip_avx512 *strip, const struct query_rows *queries,
                                     uint32_t first_row, const int n_rows, dot_quad_function *dot_quad,
                                     bool signed_bytes, uint32_t first_token, float (*scores)[KSORT_TILE_TOKENS])
{
    __m512 sums[ROWS_AT_ONCE];
    for (int r = 0; r < n_rows; r++)
        sums[r] = _mm512_setzero_ps();
    for (uint32_t b = 0, quad = 0; b < strip->layout->n_blocks; b++) {
        __m512i dots[ROWS_AT_ONCE];
        for (int r = 0; r < n_rows; r++)
            dots[r] = _mm512_set1_epi32(signed_bytes ? 0 : queries->offsets[first_row + r][b]);
        for (uint32_t end = block_quads_end(strip->layout, b); quad < end; quad++)
            for (int r = 0; r < n_rows; r++)
                dots[r] = dot_quad(dots[r], strip->quads[quad], queries->quads[first_row + r][quad]);
        for (int r = 0; r < n_rows; r++) {
            __m512 factor = _mm512_mul_ps(strip->scales[b], _mm512_set1_ps(queries->factors[first_row + r][b]));
            sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[r]), factor, sums[r]);
        }
    }
    for (int r = 0; r < n_rows; r++)
        _mm512_storeu_ps(&scores[first_row + r][first_token], sums[r]);
}

/* All rows and all strips of the span. */
ALWAYS_INLINE void scores_by_bfp(const struct tile_span *keys, const struct query_rows *queries,
                                 dot_quad_function *dot_quad, bool signed_bytes, float (*scores)[KSORT_TILE_TOKENS])
{
    for (uint32_t token = keys->begin / STRIP_TOKENS * STRIP_TOKENS; token < keys->end; token += STRIP_TOKENS) {
        struct strip_avx512 strip;
        prefetch_share(keys, token, STRIP_TOKENS);
        load_strip(keys, token, signed_bytes, &strip);
        for (uint32_t row = 0; row < queries->n_rows; row += ROWS_AT_ONCE) {
            switch (min_size(queries->n_rows - row, ROWS_AT_ONCE)) {
            case 1: strip_rows_by_bfp(&strip, queries, row, 1, dot_quad, signed_bytes, token, scores); break;
            case 2: strip_rows_by_bfp(&strip, queries, row, 2, dot_quad, signed_bytes, token, scores); break;
            case 3: strip_rows_by_bfp(&strip, queries, row, 3, dot_quad, signed_bytes, token, scores); break;
            case 4: strip_rows_by_bfp(&strip, queries, row, 4, dot_quad, signed_bytes, token, scores); break;
            case 5: strip_rows_by_bfp(&strip, queries, row, 5, dot_quad, signed_bytes, token, scores); break;
            case 6: strip_rows_by_bfp(&strip, queries, row, 6, dot_quad, signed_bytes, token, scores); break;
            case 7: strip_rows_by_bfp(&strip, queries, row, 7, dot_quad, signed_bytes, token, scores); break;
            default: strip_rows_by_bfp(&strip, queries, row, 8, dot_quad, signed_bytes, token, scores);
            }
        }
    }
}

#endif /* KSORT_STRIP_AVX512_H */
