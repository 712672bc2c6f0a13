/* Queries as attention multiplies them, launched: by query/nearest.cuh, or where that does not take them by
 * query/transformed.cuh. Compiled once a head dimension. */
#include "query/nearest.cuh"
#include "query/transformed.cuh"

namespace {

/* Whether rows don't fill a device with more than one row a warp. */
bool has_few_rows(const attend_job &job)
{
    return (uint64_t)job.tokens.n_tokens * job.n_heads * job.tokens.n_contexts < 8192;
}

} // namespace

template <int HEAD_DIM>
cudaError_t launch_prepare_queries(const attend_job &job, cudaStream_t stream)
{
    if (is_prepared_nearest<HEAD_DIM>(job))
        return launch_prepare_nearest<HEAD_DIM>(job, stream);
    const uint64_t rows = (uint64_t)job.tokens.n_tokens * job.n_heads;
    const uint32_t rows_a_warp = has_few_rows(job) ? 1 : job.group;
    const uint64_t blocks = (rows / rows_a_warp + QUERY_WARPS - 1) / QUERY_WARPS;
    if (blocks > INT32_MAX / QUERY_WARPS)
        return cudaErrorInvalidConfiguration;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((uint32_t)blocks, job.tokens.n_contexts);
    config.blockDim = dim3(QUERY_WARPS * WARP);
    config.stream = stream;
    return cudaLaunchKernelEx(&config, prepare_kernel<HEAD_DIM>, job, rows_a_warp);
}

template cudaError_t launch_prepare_queries<KSORT_HEAD_DIM>(const attend_job &, cudaStream_t);
