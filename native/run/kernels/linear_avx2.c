/* Matrix product with AVX2. Many rows: linear_rows.h. Few rows: linear_outputs.h, with
 *
 *     W row o   | 8| 8| 8| 8| ...     2 sums of 8 lanes for each row of x (up to 4, in L1), added up once an output;
 *                                   with 4 streams or rows they hide the multiply-add's latency
 *
 * Bytes moved: the block's weights once.
 */
#include "half.h"
#include "x86/float_rows_avx2.h"
#include "x86/lanes_avx2.h"
#include "linear_outputs.h"

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

#include "linear_rows.h"

#define MOST_SUMS 8 /* of 16 registers: 4 streams of 1 row, 2 of 2, 1 of 3 or 4 */

/* See outputs_function. */
ALWAYS_INLINE void outputs_at(const struct linear_block *block, const uint32_t type, size_t first, size_t distance,
                              const int n_streams, const int n_rows)
{
    const size_t n_in = block->n_in, value_bytes = type == KSORT_F32 ? 4 : 2;
    const uint8_t *weights[MOST_STREAMS];
    __m256 sums[MOST_STREAMS][LINEAR_ROWS][SUMS];
    for (int s = 0; s < n_streams; s++) {
        weights[s] = (const uint8_t *)block->weights + (first + s * distance) * n_in * value_bytes;
        for (int r = 0; r < n_rows; r++)
            for (int k = 0; k < SUMS; k++)
                sums[s][r][k] = _mm256_setzero_ps();
    }
    size_t in_registers = n_in / (8 * SUMS) * (8 * SUMS);
    for (size_t i = 0; i < in_registers; i += 8 * SUMS)
        for (int k = 0; k < SUMS; k++)
            for (int s = 0; s < n_streams; s++) {
                __m256 weight = load_values(weights[s], type, i + 8 * k);
                for (int r = 0; r < n_rows; r++) {
                    __m256 x = _mm256_loadu_ps(block->x + r * block->x_row_stride + i + 8 * k);
                    sums[s][r][k] = _mm256_fmadd_ps(weight, x, sums[s][r][k]);
                }
            }
    for (int s = 0; s < n_streams; s++)
        for (int r = 0; r < n_rows; r++) {
            float sum = sum_of_lanes(_mm256_add_ps(sums[s][r][0], sums[s][r][1]));
            for (size_t i = in_registers; i < n_in; i++)
                sum += load_value(weights[s], type, i) * block->x[r * block->x_row_stride + i];
            block->y[r * block->y_row_stride + first + s * distance] = sum;
        }
}

void ksort_run_avx2_linear(const struct linear_block *block)
{
    if (block->n_rows > LINEAR_ROWS)
        linear_rows(block);
    else
        linear_outputs(block, outputs_at, MOST_SUMS);
}
