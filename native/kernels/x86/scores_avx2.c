/* Scores with AVX2.
 *
 *   BFP keys:   lanes are tokens, 8 of a strip's 16 at a time: scores_bfp.h.
 *   float keys: lanes are channels. 2 tokens x 4 rows at once: 8 sums in registers.
 *               Bytes moved: the K rows of the span once for every 4 rows (from L1 after the first).
 */
#include "half.h"
#include "x86/float_rows_avx2.h"
#include "x86/quads_avx2.h"

#define ROWS_AT_ONCE 4

ALWAYS_INLINE void key_quads(const struct tile_span *keys, uint32_t first_token, quad_lanes *quads)
{
    unpack_quads(keys, first_token, quads);
}

ALWAYS_INLINE quad_lanes first_dot(const struct query_rows *queries, uint32_t row, uint32_t b)
{
    (void)queries, (void)row, (void)b;
    return _mm256_setzero_si256();
}

/* |key| * (query with the key's sign), in pairs: at most 2 * 128 * 127 = 32512, so 16 bits hold it. */
ALWAYS_INLINE quad_lanes dot_quad(quad_lanes sum, quad_lanes key, int32_t query)
{
    __m256i queries = _mm256_sign_epi8(_mm256_set1_epi32(query), key);
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(key), queries);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

#include "template/scores_bfp.h"

void ksort_avx2_scores_bfp_by_bfp(const struct tile_span *keys, const struct query_rows *queries,
                                  float (*scores)[KSORT_TILE_TOKENS])
{
    scores_by_bfp(keys, queries, scores);
}

void ksort_avx2_scores_bfp_by_f32(const struct tile_span *keys, const struct query_rows *queries,
                                  float (*scores)[KSORT_TILE_TOKENS])
{
    scores_by_f32(keys, queries, scores);
}

/* Tokens first_token and +1, rows first_row .. +n_rows-1. type and n_rows (up to 4) are constants. */
ALWAYS_INLINE void scores_of_two_tokens(const struct tile_span *keys, const uint32_t type,
                                        const struct query_rows *queries, uint32_t first_row, const int n_rows,
                                        uint32_t first_token, float (*scores)[KSORT_TILE_TOKENS])
{
    const uint32_t head_dim = keys->layout->head_dim, in_registers = head_dim / 8 * 8;
    const uint8_t *key[2] = {keys->tile + row_offset(keys->layout, first_token),
                             keys->tile + row_offset(keys->layout, first_token + 1)};
    __m256 sums[4][2]; /* [row][token] */
    for (int r = 0; r < n_rows; r++)
        sums[r][0] = sums[r][1] = _mm256_setzero_ps();
    for (uint32_t c = 0; c < in_registers; c += 8) {
        __m256 first = load_values(key[0], type, c), second = load_values(key[1], type, c);
        for (int r = 0; r < n_rows; r++) {
            __m256 query = _mm256_loadu_ps(&queries->values[first_row + r][c]);
            sums[r][0] = _mm256_fmadd_ps(query, first, sums[r][0]);
            sums[r][1] = _mm256_fmadd_ps(query, second, sums[r][1]);
        }
    }
    for (int r = 0; r < n_rows; r++)
        for (int t = 0; t < 2; t++) {
            float sum = sum_of_lanes(sums[r][t]);
            for (uint32_t c = in_registers; c < head_dim; c++)
                sum += queries->values[first_row + r][c] * load_value(key[t], type, c);
            scores[first_row + r][first_token + t] = sum;
        }
}

ALWAYS_INLINE void scores_float_of_type(const struct tile_span *keys, const uint32_t type,
                                        const struct query_rows *queries, float (*scores)[KSORT_TILE_TOKENS])
{
    for (uint32_t token = keys->begin / 2 * 2; token < keys->end; token += 2) {
        prefetch_share(keys, token, 2);
        for (uint32_t row = 0; row < queries->n_rows; row += ROWS_AT_ONCE) {
            switch (min_size(queries->n_rows - row, ROWS_AT_ONCE)) {
            case 1: scores_of_two_tokens(keys, type, queries, row, 1, token, scores); break;
            case 2: scores_of_two_tokens(keys, type, queries, row, 2, token, scores); break;
            case 3: scores_of_two_tokens(keys, type, queries, row, 3, token, scores); break;
            default: scores_of_two_tokens(keys, type, queries, row, 4, token, scores);
            }
        }
    }
}

void ksort_avx2_scores_float(const struct tile_span *keys, const struct query_rows *queries,
                             float (*scores)[KSORT_TILE_TOKENS])
{
    if (keys->layout->type == KSORT_F32)
        scores_float_of_type(keys, KSORT_F32, queries, scores);
    else if (keys->layout->type == KSORT_F16)
        scores_float_of_type(keys, KSORT_F16, queries, scores);
    else
        scores_float_of_type(keys, KSORT_BF16, queries, scores);
}
