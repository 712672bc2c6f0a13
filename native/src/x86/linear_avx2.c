/* Matrix product with AVX2. Many rows: linear_rows.h. Few rows, one output after another, so that the weights are one
 * sequential stream:
 *
 *     W row o   | 8| 8| 8| 8| 8| ...     4 sums of 8 lanes for each row of x (up to 4, in L1), which hide the
 *                                      multiply-add's latency even for one row; added up once an output
 *
 * Bytes moved: the block's weights once.
 */
#include "half.h"
#include "x86/float_rows_avx2.h"
#include "x86/lanes_avx2.h"
#include "vector/linear_outputs.h"

#define ROWS_AT_ONCE 6 /* 12 sums, 2 registers of the panel and one x: 15 of 16 registers */

ALWAYS_INLINE lanes load_values_below(const uint8_t *row, const uint32_t type, size_t n, size_t i)
{
    if (n - i >= LANES)
        return load_values(row, type, i);
    lanes values = {0};
    for (size_t k = 0; i + k < n; k++)
        values[k] = load_value(row, type, i + k);
    return values;
}

#include "vector/linear_rows.h"

#define SUMS 4

/* type and n_rows (up to 4) are constants. */
ALWAYS_INLINE void output_at(const struct linear_block *block, const uint32_t type, size_t output, const int n_rows)
{
    const size_t n_in = block->n_in, value_bytes = type == KSORT_F32 ? 4 : 2;
    const uint8_t *weights = (const uint8_t *)block->weights + output * n_in * value_bytes;
    __m256 sums[LINEAR_ROWS][SUMS];
    for (int r = 0; r < n_rows; r++)
        for (int k = 0; k < SUMS; k++)
            sums[r][k] = _mm256_setzero_ps();
    size_t in_registers = n_in / (8 * SUMS) * (8 * SUMS);
    for (size_t i = 0; i < in_registers; i += 8 * SUMS)
        for (int k = 0; k < SUMS; k++) {
            __m256 weight = load_values(weights, type, i + 8 * k);
            for (int r = 0; r < n_rows; r++) {
                __m256 x = _mm256_loadu_ps(block->x + r * block->x_row_stride + i + 8 * k);
                sums[r][k] = _mm256_fmadd_ps(weight, x, sums[r][k]);
            }
        }
    for (int r = 0; r < n_rows; r++) {
        __m256 sum_lanes = _mm256_add_ps(_mm256_add_ps(sums[r][0], sums[r][1]), _mm256_add_ps(sums[r][2], sums[r][3]));
        float sum = sum_of_lanes(sum_lanes);
        for (size_t i = in_registers; i < n_in; i++)
            sum += load_value(weights, type, i) * block->x[r * block->x_row_stride + i];
        block->y[r * block->y_row_stride + output] = sum;
    }
}

void ksort_avx2_linear(const struct linear_block *block)
{
    if (block->n_rows > LINEAR_ROWS)
        linear_rows(block);
    else
        linear_outputs(block, output_at);
}
