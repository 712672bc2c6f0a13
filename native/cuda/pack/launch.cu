/* Packing, launched: which kernel of pack/kernel.cuh, and its grid. Compiled once a head dimension. */
#include "common/phases.cuh"
#include "pack/kernel.cuh"

namespace {

/* Thread blocks of keys or values below which each has one head, to use more multiprocessors. */
constexpr uint64_t FEW_BLOCKS = 128;

pack_work work_of(const pack_job &job)
{
    pack_work work = {};
    work.tokens = job.tokens;
    work.rope = job.rope;
    work.token_stride = job.token_stride;
    work.context_stride = job.context_stride;
    work.x_type = job.x_type;
    if (job.has_k)
        work.sides[work.n_sides++] = {job.k, job.k_transform, job.k_x, job.has_k_transform, job.rope.partner != NULL};
    if (job.has_v)
        work.sides[work.n_sides++] = {job.v, job.v_transform, job.v_x, job.has_v_transform, false};
    work.n_kv_heads = work.sides[0].cache.pages.n_kv_heads;
    return work;
}

template <int HEAD_DIM, uint32_t X_TYPE>
cudaError_t launch_kernel(const pack_work &work, bool is_transformed, cudaLaunchConfig_t &config)
{
    const bool is_nearest = !is_transformed && may_stage_rope_table<HEAD_DIM>(work.rope);
    void (*kernel)(pack_work) = is_nearest ? pack_nearest_kernel<HEAD_DIM, X_TYPE> : pack_any_kernel<HEAD_DIM, X_TYPE>;
    size_t bytes = sizeof(rope_smem<HEAD_DIM, X_TYPE>);
    if (is_transformed && sizeof(pack_smem<HEAD_DIM>) > bytes)
        bytes = sizeof(pack_smem<HEAD_DIM>);
    config.dynamicSmemBytes = bytes;
    if (bytes > 48 << 10) { /* what a kernel may have without asking */
        cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
        if (error != cudaSuccess)
            return error;
    }
    /* To begin early costs more than it gains where there are few rows to ask L2 for. */
    if (is_nearest && work.tokens.n_tokens >= GROUP_SLOTS)
        return launch_dependent(config, kernel, work);
    return cudaLaunchKernelEx(&config, kernel, work);
}

} // namespace

template <int HEAD_DIM>
cudaError_t launch_pack(const pack_job &job, cudaStream_t stream)
{
    pack_work work = work_of(job);
    const bool is_transformed = job.has_k_transform || job.has_v_transform;
    const uint32_t slots = is_transformed ? STRIP_TOKENS : GROUP_SLOTS;
    /* n tokens touch the most strips or groups where the first is the last of its strip. */
    const uint64_t n_parts = ((uint64_t)job.tokens.n_tokens + slots - 2) / slots + 1;
    const uint32_t group_heads =
        job.x_type == KSORT_F32 ? GROUP_HEADS<HEAD_DIM, KSORT_F32> : GROUP_HEADS<HEAD_DIM, KSORT_F16>;
    const uint32_t head_groups = (work.n_kv_heads + group_heads - 1) / group_heads;
    const bool has_few = n_parts * head_groups * job.tokens.n_contexts < FEW_BLOCKS;
    work.block_heads = has_few ? 1 : group_heads;
    const uint32_t heads_a_block = is_transformed ? 1 : work.block_heads; /* at least */
    const uint64_t blocks = n_parts * work.n_sides;
    if (blocks > INT32_MAX)
        return cudaErrorInvalidConfiguration;
    cudaLaunchConfig_t config = {};
    config.gridDim =
        dim3((uint32_t)blocks, (work.n_kv_heads + heads_a_block - 1) / heads_a_block, job.tokens.n_contexts);
    config.blockDim = dim3(strip_shape<HEAD_DIM>::THREADS);
    config.stream = stream;
    if (job.x_type == KSORT_F16)
        return launch_kernel<HEAD_DIM, KSORT_F16>(work, is_transformed, config);
    if (job.x_type == KSORT_BF16)
        return launch_kernel<HEAD_DIM, KSORT_BF16>(work, is_transformed, config);
    return launch_kernel<HEAD_DIM, KSORT_F32>(work, is_transformed, config);
}

template cudaError_t launch_pack<KSORT_HEAD_DIM>(const pack_job &, cudaStream_t);
