/* Calls a level's kernel for one output with its constants: the weights' type and the number of rows. */
#ifndef KSORT_LINEAR_OUTPUTS_H
#define KSORT_LINEAR_OUTPUTS_H

#include "kernels.h"

/* y[r][output] for all rows r < n_rows. type and n_rows (up to LINEAR_ROWS) are constants. */
typedef void output_function(const struct linear_block *block, uint32_t type, size_t output, int n_rows);

ALWAYS_INLINE void outputs_of_type(const struct linear_block *block, const uint32_t type, output_function *output_at)
{
    for (size_t o = 0; o < block->n_out; o++) {
        switch (block->n_rows) {
        case 1: output_at(block, type, o, 1); break;
        case 2: output_at(block, type, o, 2); break;
        case 3: output_at(block, type, o, 3); break;
        default: output_at(block, type, o, 4);
        }
    }
}

ALWAYS_INLINE void linear_outputs(const struct linear_block *block, output_function *output_at)
{
    if (block->type == KSORT_F32)
        outputs_of_type(block, KSORT_F32, output_at);
    else if (block->type == KSORT_F16)
        outputs_of_type(block, KSORT_F16, output_at);
    else
        outputs_of_type(block, KSORT_BF16, output_at);
}

#endif /* KSORT_LINEAR_OUTPUTS_H */
