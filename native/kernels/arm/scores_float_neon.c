/* Scores of float keys with Advanced SIMD: lanes are channels.
 *
 *                   4 channels of 4 tokens
 *                 +----+----+----+----+     4 loads of K (converted as they come), 4 of the queries,
 *     4 rows  ->  | 16 sums           |     16 multiply-adds
 *                 +----+----+----+----+
 *     At the end three pairwise additions make the sums of a row and 4 tokens the lanes of one register.
 *
 * Bytes moved: the K rows of the span once for every 4 rows (from L1 after the first).
 * Arithmetic instructions for 4 rows: 16 FMLA for every 4 conversions (none for f32), so 80%; one row: 50%.
 */
#include "arm/float_rows_neon.h"

#define ROWS_AT_ONCE 4
#define TOKENS_AT_ONCE 4

struct token_sums {
    float32x4_t of[ROWS_AT_ONCE][TOKENS_AT_ONCE]; /* lanes are channels c, c + 4, ... */
};

/* Adds the products of channels c .. c+3, or c and c+1 if `is_pair`. type, n_rows and is_pair are constants. */
ALWAYS_INLINE void add_channels(const struct tile_span *keys, const uint32_t type, const struct query_rows *queries,
                                uint32_t first_row, const int n_rows, uint32_t first_token, uint32_t c,
                                const bool is_pair, struct token_sums *sums)
{
    float32x4_t key[TOKENS_AT_ONCE];
    for (uint32_t t = 0; t < TOKENS_AT_ONCE; t++) {
        const void *row = keys->tile + row_offset(keys->layout, first_token + t);
        key[t] = is_pair ? load_two_values(row, type, c) : load_values(row, type, c);
    }
    for (int r = 0; r < n_rows; r++) {
        const float *values = &queries->values[first_row + r][c];
        float32x4_t query = is_pair ? load_two_values(values, KSORT_F32, 0) : vld1q_f32(values);
        for (int t = 0; t < TOKENS_AT_ONCE; t++)
            sums->of[r][t] = vfmaq_f32(sums->of[r][t], query, key[t]);
    }
}

/* Tokens first_token .. +3, rows first_row .. +n_rows-1. type and n_rows (up to 4) are constants. */
ALWAYS_INLINE void scores_of_tokens(const struct tile_span *keys, const uint32_t type, const struct query_rows *queries,
                                    uint32_t first_row, const int n_rows, uint32_t first_token,
                                    float (*scores)[KSORT_TILE_TOKENS])
{
    const uint32_t head_dim = keys->layout->head_dim, in_registers = head_dim / 4 * 4;
    struct token_sums sums;
    for (int r = 0; r < n_rows; r++)
        for (int t = 0; t < TOKENS_AT_ONCE; t++)
            sums.of[r][t] = vdupq_n_f32(0.0f);
    for (uint32_t c = 0; c < in_registers; c += 4)
        add_channels(keys, type, queries, first_row, n_rows, first_token, c, false, &sums);
    if (in_registers < head_dim)
        add_channels(keys, type, queries, first_row, n_rows, first_token, in_registers, true, &sums);
    for (int r = 0; r < n_rows; r++) {
        float32x4_t tokens01 = vpaddq_f32(sums.of[r][0], sums.of[r][1]);
        float32x4_t tokens23 = vpaddq_f32(sums.of[r][2], sums.of[r][3]);
        vst1q_f32(&scores[first_row + r][first_token], vpaddq_f32(tokens01, tokens23));
    }
}

ALWAYS_INLINE void scores_float_of_type(const struct tile_span *keys, const uint32_t type,
                                        const struct query_rows *queries, float (*scores)[KSORT_TILE_TOKENS])
{
    for (uint32_t token = keys->begin / TOKENS_AT_ONCE * TOKENS_AT_ONCE; token < keys->end; token += TOKENS_AT_ONCE) {
        prefetch_share(keys, token, TOKENS_AT_ONCE);
        for (uint32_t row = 0; row < queries->n_rows; row += ROWS_AT_ONCE) {
            switch (min_size(queries->n_rows - row, ROWS_AT_ONCE)) {
            case 1: scores_of_tokens(keys, type, queries, row, 1, token, scores); break;
            case 2: scores_of_tokens(keys, type, queries, row, 2, token, scores); break;
            case 3: scores_of_tokens(keys, type, queries, row, 3, token, scores); break;
            default: scores_of_tokens(keys, type, queries, row, 4, token, scores);
            }
        }
    }
}

void ksort_neon_scores_float(const struct tile_span *keys, const struct query_rows *queries,
                             float (*scores)[KSORT_TILE_TOKENS])
{
    if (keys->layout->type == KSORT_F32)
        scores_float_of_type(keys, KSORT_F32, queries, scores);
    else if (keys->layout->type == KSORT_F16)
        scores_float_of_type(keys, KSORT_F16, queries, scores);
    else
        scores_float_of_type(keys, KSORT_BF16, queries, scores);
}
