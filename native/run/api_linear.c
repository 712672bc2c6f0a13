/* ksort_linear: each part computes a contiguous range of outputs, and so reads a contiguous range of the weights:
 *
 *     W [n_out][n_in]   | part 0 | part 1 | ... |   rows in order; for many rows of x, whole groups of GROUP_OUTPUTS
 *
 * Bytes that must move: n_out * n_in * bytes a value, once; x and y stay in the caches.
 */
#include "linear.h"

#include "check.h"

#define REST_SHARE 4            /* of few rows' weights, one in so many is left for short parts */
#define PART_BYTES (128u << 10) /* a short part: some 8 us of reading, against up to 0.5 us for taking it from others */
#define MAX_PARTS 1024
#define GROUP_OUTPUTS 32 /* a multiple of every kernel's panel */

static size_t row_bytes(const ksort_linear_args *args)
{
    return args->n_in * (args->type == KSORT_F32 ? 4 : 2);
}

ksort_status ksort_linear_prepare(const ksort_linear_args *from, struct linear_job *job)
{
    const ksort_linear_args *args = &job->args;
    ksort_status status = READ_STRUCT(&job->args, from, type);
    if (status != KSORT_OK)
        return status;
    if (args->type != KSORT_F32 && args->type != KSORT_F16 && args->type != KSORT_BF16)
        return KSORT_ERR_TYPE;
    if (!args->weights || !args->x || !args->y || args->n_out == 0 || args->n_in == 0 || args->n_rows == 0)
        return KSORT_ERR_ARGUMENT;
    if (args->n_in > PTRDIFF_MAX / sizeof(float) / args->n_out ||
        check_rows(args->n_rows, args->x_row_stride, args->n_in) != KSORT_OK ||
        check_rows(args->n_rows, args->y_row_stride, args->n_out) != KSORT_OK)
        return KSORT_ERR_ARGUMENT;
    job->n_long = 0;
    job->kernels = ksort_run_kernels();
    return job->kernels ? KSORT_OK : KSORT_ERR_KERNELS;
}

/* Outputs that a part does not cut: few rows any, many rows a multiple of what kernels multiply at once. */
static size_t group_outputs(const ksort_linear_args *args)
{
    return args->n_rows > LINEAR_ROWS ? GROUP_OUTPUTS : 1;
}

static size_t n_groups(const ksort_linear_args *args)
{
    return (args->n_out - 1) / group_outputs(args) + 1;
}

uint32_t ksort_linear_parts(struct linear_job *job, uint32_t n_threads)
{
    const ksort_linear_args *args = &job->args;
    if (args->n_rows > LINEAR_ROWS)
        return (uint32_t)min_size(n_groups(args), MAX_PARTS);
    job->n_long = (uint32_t)min_size(n_threads, MAX_PARTS);
    size_t rest_bytes = args->n_out * row_bytes(args) / REST_SHARE;
    return job->n_long + (uint32_t)min_size(max_size(rest_bytes / PART_BYTES, job->n_long), MAX_PARTS);
}

/* Groups of part ith of nth: of the job's long parts, or of the rest. */
static struct range groups_of_part(const struct linear_job *job, uint32_t ith, uint32_t nth)
{
    size_t total = n_groups(&job->args), rest = job->n_long ? total / REST_SHARE : total, in_long = total - rest;
    if (ith < job->n_long)
        return share_of(in_long, ith, job->n_long);
    struct range groups = share_of(rest, ith - job->n_long, nth - job->n_long);
    return (struct range){in_long + groups.begin, in_long + groups.end};
}

void ksort_linear_run(const struct linear_job *job, uint32_t ith, uint32_t nth)
{
    const ksort_linear_args *args = &job->args;
    struct range groups = groups_of_part(job, ith, nth);
    size_t begin = groups.begin * group_outputs(args), end = min_size(groups.end * group_outputs(args), args->n_out);
    if (begin >= end)
        return;
    struct linear_block block = {
        .weights = (const uint8_t *)args->weights + begin * row_bytes(args),
        .x = args->x,
        .y = args->y + begin,
        .x_row_stride = args->x_row_stride,
        .y_row_stride = args->y_row_stride,
        .n_out = end - begin,
        .n_in = args->n_in,
        .n_rows = args->n_rows,
        .type = args->type,
    };
    job->kernels->linear(&block);
    for (uint32_t r = 0; args->bias && r < block.n_rows; r++)
        for (size_t o = 0; o < block.n_out; o++)
            block.y[r * block.y_row_stride + o] += args->bias[begin + o];
}

ksort_status ksort_linear(const ksort_linear_args *args, uint32_t ith, uint32_t nth)
{
    struct linear_job job;
    ksort_status status = ith < nth ? ksort_linear_prepare(args, &job) : KSORT_ERR_ARGUMENT;
    if (status == KSORT_OK)
        ksort_linear_run(&job, ith, nth);
    return status;
}
