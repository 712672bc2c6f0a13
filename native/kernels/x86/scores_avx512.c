/* Scores with AVX-512 without VNNI, and all scores with float queries or float keys.
 *
 *   BFP keys:   lanes are tokens, see strip_avx512.h (partition and bytes).
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
#include "x86/strip_avx512.h"

/* |key| * (query with the key's sign), in pairs: at most 2 * 128 * 127 = 32512, so 16 bits hold it. */
ALWAYS_INLINE __m512i dot_quad_bw(__m512i sum, __m512i key, int32_t query)
{
    __m512i queries = _mm512_set1_epi32(query);
    queries = _mm512_mask_sub_epi8(queries, _mm512_movepi8_mask(key), _mm512_setzero_si512(), queries);
    __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(key), queries);
    return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}

void ksort_avx512_scores_bfp_by_bfp(const struct tile_span *keys, const struct query_rows *queries,
                                    float (*scores)[KSORT_TILE_TOKENS])
{
    scores_by_bfp(keys, queries, dot_quad_bw, true, scores);
}

/* Byte `byte` of every lane, sign-extended, as float. `byte` is a constant. */
ALWAYS_INLINE __m512 byte_as_float(__m512i quad, const int byte)
{
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(quad, 24 - 8 * byte), 24));
}

/* n_rows is a constant up to ROWS_AT_ONCE. */
ALWAYS_INLINE void strip_rows_by_f32(const struct strip_avx512 *strip, const struct query_rows *queries,
                                     uint32_t first_row, const int n_rows, uint32_t first_token,
                                     float (*scores)[KSORT_TILE_TOKENS])
{
    __m512 sums[ROWS_AT_ONCE];
    for (int r = 0; r < n_rows; r++)
        sums[r] = _mm512_setzero_ps();
    for (uint32_t b = 0, quad = 0; b < strip->layout->n_blocks; b++) {
        __m512 dots[ROWS_AT_ONCE];
        for (int r = 0; r < n_rows; r++)
            dots[r] = _mm512_setzero_ps();
        for (uint32_t end = block_quads_end(strip->layout, b); quad < end; quad++)
            for (int byte = 0; byte < 4; byte++) {
                __m512 key = byte_as_float(strip->quads[quad], byte);
                for (int r = 0; r < n_rows; r++) {
                    __m512 query = _mm512_set1_ps(queries->values[first_row + r][4 * quad + byte]);
                    dots[r] = _mm512_fmadd_ps(key, query, dots[r]);
                }
            }
        for (int r = 0; r < n_rows; r++)
            sums[r] = _mm512_fmadd_ps(dots[r], strip->scales[b], sums[r]);
    }
    for (int r = 0; r < n_rows; r++)
        _mm512_storeu_ps(&scores[first_row + r][first_token], sums[r]);
}

void ksort_avx512_scores_bfp_by_f32(const struct tile_span *keys, const struct query_rows *queries,
                                    float (*scores)[KSORT_TILE_TOKENS])
{
    for (uint32_t token = keys->begin / STRIP_TOKENS * STRIP_TOKENS; token < keys->end; token += STRIP_TOKENS) {
        struct strip_avx512 strip;
        prefetch_share(keys, token, STRIP_TOKENS);
        load_strip(keys, token, true, &strip);
        for (uint32_t row = 0; row < queries->n_rows; row += ROWS_AT_ONCE) {
            switch (min_size(queries->n_rows - row, ROWS_AT_ONCE)) {
            case 1: strip_rows_by_f32(&strip, queries, row, 1, token, scores); break;
            case 2: strip_rows_by_f32(&strip, queries, row, 2, token, scores); break;
            case 3: strip_rows_by_f32(&strip, queries, row, 3, token, scores); break;
            case 4: strip_rows_by_f32(&strip, queries, row, 4, token, scores); break;
            case 5: strip_rows_by_f32(&strip, queries, row, 5, token, scores); break;
            case 6: strip_rows_by_f32(&strip, queries, row, 6, token, scores); break;
            case 7: strip_rows_by_f32(&strip, queries, row, 7, token, scores); break;
            default: strip_rows_by_f32(&strip, queries, row, 8, token, scores);
            }
        }
    }
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
        __mmask16 lanes = lanes_below(head_dim, c);
        __m512 key[4];
        for (int t = 0; t < 4; t++)
            key[t] = load_values(keys->tile + row_offset(keys->layout, first_token + t), type, c, lanes);
        for (int r = 0; r < n_rows; r++) {
            __m512 query = _mm512_maskz_loadu_ps(lanes, &queries->values[first_row + r][c]);
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
