/* Integer scores with VNNI: vpdpbusd adds four products of an unsigned key byte (mantissa + 2^(mantissa_bits-1)) and a
 * signed query byte to each lane, without saturation. The surplus is in the offset that a block's sum starts from.
 *
 * Up to 4 rows of BFP12 or SBFP12 keys, as in a decode step: words become quads in registers and are multiplied at once, several
 * strips side by side, so that 4 to 8 sums hide the latency of 4 cycles:
 *
 *             strip 0  strip 1  (.. 3 for 1 or 2 rows)
 *             +--------+--------+
 *     4 rows  | dots   | dots   |   for every word: load it for each strip, 4 instructions to make 2 quads,
 *             +--------+--------+   2 products for each row, the query's quad from L1 in all lanes
 *
 * Otherwise partition and bytes are those of scores_bfp.h. Bytes moved: the tile once.
 */
#include "x86/quads_avx512.h"

#define ROWS_AT_ONCE 8
#define FEW_ROWS 4
#define MAX_STRIPS STRIPS_PER_TILE

ALWAYS_INLINE void key_quads(const struct tile_span *keys, uint32_t first_token, quad_lanes *quads)
{
    unpack_flipped_quads(keys, first_token, _mm512_setzero_si512(), quads);
}

ALWAYS_INLINE quad_lanes first_dot(const struct query_rows *queries, uint32_t row, uint32_t b)
{
    return _mm512_set1_epi32(queries->offsets[row][b]);
}

ALWAYS_INLINE quad_lanes dot_quad(quad_lanes sum, quad_lanes key, int32_t query)
{
    return _mm512_dpbusd_epi32(sum, key, _mm512_set1_epi32(query));
}

#include "template/scores_bfp.h"

/* Strips from first_token on, all rows of `queries`. is_scaled, n_rows (up to FEW_ROWS) and n_strips are constants. */
ALWAYS_INLINE void strips_of_few_rows(const struct tile_span *keys, const bool is_scaled,
                                      const struct query_rows *queries, uint32_t first_token, const int n_rows,
                                      const int n_strips, float (*scores)[KSORT_TILE_TOKENS])
{
    const struct head_layout *layout = keys->layout;
    const __m512i sign_bits = _mm512_set1_epi8((char)0x88), nibble = _mm512_set1_epi8(0x0F);
    const uint8_t *words = keys->tile + word_offset(layout, 0, first_token);
    const size_t stride = strip_bytes(layout);
    const ptrdiff_t to_next = keys->next - keys->tile;
    __m512 sums[FEW_ROWS][MAX_STRIPS];
    for (int r = 0; r < n_rows; r++)
        for (int s = 0; s < n_strips; s++)
            sums[r][s] = _mm512_setzero_ps();
    for (uint32_t b = 0, word = 0; b < layout->n_blocks; b++) {
        __m512i dots[FEW_ROWS][MAX_STRIPS];
        for (int r = 0; r < n_rows; r++)
            for (int s = 0; s < n_strips; s++)
                dots[r][s] = _mm512_set1_epi32(queries->offsets[r][b]);
        for (uint32_t end = block_quads_end(layout, b) / 2; word < end; word++)
#pragma GCC unroll 4
            for (int s = 0; s < n_strips; s++) {
                const uint8_t *stored_words = words + s * stride + word * 64;
                PREFETCH_NEXT(stored_words + to_next);
                __m512i stored = _mm512_xor_si512(_mm512_loadu_si512(stored_words), sign_bits);
                __m512i low = _mm512_and_si512(stored, nibble);
                __m512i high = _mm512_and_si512(_mm512_srli_epi32(stored, 4), nibble);
#pragma GCC unroll 4
                for (int r = 0; r < n_rows; r++) {
                    dots[r][s] = dot_quad(dots[r][s], low, queries->quads[r][2 * word]);
                    dots[r][s] = dot_quad(dots[r][s], high, queries->quads[r][2 * word + 1]);
                }
            }
        for (int s = 0; s < n_strips; s++) {
            const uint8_t *codes = keys->tile + exponent_offset(layout, b, first_token + STRIP_TOKENS * s);
            PREFETCH_NEXT(codes + to_next);
            __m512 scale = block_scales(codes, is_scaled);
            for (int r = 0; r < n_rows; r++) {
                __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(queries->factors[r][b]));
                sums[r][s] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[r][s]), factor, sums[r][s]);
            }
        }
    }
    for (int r = 0; r < n_rows; r++)
        for (int s = 0; s < n_strips; s++)
            _mm512_storeu_ps(&scores[r][first_token + STRIP_TOKENS * s], sums[r][s]);
}

/* is_scaled, n_rows and n_strips are constants. Strips beside the span's lie in the tile too: their scores are not looked at. */
ALWAYS_INLINE void few_rows(const struct tile_span *keys, const bool is_scaled, const struct query_rows *queries,
                            const int n_rows, const int n_strips, float (*scores)[KSORT_TILE_TOKENS])
{
    const uint32_t step = (uint32_t)n_strips * STRIP_TOKENS;
    for (uint32_t token = keys->begin / step * step; token < keys->end; token += step)
        strips_of_few_rows(keys, is_scaled, queries, token, n_rows, n_strips, scores);
}

/* is_scaled is a constant. */
ALWAYS_INLINE void all_rows(const struct tile_span *keys, const bool is_scaled, const struct query_rows *queries,
                            float (*scores)[KSORT_TILE_TOKENS])
{
    switch (queries->n_rows) {
    case 1: few_rows(keys, is_scaled, queries, 1, 4, scores); break;
    case 2: few_rows(keys, is_scaled, queries, 2, 4, scores); break;
    case 3: few_rows(keys, is_scaled, queries, 3, 2, scores); break;
    default: few_rows(keys, is_scaled, queries, 4, 2, scores);
    }
}

void ksort_avx512vnni_scores_bfp_by_bfp(const struct tile_span *keys, const struct query_rows *queries,
                                        float (*scores)[KSORT_TILE_TOKENS])
{
    if (keys->layout->mantissa_bits != 4 || queries->n_rows > FEW_ROWS)
        scores_by_bfp(keys, queries, scores);
    else if (keys->layout->is_scaled)
        all_rows(keys, true, queries, scores);
    else
        all_rows(keys, false, queries, scores);
}
