/* Matrix product of few rows: one output after another, all rows of x beside each loaded weight.
 *
 * Bytes moved: the block's weights once.
 */
#include "half.h"
#include "scalar/scalar.h"

void ksort_scalar_linear(const struct linear_block *block)
{
    size_t weight_bytes = block->type == KSORT_F32 ? 4 : 2;
    for (size_t o = 0; o < block->n_out; o++) {
        const uint8_t *weights = (const uint8_t *)block->weights + o * block->n_in * weight_bytes;
        float sums[LINEAR_ROWS] = {0};
        for (size_t i = 0; i < block->n_in; i++) {
            float weight = load_value(weights, block->type, i);
            for (uint32_t r = 0; r < block->n_rows; r++)
                sums[r] += weight * block->x[r * block->x_row_stride + i];
        }
        for (uint32_t r = 0; r < block->n_rows; r++)
            block->y[r * block->y_row_stride + o] = sums[r];
    }
}
