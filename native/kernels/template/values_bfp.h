/* Weighted values of BFP types: what comes before the products.
 *
 *   1. once a tile: words --unpack, transpose--> mantissas by columns of 16 channels, in bytes (up to 16 KB, on the
 *      stack):     columns [head_dim / 16][64 tokens][16 channels]
 *   2. once for up to ROWS_AT_ONCE rows: weights * scale, so that blocks cost nothing in the loop of products:
 *                  scaled [blocks][ROWS_AT_ONCE rows][64 tokens]
 *
 * Tokens outside the span are not to be multiplied: their bytes may be stale, and their scaled weights infinite or NaN.
 * Bytes moved: the tile once for all rows; columns and scaled weights stay in L1 and L2.
 *
 * The including file includes a level's quads_*.h, and defines ROWS_AT_ONCE.
 */
#ifndef KSORT_VALUES_BFP_H
#define KSORT_VALUES_BFP_H

#include "kernels.h"

#define COLUMN 16 /* channels; every block size is a multiple of it, so a column lies in one block */

typedef int8_t mantissa_column[KSORT_TILE_TOKENS][COLUMN];
typedef float scaled_weights[ROWS_AT_ONCE][KSORT_TILE_TOKENS];

/* Columns of the tokens that the span touches, LANES at a time. A column takes four quads; quads that are not stored
 * are 0. */
static void unpack_columns(const struct tile_span *values, mantissa_column *columns)
{
    const uint32_t n_quads = values->layout->n_quads;
    quad_lanes quads[MAX_QUADS];
    for (uint32_t q = n_quads / 4 * 4; q < (n_quads + 3) / 4 * 4; q++)
        quads[q] = (quad_lanes){0};
    for (uint32_t token = values->begin / LANES * LANES; token < values->end; token += LANES) {
        unpack_quads(values, token, quads);
        for (uint32_t q = 0; q < n_quads; q += 4)
            store_mantissa_rows(&quads[q], &columns[q / 4][token]);
    }
}

/* scaled[block][row][token] = weights[row][token] * the block's scale * mantissa_unit. is_scaled is a constant. */
ALWAYS_INLINE void scale_weights(const struct tile_span *values, const bool is_scaled, uint32_t n_rows,
                                 const float (*weights)[KSORT_TILE_TOKENS], scaled_weights *scaled)
{
    const struct head_layout *layout = values->layout;
    const lanes unit = lanes_all(mantissa_unit(layout));
    for (uint32_t b = 0; b < layout->n_blocks; b++)
        for (uint32_t token = 0; token < KSORT_TILE_TOKENS; token += LANES) {
            lanes step = block_scales(values->tile + exponent_offset(layout, b, token), is_scaled) * unit;
            for (uint32_t r = 0; r < n_rows; r++)
                lanes_store(&scaled[b][r][token], lanes_load(&weights[r][token]) * step);
        }
}

/* Rows 0 .. n_rows-1 (up to ROWS_AT_ONCE) of the pointers given, all channels, by columns and scaled weights. */
typedef void columns_function(const struct tile_span *values, const mantissa_column *columns, uint32_t n_rows,
                              const scaled_weights *scaled, const float *rescale, float *accumulators, size_t stride);

ALWAYS_INLINE void accumulate_bfp(const struct tile_span *values, uint32_t n_rows,
                                  const float (*weights)[KSORT_TILE_TOKENS], const float *rescale, float *accumulators,
                                  size_t stride, columns_function *accumulate_some)
{
    _Alignas(64) mantissa_column columns[KSORT_MAX_HEAD_DIM / COLUMN];
    _Alignas(64) scaled_weights scaled[MAX_BLOCKS];
    prefetch_share(values, 0, KSORT_TILE_TOKENS);
    unpack_columns(values, columns);
    for (uint32_t row = 0; row < n_rows; row += ROWS_AT_ONCE) {
        uint32_t n = (uint32_t)min_size(n_rows - row, ROWS_AT_ONCE);
        if (values->layout->is_scaled)
            scale_weights(values, true, n, weights + row, scaled);
        else
            scale_weights(values, false, n, weights + row, scaled);
        accumulate_some(values, (const mantissa_column *)columns, n, (const scaled_weights *)scaled, rescale + row,
                        accumulators + row * stride, stride);
    }
}

#endif /* KSORT_VALUES_BFP_H */
