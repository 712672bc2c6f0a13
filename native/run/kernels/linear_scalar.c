/* Matrix product, LINEAR_ROWS rows of x at a time: one output after another, all rows beside each loaded weight.
 *
 * Bytes moved: the block's weights once for every LINEAR_ROWS rows.
 */
#include "half.h"
#include "run_kernels.h"

static void output_at(const struct linear_block *block, size_t output, uint32_t first_row, uint32_t n_rows)
{
    size_t weight_bytes = block->type == KSORT_F32 ? 4 : 2;
    const uint8_t *weights = (const uint8_t *)block->weights + output * block->n_in * weight_bytes;
    const float *x = block->x + first_row * block->x_row_stride;
    float sums[LINEAR_ROWS] = {0};
    for (size_t i = 0; i < block->n_in; i++) {
        float weight = load_value(weights, block->type, i);
        for (uint32_t r = 0; r < n_rows; r++)
            sums[r] += weight * x[r * block->x_row_stride + i];
    }
    for (uint32_t r = 0; r < n_rows; r++)
        block->y[(first_row + r) * block->y_row_stride + output] = sums[r];
}

void ksort_run_scalar_linear(const struct linear_block *block)
{
    for (uint32_t row = 0; row < block->n_rows; row += LINEAR_ROWS)
        for (size_t o = 0; o < block->n_out; o++)
            output_at(block, o, row, (uint32_t)min_size(block->n_rows - row, LINEAR_ROWS));
}
