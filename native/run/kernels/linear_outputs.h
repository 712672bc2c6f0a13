/* Matrix product of few rows of x, bound by reading the weights: a block's outputs in streams, far from each other.
 *
 *     W [n_out][n_in]   | stream 0  --> | stream 1  --> | stream 2  --> | stream 3  --> | rest |
 *
 * One output of every stream at a time. The hardware asks for the lines ahead of each stream and stops at the end of a
 * page, so several streams keep more lines on their way than one: 4 read up to a quarter faster than one or than rows
 * next to each other, 8 no faster.
 */
#ifndef KSORT_LINEAR_OUTPUTS_H
#define KSORT_LINEAR_OUTPUTS_H

#include "run_kernels.h"

#define SUMS 2 /* registers of partial sums an output and row of x */
#define MOST_STREAMS 4

/* y[r][first + s * distance] for all rows r < n_rows and streams s < n_streams; every output is summed in the same way.
 * type, n_streams (up to MOST_STREAMS) and n_rows (up to LINEAR_ROWS) are constants. */
typedef void outputs_function(const struct linear_block *block, uint32_t type, size_t first, size_t distance,
                              int n_streams, int n_rows);

/* most_sums: registers that there are for sums. type and n_rows are constants. */
ALWAYS_INLINE void outputs_in_streams(const struct linear_block *block, const uint32_t type, const int n_rows,
                                      outputs_function *outputs_at, const int most_sums)
{
    const int n_streams = (int)min_size((size_t)(most_sums / (SUMS * n_rows)), MOST_STREAMS);
    const size_t distance = block->n_out / n_streams;
    for (size_t o = 0; o < distance; o++)
        outputs_at(block, type, o, distance, n_streams, n_rows);
    for (size_t o = n_streams * distance; o < block->n_out; o++)
        outputs_at(block, type, o, 0, 1, n_rows);
}

ALWAYS_INLINE void outputs_of_type(const struct linear_block *block, const uint32_t type, outputs_function *outputs_at,
                                   const int most_sums)
{
    switch (block->n_rows) {
    case 1: outputs_in_streams(block, type, 1, outputs_at, most_sums); break;
    case 2: outputs_in_streams(block, type, 2, outputs_at, most_sums); break;
    case 3: outputs_in_streams(block, type, 3, outputs_at, most_sums); break;
    default: outputs_in_streams(block, type, 4, outputs_at, most_sums);
    }
}

ALWAYS_INLINE void linear_outputs(const struct linear_block *block, outputs_function *outputs_at, const int most_sums)
{
    if (block->type == KSORT_F32)
        outputs_of_type(block, KSORT_F32, outputs_at, most_sums);
    else if (block->type == KSORT_F16)
        outputs_of_type(block, KSORT_F16, outputs_at, most_sums);
    else
        outputs_of_type(block, KSORT_BF16, outputs_at, most_sums);
}

#endif /* KSORT_LINEAR_OUTPUTS_H */
