/* Matrix product with AVX-512. Many rows: linear_rows.h. Few rows, one output after another, so that the weights are
 * one sequential stream:
 *
 *     W row o   |16|16|16|16|16| ...     4 sums of 16 lanes for each row of x (up to 4, in L1), which hide the
 *                                      multiply-add's latency even for one row; added up once an output
 *
 * Bytes moved: the block's weights once.
 */
#include "x86/float_rows_avx512.h"
#include "x86/lanes_avx512.h"
#include "vector/linear_outputs.h"

#define ROWS_AT_ONCE 12 /* 24 sums, 2 registers of the panel and one x: 27 of 32 registers */

ALWAYS_INLINE lanes load_values_below(const uint8_t *row, const uint32_t type, size_t n, size_t i)
{
    return load_values(row, type, i, lanes_between(0, (uint32_t)min_size(n - i, LANES)));
}

#include "vector/linear_rows.h"

#define SUMS 4

/* type and n_rows (up to 4) are constants. */
ALWAYS_INLINE void output_at(const struct linear_block *block, const uint32_t type, size_t output, const int n_rows)
{
    const size_t n_in = block->n_in, value_bytes = type == KSORT_F32 ? 4 : 2;
    const uint8_t *weights = (const uint8_t *)block->weights + output * n_in * value_bytes;
    __m512 sums[LINEAR_ROWS][SUMS];
    for (int r = 0; r < n_rows; r++)
        for (int k = 0; k < SUMS; k++)
            sums[r][k] = _mm512_setzero_ps();
    size_t i = 0;
    for (; i + 16 * SUMS <= n_in; i += 16 * SUMS)
        for (int k = 0; k < SUMS; k++) {
            __m512 weight = load_values(weights, type, i + 16 * k, 0xFFFF);
            for (int r = 0; r < n_rows; r++) {
                __m512 x = _mm512_loadu_ps(block->x + r * block->x_row_stride + i + 16 * k);
                sums[r][k] = _mm512_fmadd_ps(weight, x, sums[r][k]);
            }
        }
    for (; i < n_in; i += 16) {
        __mmask16 inside = (__mmask16)(n_in - i < 16 ? (1u << (n_in - i)) - 1 : 0xFFFFu);
        __m512 weight = load_values(weights, type, i, inside);
        for (int r = 0; r < n_rows; r++) {
            __m512 x = _mm512_maskz_loadu_ps(inside, block->x + r * block->x_row_stride + i);
            sums[r][0] = _mm512_fmadd_ps(weight, x, sums[r][0]);
        }
    }
    for (int r = 0; r < n_rows; r++) {
        __m512 sum = _mm512_add_ps(_mm512_add_ps(sums[r][0], sums[r][1]), _mm512_add_ps(sums[r][2], sums[r][3]));
        block->y[r * block->y_row_stride + output] = _mm512_reduce_add_ps(sum);
    }
}

void ksort_avx512_linear(const struct linear_block *block)
{
    if (block->n_rows > LINEAR_ROWS)
        linear_rows(block);
    else
        linear_outputs(block, output_at);
}
