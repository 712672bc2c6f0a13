/* ksort_rms_norm and ksort_swiglu: each part takes a contiguous range of rows.
 *
 * Bytes that must move: the rows in and out, once; between the products of a block they are in the caches.
 */
#include "check.h"
#include "rows.h"

uint32_t ksort_run_abi_version(void)
{
    return KSORT_RUN_ABI_VERSION;
}

ksort_status ksort_rms_norm_prepare(const ksort_rms_norm_args *from, struct rms_norm_job *job)
{
    ksort_rms_norm_args *args = &job->args;
    ksort_status status = READ_STRUCT(args, from, epsilon);
    if (status != KSORT_OK)
        return status;
    args->heads = args->heads ? args->heads : 1;
    args->added_scale = args->added_scale != 0.0f ? args->added_scale : 1.0f;
    size_t row_values = (size_t)args->heads * args->n;
    if (!args->x || !args->gain || !args->y || args->n == 0 || args->n_rows == 0 ||
        (args->added && check_rows(args->n_rows, args->added_row_stride, row_values) != KSORT_OK) ||
        check_rows(args->n_rows, args->x_row_stride, row_values) != KSORT_OK ||
        check_rows(args->n_rows, args->y_row_stride, row_values) != KSORT_OK)
        return KSORT_ERR_ARGUMENT;
    job->kernels = ksort_run_kernels();
    return job->kernels ? KSORT_OK : KSORT_ERR_KERNELS;
}

void ksort_rms_norm_run(const struct rms_norm_job *job, uint32_t ith, uint32_t nth)
{
    const ksort_rms_norm_args *args = &job->args;
    struct range rows = share_of(args->n_rows, ith, nth);
    for (size_t row = rows.begin; row < rows.end; row++)
        for (size_t head = 0; head < args->heads; head++) {
            size_t at = head * args->n;
            const float *added = args->added ? args->added + row * args->added_row_stride + at : NULL;
            job->kernels->rms_norm(args->x + row * args->x_row_stride + at, added, args->added_scale, args->gain,
                                   args->n, args->epsilon, args->y + row * args->y_row_stride + at);
        }
}

ksort_status ksort_rms_norm(const ksort_rms_norm_args *args, uint32_t ith, uint32_t nth)
{
    struct rms_norm_job job;
    ksort_status status = ith < nth ? ksort_rms_norm_prepare(args, &job) : KSORT_ERR_ARGUMENT;
    if (status == KSORT_OK)
        ksort_rms_norm_run(&job, ith, nth);
    return status;
}

ksort_status ksort_swiglu_prepare(const ksort_swiglu_args *from, struct swiglu_job *job)
{
    const ksort_swiglu_args *args = &job->args;
    ksort_status status = READ_STRUCT(&job->args, from, n_rows);
    if (status != KSORT_OK)
        return status;
    if (!args->gate || !args->up || !args->y || args->n == 0 || args->n_rows == 0 ||
        check_rows(args->n_rows, args->row_stride, args->n) != KSORT_OK ||
        check_rows(args->n_rows, args->y_row_stride, args->n) != KSORT_OK)
        return KSORT_ERR_ARGUMENT;
    job->kernels = ksort_run_kernels();
    return job->kernels ? KSORT_OK : KSORT_ERR_KERNELS;
}

void ksort_swiglu_run(const struct swiglu_job *job, uint32_t ith, uint32_t nth)
{
    const ksort_swiglu_args *args = &job->args;
    struct range rows = share_of(args->n_rows, ith, nth);
    for (size_t row = rows.begin; row < rows.end; row++)
        job->kernels->swiglu(args->gate + row * args->row_stride, args->up + row * args->row_stride, args->n,
                             args->y + row * args->y_row_stride);
}

ksort_status ksort_swiglu(const ksort_swiglu_args *args, uint32_t ith, uint32_t nth)
{
    struct swiglu_job job;
    ksort_status status = ith < nth ? ksort_swiglu_prepare(args, &job) : KSORT_ERR_ARGUMENT;
    if (status == KSORT_OK)
        ksort_swiglu_run(&job, ith, nth);
    return status;
}
