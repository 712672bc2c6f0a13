/* Scores with AVX-512 without VNNI, and all scores with float queries or float keys.
 *
 *   BFP keys:   lanes are a strip's tokens: scores_bfp.h.
 *   float keys: lanes are channels. 4 tokens x 4 rows at once: 16 sums in registers, each key and query register used 4
 *               times, then one transposed addition of 4 tokens a row.
 *
 *               row r .. r+3     +--------+
 *               of the unit      | 4 x 4  |  <- one pass over head_dim
 *                                +--------+
 *                                token t .. t+3
 *               Bytes moved: the K rows of the span once for every 4 rows (from L1 after the first).
 */
#include "x86/float_rows_avx512.h"
#include "x86/reduce_avx512.h"
#include "x86/quads_avx512.h"

#define ROWS_AT_ONCE 8

ALWAYS_INLINE void key_quads(const struct tile_span *keys, uint32_t first_token, quad_lanes *quads)
{
    unpack_quads(keys, first_token, quads);
}

ALWAYS_INLINE quad_lanes first_dot(const struct query_rows *queries, uint32_t row, uint32_t b)
{
    (void)queries, (void)row, (void)b;
    return _mm512_setzero_si512();
}

/* |key| * (query with the key's sign), in pairs: at most 2 * 128 * 127 = 32512, so 16 bits hold it. */
ALWAYS_INLINE quad_lanes dot_quad(quad_lanes sum, quad_lanes key, int32_t query)
{
    __m512i queries = _mm512_set1_epi32(query);
    queries = _mm512_mask_sub_epi8(queries, _mm512_movepi8_mask(key), _mm512_setzero_si512(), queries);
    __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(key), queries);
    return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}

#include "template/scores_bfp.h"

void ksort_avx512_scores_bfp_by_bfp(const struct tile_span *keys, const struct query_rows *queries,
                                    float (*scores)[KSORT_TILE_TOKENS])
{
    scores_by_bfp(keys, queries, scores);
}

void ksort_avx512_scores_bfp_by_f32(const struct tile_span *keys, const struct query_rows *queries,
                                    float (*scores)[KSORT_TILE_TOKENS])
{
    scores_by_f32(keys, queries, scores);
}

/* Tokens first_token .. +3, rows first_row .. +n_rows-1. type and n_rows (up to 4) are constants. */
ALWAYS_INLINE void scores_of_four_tokens(const struct tile_span *keys, const uint32_t type,
                                         const struct query_rows *queries, uint32_t first_row, const int n_rows,
                                         uint32_t first_token, float (*scores)[KSORT_TILE_TOKENS])
{
    const uint32_t head_dim = keys->layout->head_dim;
    __m512 sums[4][4]; /* [row][token] */
    for (int r = 0; r < n_rows; r++)
        for (int t = 0; t < 4; t++)
            sums[r][t] = _mm512_setzero_ps();
    for (uint32_t c = 0; c < head_dim; c += 16) {
        __mmask16 inside = lanes_below(head_dim, c);
        __m512 key[4];
        for (int t = 0; t < 4; t++)
            key[t] = load_values(keys->tile + row_offset(keys->layout, first_token + t), type, c, inside);
        for (int r = 0; r < n_rows; r++) {
            __m512 query = _mm512_maskz_loadu_ps(inside, &queries->values[first_row + r][c]);
            for (int t = 0; t < 4; t++)
                sums[r][t] = _mm512_fmadd_ps(query, key[t], sums[r][t]);
        }
    }
    for (int r = 0; r < n_rows; r++)
        _mm_storeu_ps(&scores[first_row + r][first_token], sums_of_four(sums[r]));
}

ALWAYS_INLINE void scores_float_of_type(const struct tile_span *keys, const uint32_t type,
                                        const struct query_rows *queries, float (*scores)[KSORT_TILE_TOKENS])
{
    for (uint32_t token = keys->begin / 4 * 4; token < keys->end; token += 4) {
        prefetch_share(keys, token, 4);
        for (uint32_t row = 0; row < queries->n_rows; row += 4) {
            switch (min_size(queries->n_rows - row, 4)) {
            case 1: scores_of_four_tokens(keys, type, queries, row, 1, token, scores); break;
            case 2: scores_of_four_tokens(keys, type, queries, row, 2, token, scores); break;
            case 3: scores_of_four_tokens(keys, type, queries, row, 3, token, scores); break;
            default: scores_of_four_tokens(keys, type, queries, row, 4, token, scores);
            }
        }
    }
}

void ksort_avx512_scores_float(const struct tile_span *keys, const struct query_rows *queries,
                               float (*scores)[KSORT_TILE_TOKENS])
{
    if (keys->layout->type == KSORT_F32)
        scores_float_of_type(keys, KSORT_F32, queries, scores);
    else if (keys->layout->type == KSORT_F16)
        scores_float_of_type(keys, KSORT_F16, queries, scores);
    else
        scores_float_of_type(keys, KSORT_BF16, queries, scores);
}
