/* Matrix product of many rows: W is converted to float32 and transposed once for all of them, a panel at a time.
 *
 *     W: PANEL_OUTPUTS rows, PANEL_INPUTS columns  --convert, transpose-->  panel [inputs][PANEL_OUTPUTS], 64 KB, in L2
 *
 *                    panel row i: 2 registers
 *                   +---------------+           for every input i: load 2 registers of the panel,
 *     x[r][i] in    | 2 sums a row  |           ROWS_AT_ONCE times one x in all lanes,
 *     all lanes     | ROWS_AT_ONCE  |           2 * ROWS_AT_ONCE multiply-adds
 *                   +---------------+
 *
 * Bytes moved: the block's weights once; x once for every panel (from L2 or L3), y once for every PANEL_INPUTS inputs.
 * An output is one sum, in the order of inputs, however rows and outputs are cut.
 *
 * The including file includes a level's lanes_*.h, and defines ROWS_AT_ONCE (a multiple of 3) and
 * load_values_below (values i .. i+LANES-1 of a stored row as floats, 0 from value n on).
 */
#ifndef KSORT_LINEAR_ROWS_H
#define KSORT_LINEAR_ROWS_H

#include "run_kernels.h"

#define PANEL_OUTPUTS (2 * LANES)
#define PANEL_INPUTS (8192 / LANES)

typedef float panel_row[PANEL_OUTPUTS];

/* Inputs first .. first+n-1 of outputs output .. output+PANEL_OUTPUTS-1; outputs from n_out on are 0. */
ALWAYS_INLINE void fill_panel(const struct linear_block *block, const uint32_t type, size_t output, size_t first,
                              size_t n, panel_row *panel)
{
    const size_t value_bytes = type == KSORT_F32 ? 4 : 2;
    for (uint32_t half = 0; half < PANEL_OUTPUTS; half += LANES)
        for (size_t i = 0; i < n; i += LANES) {
            lanes rows[LANES] = {{0}}, columns[LANES];
            for (size_t o = 0; o < LANES && output + half + o < block->n_out; o++) {
                size_t at = (output + half + o) * block->n_in + first;
                const uint8_t *weights = (const uint8_t *)block->weights + at * value_bytes;
                rows[o] = load_values_below(weights, type, n, i);
            }
            transpose_lanes(rows, columns);
            for (size_t c = 0; c < LANES && i + c < n; c++)
                memcpy(panel[i + c] + half, &columns[c], sizeof columns[c]);
        }
}

/* Sums of n_rows rows begin at what y holds, or at 0. n_rows is a constant up to ROWS_AT_ONCE. */
ALWAYS_INLINE void multiply_rows(const panel_row *panel, size_t n, const float *x, size_t x_stride, float *y,
                                 size_t y_stride, uint32_t n_outputs, bool is_first, const int n_rows)
{
    lanes sums[ROWS_AT_ONCE][2];
    const uint32_t n_left = (uint32_t)min_size(n_outputs, LANES), n_right = n_outputs - n_left;
    for (int r = 0; r < n_rows; r++) {
        sums[r][0] = is_first ? (lanes){0} : load_below(y + r * y_stride, n_left, 0);
        sums[r][1] = is_first || n_right == 0 ? (lanes){0} : load_below(y + r * y_stride + LANES, n_right, 0);
    }
    for (size_t i = 0; i < n; i++) {
        lanes left, right;
        memcpy(&left, panel[i], sizeof left);
        memcpy(&right, panel[i] + LANES, sizeof right);
#pragma GCC unroll 12
        for (int r = 0; r < n_rows; r++) {
            lanes value = x[r * x_stride + i] - (lanes){0};
            sums[r][0] = lanes_multiply_add(left, value, sums[r][0]);
            sums[r][1] = lanes_multiply_add(right, value, sums[r][1]);
        }
    }
    for (int r = 0; r < n_rows; r++) {
        store_below(y + r * y_stride, n_left, 0, sums[r][0]);
        if (n_right)
            store_below(y + r * y_stride + LANES, n_right, 0, sums[r][1]);
    }
}

/* All rows of x with one panel. */
ALWAYS_INLINE void multiply_panel(const struct linear_block *block, const panel_row *panel, size_t output, size_t first,
                                  size_t n)
{
    const size_t x_stride = block->x_row_stride, y_stride = block->y_row_stride;
    const uint32_t n_outputs = (uint32_t)min_size(PANEL_OUTPUTS, block->n_out - output);
    const float *x = block->x + first;
    float *y = block->y + output;
    uint32_t row = 0;
    for (; row + ROWS_AT_ONCE <= block->n_rows; row += ROWS_AT_ONCE)
        multiply_rows(panel, n, x + row * x_stride, x_stride, y + row * y_stride, y_stride, n_outputs, first == 0,
                      ROWS_AT_ONCE);
    for (; row + 3 <= block->n_rows; row += 3)
        multiply_rows(panel, n, x + row * x_stride, x_stride, y + row * y_stride, y_stride, n_outputs, first == 0, 3);
    for (; row < block->n_rows; row++)
        multiply_rows(panel, n, x + row * x_stride, x_stride, y + row * y_stride, y_stride, n_outputs, first == 0, 1);
}

ALWAYS_INLINE void linear_rows_of_type(const struct linear_block *block, const uint32_t type)
{
    _Alignas(64) panel_row panel[PANEL_INPUTS];
    for (size_t output = 0; output < block->n_out; output += PANEL_OUTPUTS)
        for (size_t first = 0, n; first < block->n_in; first += n) {
            n = min_size(PANEL_INPUTS, block->n_in - first);
            fill_panel(block, type, output, first, n, panel);
            multiply_panel(block, (const panel_row *)panel, output, first, n);
        }
}

ALWAYS_INLINE void linear_rows(const struct linear_block *block)
{
    if (block->type == KSORT_F32)
        linear_rows_of_type(block, KSORT_F32);
    else if (block->type == KSORT_F16)
        linear_rows_of_type(block, KSORT_F16);
    else
        linear_rows_of_type(block, KSORT_BF16);
}

#endif /* KSORT_LINEAR_ROWS_H */
