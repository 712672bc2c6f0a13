/* ksort_linear: each part computes a contiguous range of outputs, and so reads a contiguous range of the weights:
 *
 *     W [n_out][n_in]   | part 0 | part 1 | ... |   rows in order, once for up to LINEAR_ROWS rows of x
 *
 * Bytes that must move: n_out * n_in * bytes a value; x and y stay in L1 and L2.
 */
#include "linear.h"

#include "check.h"

#define PART_BYTES (64u << 10) /* of weights: about 2 us of reading, against some 0.1 us for taking a part */
#define MAX_PARTS 1024

static size_t row_bytes(const ksort_linear_args *args)
{
    return args->n_in * (args->type == KSORT_F32 ? 4 : 2);
}

ksort_status ksort_linear_prepare(const ksort_linear_args *args, struct linear_job *job)
{
    if (!args)
        return KSORT_ERR_ARGUMENT;
    if (args->struct_size != sizeof *args)
        return KSORT_ERR_STRUCT_SIZE;
    if (args->type != KSORT_F32 && args->type != KSORT_F16 && args->type != KSORT_BF16)
        return KSORT_ERR_TYPE;
    if (!args->weights || !args->x || !args->y || args->n_out == 0 || args->n_in == 0 || args->n_rows == 0)
        return KSORT_ERR_ARGUMENT;
    if (args->n_in > PTRDIFF_MAX / sizeof(float) / args->n_out ||
        ksort_check_rows(args->n_rows, args->x_row_stride, args->n_in) != KSORT_OK ||
        ksort_check_rows(args->n_rows, args->y_row_stride, args->n_out) != KSORT_OK)
        return KSORT_ERR_ARGUMENT;
    *job = (struct linear_job){args, ksort_kernel_table()};
    return job->kernels ? KSORT_OK : KSORT_ERR_KERNELS;
}

uint32_t ksort_linear_parts(const struct linear_job *job)
{
    size_t bytes = job->args->n_out * row_bytes(job->args);
    return (uint32_t)min_size(max_size(bytes / PART_BYTES, 1), MAX_PARTS);
}

void ksort_linear_run(const struct linear_job *job, uint32_t ith, uint32_t nth)
{
    const ksort_linear_args *args = job->args;
    struct range outputs = share_of(args->n_out, ith, nth);
    for (uint32_t row = 0; row < args->n_rows; row += LINEAR_ROWS) {
        struct linear_block block = {
            .weights = (const uint8_t *)args->weights + outputs.begin * row_bytes(args),
            .x = args->x + row * args->x_row_stride,
            .y = args->y + row * args->y_row_stride + outputs.begin,
            .x_row_stride = args->x_row_stride,
            .y_row_stride = args->y_row_stride,
            .n_out = outputs.end - outputs.begin,
            .n_in = args->n_in,
            .n_rows = (uint32_t)min_size(args->n_rows - row, LINEAR_ROWS),
            .type = args->type,
        };
        job->kernels->linear(&block);
        if (!args->bias)
            continue;
        for (uint32_t r = 0; r < block.n_rows; r++)
            for (size_t o = 0; o < block.n_out; o++)
                block.y[r * block.y_row_stride + o] += args->bias[outputs.begin + o];
    }
}

ksort_status ksort_linear(const ksort_linear_args *args, uint32_t ith, uint32_t nth)
{
    struct linear_job job;
    ksort_status status = ith < nth ? ksort_linear_prepare(args, &job) : KSORT_ERR_ARGUMENT;
    if (status == KSORT_OK)
        ksort_linear_run(&job, ith, nth);
    return status;
}
