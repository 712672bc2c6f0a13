/* Matrix product with AVX-512. Many rows: linear_rows.h. Few rows: linear_outputs.h, with
 *
 *     W row o   |16|16|16|16| ...     2 sums of 16 lanes for each row of x (up to 4, in L1), added up once an output;
 *                                   with 2 streams or more they hide the multiply-add's latency
 *
 * Bytes moved: the block's weights once.
 */
#include "x86/float_rows_avx512.h"
#include "x86/lanes_avx512.h"
#include "linear_outputs.h"

#define ROWS_AT_ONCE 12 /* 24 sums, 2 registers of the panel and one x: 27 of 32 registers */

ALWAYS_INLINE lanes load_values_below(const uint8_t *row, const uint32_t type, size_t n, size_t i)
{
    return load_values(row, type, i, lanes_between(0, (uint32_t)min_size(n - i, LANES)));
}

#include "linear_rows.h"

#define MOST_SUMS 16 /* of 32 registers: up to 4 streams of 1 or 2 rows, 2 of 3 or 4 */

/* See outputs_function. */
ALWAYS_INLINE void outputs_at(const struct linear_block *block, const uint32_t type, size_t first, size_t distance,
                              const int n_streams, const int n_rows)
{
    const size_t n_in = block->n_in, value_bytes = type == KSORT_F32 ? 4 : 2;
    const uint8_t *weights[MOST_STREAMS];
    __m512 sums[MOST_STREAMS][LINEAR_ROWS][SUMS];
    for (int s = 0; s < n_streams; s++) {
        weights[s] = (const uint8_t *)block->weights + (first + s * distance) * n_in * value_bytes;
        for (int r = 0; r < n_rows; r++)
            for (int k = 0; k < SUMS; k++)
                sums[s][r][k] = _mm512_setzero_ps();
    }
    size_t i = 0;
    for (; i + 16 * SUMS <= n_in; i += 16 * SUMS)
        for (int k = 0; k < SUMS; k++)
            for (int s = 0; s < n_streams; s++) {
                __m512 weight = load_values(weights[s], type, i + 16 * k, 0xFFFF);
                for (int r = 0; r < n_rows; r++) {
                    __m512 x = _mm512_loadu_ps(block->x + r * block->x_row_stride + i + 16 * k);
                    sums[s][r][k] = _mm512_fmadd_ps(weight, x, sums[s][r][k]);
                }
            }
    for (; i < n_in; i += 16) {
        __mmask16 inside = (__mmask16)(n_in - i < 16 ? (1u << (n_in - i)) - 1 : 0xFFFFu);
        for (int s = 0; s < n_streams; s++) {
            __m512 weight = load_values(weights[s], type, i, inside);
            for (int r = 0; r < n_rows; r++) {
                __m512 x = _mm512_maskz_loadu_ps(inside, block->x + r * block->x_row_stride + i);
                sums[s][r][0] = _mm512_fmadd_ps(weight, x, sums[s][r][0]);
            }
        }
    }
    for (int s = 0; s < n_streams; s++)
        for (int r = 0; r < n_rows; r++) {
            float sum = _mm512_reduce_add_ps(_mm512_add_ps(sums[s][r][0], sums[s][r][1]));
            block->y[r * block->y_row_stride + first + s * distance] = sum;
        }
}

void ksort_run_avx512_linear(const struct linear_block *block)
{
    if (block->n_rows > LINEAR_ROWS)
        linear_rows(block);
    else
        linear_outputs(block, outputs_at, MOST_SUMS);
}
