/* Matrix product with Advanced SIMD, in one of two ways.
 *
 *   few rows:   W row o   | 4| 4| 4| 4| 4| ...    one output after another (two at once for one or two rows), so that
 *                                                 the weights are one sequential stream (or two); 4 sums of 4 lanes for
 *                                                 each row of x
 *   many rows:  linear_rows_neon.h
 *
 * Bytes moved: the block's weights once; x is in L1.
 * Arithmetic instructions, f16 or bf16, for one row: one conversion for every FMLA, 8 weight bytes; so a core with two
 * arithmetic pipes takes up to 8 bytes a cycle.
 */
#include "linear_rows_neon.h"
#include "half.h"

#define SUMS 4
#define MOST_OUTPUTS 2

/* y[r][output] .. y[r][output + n_outputs - 1] for all rows r < n_rows. type, n_outputs (up to 2) and n_rows are
 * constants, the product of the latter two at most 4. */
ALWAYS_INLINE void outputs_at(const struct linear_block *block, const uint32_t type, size_t output, const int n_outputs,
                              const int n_rows)
{
    const size_t n_in = block->n_in, value_bytes = type == KSORT_F32 ? 4 : 2;
    const uint8_t *weights[MOST_OUTPUTS];
    float32x4_t sums[MOST_OUTPUTS][LINEAR_ROWS][SUMS];
#pragma GCC unroll 2
    for (int o = 0; o < n_outputs; o++) {
        weights[o] = (const uint8_t *)block->weights + (output + o) * n_in * value_bytes;
#pragma GCC unroll 4
        for (int r = 0; r < n_rows; r++)
#pragma GCC unroll 4
            for (int k = 0; k < SUMS; k++)
                sums[o][r][k] = vdupq_n_f32(0.0f);
    }
    size_t in_registers = n_in / (4 * SUMS) * (4 * SUMS);
    for (size_t i = 0; i < in_registers; i += 4 * SUMS)
#pragma GCC unroll 4
        for (int k = 0; k < SUMS; k++)
#pragma GCC unroll 2
            for (int o = 0; o < n_outputs; o++) {
                float32x4_t weight = load_values(weights[o], type, i + 4 * k);
#pragma GCC unroll 4
                for (int r = 0; r < n_rows; r++) {
                    float32x4_t four = vld1q_f32(block->x + r * block->x_row_stride + i + 4 * k);
                    sums[o][r][k] = vfmaq_f32(sums[o][r][k], weight, four);
                }
            }
#pragma GCC unroll 2
    for (int o = 0; o < n_outputs; o++)
#pragma GCC unroll 4
        for (int r = 0; r < n_rows; r++) {
            float32x4_t even = vaddq_f32(sums[o][r][0], sums[o][r][2]), odd = vaddq_f32(sums[o][r][1], sums[o][r][3]);
            float sum = vaddvq_f32(vaddq_f32(even, odd));
            for (size_t i = in_registers; i < n_in; i++)
                sum += load_value(weights[o], type, i) * block->x[r * block->x_row_stride + i];
            block->y[r * block->y_row_stride + output + o] = sum;
        }
}

/* Rows of a block that has few. type is a constant. */
ALWAYS_INLINE void few_rows(const struct linear_block *block, const uint32_t type)
{
    size_t o = 0;
    switch (block->n_rows) {
    case 1:
        for (; o + 2 <= block->n_out; o += 2)
            outputs_at(block, type, o, 2, 1);
        if (o < block->n_out)
            outputs_at(block, type, o, 1, 1);
        break;
    case 2:
        for (; o + 2 <= block->n_out; o += 2)
            outputs_at(block, type, o, 2, 2);
        if (o < block->n_out)
            outputs_at(block, type, o, 1, 2);
        break;
    case 3:
        for (; o < block->n_out; o++)
            outputs_at(block, type, o, 1, 3);
        break;
    default:
        for (; o < block->n_out; o++)
            outputs_at(block, type, o, 1, 4);
    }
}

ALWAYS_INLINE void linear_of_type(const struct linear_block *block, const uint32_t type)
{
    if (block->n_rows <= LINEAR_ROWS)
        few_rows(block, type);
    else
        many_rows(block, type);
}

void ksort_run_neon_linear(const struct linear_block *block)
{
    if (block->type == KSORT_F32)
        linear_of_type(block, KSORT_F32);
    else if (block->type == KSORT_F16)
        linear_of_type(block, KSORT_F16);
    else
        linear_of_type(block, KSORT_BF16);
}
