/* Scores of BFP keys. Lanes are tokens, LANES of a tile at a time:
 *
 *     word w of LANES tokens  --key_quads-->  quads: register q holds channels 4q .. 4q+3 of LANES tokens
 *     for up to ROWS_AT_ONCE rows at once: dots of every block += quad x (query quad, the same in all lanes)
 *     scores[row][LANES tokens] += dot * the block's scale of LANES tokens * the row's factor
 *
 * No sum runs across lanes. Quads (up to 4 KB, on the stack) are unpacked once for all rows; ROWS_AT_ONCE rows keep as
 * many dots and scores in registers and use each loaded quad as often.
 * Bytes moved: the span's words and exponents once for all rows.
 *
 * The including file includes a level's quads_*.h, and defines ROWS_AT_ONCE (up to MOST_ROWS) and, of integer products,
 *   key_quads  all quads of LANES tokens
 *   first_dot  what a block's dots of a row begin with
 *   dot_quad   sum + four products of bytes in every lane; `query` is one quad
 */
#ifndef KSORT_SCORES_BFP_H
#define KSORT_SCORES_BFP_H

#include "kernels.h"

#define MOST_ROWS 8

struct key_lanes {
    const struct head_layout *layout;
    quad_lanes quads[MAX_QUADS];
    lanes scales[MAX_BLOCKS]; /* of the tokens, 0 where the block is zero */
};

ALWAYS_INLINE void load_scales(const struct tile_span *keys, uint32_t first_token, struct key_lanes *tokens)
{
    const uint8_t *codes = keys->tile + exponent_offset(keys->layout, 0, first_token);
    const uint32_t n_blocks = keys->layout->n_blocks;
    tokens->layout = keys->layout;
    if (keys->layout->is_scaled)
        for (uint32_t b = 0; b < n_blocks; b++)
            tokens->scales[b] = block_scales(codes + b * KSORT_TILE_TOKENS, true);
    else
        for (uint32_t b = 0; b < n_blocks; b++)
            tokens->scales[b] = block_scales(codes + b * KSORT_TILE_TOKENS, false);
}

/* Quads of block b end here; the padding after the last channel belongs to the last block. */
ALWAYS_INLINE uint32_t block_quads_end(const struct head_layout *layout, uint32_t b)
{
    return b + 1 < layout->n_blocks ? (b + 1) * layout->block_size / 4 : layout->n_quads;
}

/* Rows first_row .. first_row+n_rows-1, by integers or by floats. n_rows is a constant up to ROWS_AT_ONCE. */
typedef void rows_function(const struct key_lanes *tokens, const struct query_rows *queries, uint32_t first_row,
                           int n_rows, uint32_t first_token, float (*scores)[KSORT_TILE_TOKENS]);

ALWAYS_INLINE void rows_by_bfp(const struct key_lanes *tokens, const struct query_rows *queries, uint32_t first_row,
                               const int n_rows, uint32_t first_token, float (*scores)[KSORT_TILE_TOKENS])
{
    lanes sums[MOST_ROWS];
    for (int r = 0; r < n_rows; r++)
        sums[r] = (lanes){0};
    for (uint32_t b = 0, quad = 0; b < tokens->layout->n_blocks; b++) {
        quad_lanes dots[MOST_ROWS];
        for (int r = 0; r < n_rows; r++)
            dots[r] = first_dot(queries, first_row + r, b);
        for (uint32_t end = block_quads_end(tokens->layout, b); quad < end; quad++)
            for (int r = 0; r < n_rows; r++)
                dots[r] = dot_quad(dots[r], tokens->quads[quad], queries->quads[first_row + r][quad]);
        for (int r = 0; r < n_rows; r++) {
            lanes factor = tokens->scales[b] * lanes_all(queries->factors[first_row + r][b]);
            sums[r] = lanes_multiply_add(quads_to_float(dots[r]), factor, sums[r]);
        }
    }
    for (int r = 0; r < n_rows; r++)
        lanes_store(&scores[first_row + r][first_token], sums[r]);
}

ALWAYS_INLINE void rows_by_f32(const struct key_lanes *tokens, const struct query_rows *queries, uint32_t first_row,
                               const int n_rows, uint32_t first_token, float (*scores)[KSORT_TILE_TOKENS])
{
    lanes sums[MOST_ROWS];
    for (int r = 0; r < n_rows; r++)
        sums[r] = (lanes){0};
    for (uint32_t b = 0, quad = 0; b < tokens->layout->n_blocks; b++) {
        lanes dots[MOST_ROWS];
        for (int r = 0; r < n_rows; r++)
            dots[r] = (lanes){0};
        for (uint32_t end = block_quads_end(tokens->layout, b); quad < end; quad++)
            for (int byte = 0; byte < 4; byte++) {
                lanes key = byte_to_float(tokens->quads[quad], byte);
                for (int r = 0; r < n_rows; r++) {
                    lanes query = lanes_all(queries->values[first_row + r][4 * quad + byte]);
                    dots[r] = lanes_multiply_add(key, query, dots[r]);
                }
            }
        for (int r = 0; r < n_rows; r++)
            sums[r] = lanes_multiply_add(dots[r], tokens->scales[b], sums[r]);
    }
    for (int r = 0; r < n_rows; r++)
        lanes_store(&scores[first_row + r][first_token], sums[r]);
}

/* All rows of the tokens. Cases above ROWS_AT_ONCE are never reached, and left out by the compiler. */
ALWAYS_INLINE void every_row(const struct key_lanes *tokens, const struct query_rows *queries, rows_function *rows_at,
                             uint32_t token, float (*scores)[KSORT_TILE_TOKENS])
{
    for (uint32_t row = 0; row < queries->n_rows; row += ROWS_AT_ONCE) {
        switch (min_size(queries->n_rows - row, ROWS_AT_ONCE)) {
        case 1: rows_at(tokens, queries, row, 1, token, scores); break;
        case 2: rows_at(tokens, queries, row, 2, token, scores); break;
        case 3: rows_at(tokens, queries, row, 3, token, scores); break;
        case 4: rows_at(tokens, queries, row, 4, token, scores); break;
        case 5: rows_at(tokens, queries, row, 5, token, scores); break;
        case 6: rows_at(tokens, queries, row, 6, token, scores); break;
        case 7: rows_at(tokens, queries, row, 7, token, scores); break;
        case 8: rows_at(tokens, queries, row, 8, token, scores); break;
        }
    }
}

ALWAYS_INLINE void scores_by_bfp(const struct tile_span *keys, const struct query_rows *queries,
                                 float (*scores)[KSORT_TILE_TOKENS])
{
    for (uint32_t token = keys->begin / LANES * LANES; token < keys->end; token += LANES) {
        struct key_lanes tokens;
        prefetch_share(keys, token, LANES);
        key_quads(keys, token, tokens.quads);
        load_scales(keys, token, &tokens);
        every_row(&tokens, queries, rows_by_bfp, token, scores);
    }
}

ALWAYS_INLINE void scores_by_f32(const struct tile_span *keys, const struct query_rows *queries,
                                 float (*scores)[KSORT_TILE_TOKENS])
{
    for (uint32_t token = keys->begin / LANES * LANES; token < keys->end; token += LANES) {
        struct key_lanes tokens;
        prefetch_share(keys, token, LANES);
        unpack_quads(keys, token, tokens.quads);
        load_scales(keys, token, &tokens);
        every_row(&tokens, queries, rows_by_f32, token, scores);
    }
}

#endif /* KSORT_SCORES_BFP_H */
