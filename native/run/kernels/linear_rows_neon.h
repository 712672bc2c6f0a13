/* Matrix product of more than LINEAR_ROWS rows with Advanced SIMD.
 *
 *     W: 8 rows, up to PANEL_INPUTS columns at a time --convert, transpose--> panel [inputs][8 outputs] f32, 16 KB
 *
 *                        2 registers of the panel
 *                      +-----------+     for every 4 inputs: load 4 x of each row, 8 registers of the panel,
 *     x[r][i .. i+3]-> | 16 sums   |     64 multiply-adds by element
 *       8 rows         +-----------+
 *
 * In place of linear_rows.h: by element one load holds x of four inputs, where that one loads each into all
 * lanes, which takes an arithmetic pipe as well.
 * Bytes moved: the block's weights once; x once for every 8 outputs (from L2 or L3), y once for every PANEL_INPUTS
 * inputs. An output is summed in the order of inputs, whatever the number of rows.
 * Arithmetic instructions, f16 or bf16, for 4 inputs and 8 outputs: 8 conversions, 16 to transpose, then 8 FMLA a row;
 * so 73% are FMLA for 8 rows, 96% for 64.
 */
#ifndef KSORT_LINEAR_ROWS_NEON_H
#define KSORT_LINEAR_ROWS_NEON_H

#include "arm/float_rows_neon.h"
#include "arm/lanes_neon.h"
#include "run_kernels.h"

#define PANEL_INPUTS 512
#define PANEL_OUTPUTS 8
#define PANEL_ROWS 8 /* rows of x at once */

typedef float panel_row[PANEL_OUTPUTS];

/* Values i .. i+3 of a row, i < n; those from n on are 0. type is a constant. */
ALWAYS_INLINE float32x4_t load_values_below(const void *row, const uint32_t type, size_t n, size_t i)
{
    if (n - i >= 4)
        return load_values(row, type, i);
    const size_t value_bytes = type == KSORT_F32 ? 4 : 2;
    uint8_t rest[16] = {0};
    memcpy(rest, (const uint8_t *)row + i * value_bytes, (n - i) * value_bytes);
    return load_values(rest, type, 0);
}

/* Columns first .. first+n-1 of rows output .. output+7 of W, then zeros up to a multiple of 4 columns; rows from n_out
 * on are 0. type is a constant. */
ALWAYS_INLINE void fill_panel(const struct linear_block *block, const uint32_t type, size_t output, size_t first,
                              size_t n, panel_row *panel)
{
    const size_t value_bytes = type == KSORT_F32 ? 4 : 2;
    for (size_t o = 0; o < PANEL_OUTPUTS; o += 4)
        for (size_t i = 0; i < n; i += 4) {
            lanes rows[4], columns[4];
            for (size_t r = 0; r < 4; r++) {
                size_t row = output + o + r;
                const uint8_t *weights = (const uint8_t *)block->weights + row * block->n_in * value_bytes;
                rows[r] = vdupq_n_f32(0.0f);
                if (row < block->n_out)
                    rows[r] = load_values_below(weights, type, first + n, first + i);
            }
            transpose_lanes(rows, columns);
            for (size_t c = 0; c < 4; c++)
                vst1q_f32(&panel[i + c][o], columns[c]);
        }
}

/* y[r][0 .. n_outputs-1] of n_rows rows, n_rows a constant up to PANEL_ROWS: sums over n inputs, from 0 if `is_first`,
 * or from what y holds. */
ALWAYS_INLINE void multiply_rows(const panel_row *panel, size_t n, const float *x, size_t x_stride, float *y,
                                 size_t y_stride, uint32_t n_outputs, bool is_first, const int n_rows)
{
    panel_row edge[PANEL_ROWS] = {{0}};
    lanes sums[PANEL_ROWS][2];
#pragma GCC unroll 8
    for (int r = 0; r < n_rows; r++) {
        if (!is_first)
            memcpy(edge[r], y + r * y_stride, n_outputs * sizeof *y);
        for (int k = 0; k < 2; k++)
            sums[r][k] = vld1q_f32(edge[r] + 4 * k);
    }
    for (size_t i = 0; i < n; i += 4) {
        const lanes left[4] = {vld1q_f32(panel[i]), vld1q_f32(panel[i + 1]), vld1q_f32(panel[i + 2]),
                               vld1q_f32(panel[i + 3])};
        const lanes right[4] = {vld1q_f32(panel[i] + 4), vld1q_f32(panel[i + 1] + 4), vld1q_f32(panel[i + 2] + 4),
                                vld1q_f32(panel[i + 3] + 4)};
#pragma GCC unroll 8
        for (int r = 0; r < n_rows; r++) {
            lanes four = load_values_below(x + r * x_stride, KSORT_F32, n, i);
            sums[r][0] = add_products(sums[r][0], left, four);
            sums[r][1] = add_products(sums[r][1], right, four);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < n_rows; r++) {
        for (int k = 0; k < 2; k++)
            vst1q_f32(edge[r] + 4 * k, sums[r][k]);
        memcpy(y + r * y_stride, edge[r], n_outputs * sizeof *y);
    }
}

/* All rows, one panel of n inputs from `first` on. */
ALWAYS_INLINE void multiply_panel(const struct linear_block *block, const panel_row *panel, size_t output, size_t first,
                                  size_t n)
{
    const size_t x_stride = block->x_row_stride, y_stride = block->y_row_stride;
    const uint32_t n_outputs = (uint32_t)min_size(PANEL_OUTPUTS, block->n_out - output);
    const float *x = block->x + first;
    float *y = block->y + output;
    uint32_t row = 0;
    for (; row + PANEL_ROWS <= block->n_rows; row += PANEL_ROWS, x += PANEL_ROWS * x_stride, y += PANEL_ROWS * y_stride)
        multiply_rows(panel, n, x, x_stride, y, y_stride, n_outputs, first == 0, PANEL_ROWS);
    for (; row + 4 <= block->n_rows; row += 4, x += 4 * x_stride, y += 4 * y_stride)
        multiply_rows(panel, n, x, x_stride, y, y_stride, n_outputs, first == 0, 4);
    for (; row < block->n_rows; row++, x += x_stride, y += y_stride)
        multiply_rows(panel, n, x, x_stride, y, y_stride, n_outputs, first == 0, 1);
}

/* type is a constant. */
ALWAYS_INLINE void many_rows(const struct linear_block *block, const uint32_t type)
{
    panel_row panel[PANEL_INPUTS];
    for (size_t output = 0; output < block->n_out; output += PANEL_OUTPUTS)
        for (size_t first = 0; first < block->n_in; first += PANEL_INPUTS) {
            size_t n = min_size(PANEL_INPUTS, block->n_in - first);
            fill_panel(block, type, output, first, n, panel);
            multiply_panel(block, (const panel_row *)panel, output, first, n);
        }
}

#endif /* KSORT_LINEAR_ROWS_NEON_H */
