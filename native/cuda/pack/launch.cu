/* Packing, launched: which kernel of pack/kernel.cuh, and its grid. Compiled once a head dimension. */
#include <algorithm>

#include "common/phases.cuh"
#include "pack/kernel.cuh"

namespace {

/* Thread blocks of keys or values below which each has one head, to use more multiprocessors. */
constexpr uint64_t FEW_BLOCKS = 128;

/* Heads of all tokens from which on transformed ones are packed as many. */
constexpr uint64_t MANY_HEADS = 5120;

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

bool all_are_transformed(const pack_work &work)
{
    return work.sides[0].is_transformed && (work.n_sides == 1 || work.sides[1].is_transformed);
}

bool has_many_tokens(const pack_work &work)
{
    return (uint64_t)work.tokens.n_tokens * work.tokens.n_contexts * work.n_kv_heads >= MANY_HEADS;
}

/* Parts of n slots that new tokens touch at most: where the first is the last of its part. */
uint64_t parts_touched(uint64_t n_tokens, uint32_t n)
{
    return (n_tokens + n - 2) / n + 1;
}

cudaError_t launch_blocks(void (*kernel)(pack_work), const pack_work &work, uint64_t n_parts, uint32_t n_head_groups,
                          uint32_t threads, size_t shared_bytes, bool is_dependent, cudaStream_t stream)
{
    if (n_parts * work.n_sides > INT32_MAX)
        return cudaErrorInvalidConfiguration;
    if (shared_bytes > 48 << 10) { /* what a kernel may have without asking */
        const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
        cudaError_t error = cudaFuncSetAttribute(kernel, attribute, (int)shared_bytes);
        if (error != cudaSuccess)
            return error;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((uint32_t)(n_parts * work.n_sides), n_head_groups, work.tokens.n_contexts);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    return is_dependent ? launch_dependent(config, kernel, work) : cudaLaunchKernelEx(&config, kernel, work);
}

/* Sides without a transform. */
template <int HEAD_DIM, uint32_t X_TYPE>
cudaError_t launch_nearest(pack_work &work, cudaStream_t stream)
{
    constexpr uint32_t HEADS = GROUP_HEADS<HEAD_DIM, X_TYPE>;
    const uint64_t n_parts = parts_touched(work.tokens.n_tokens, GROUP_SLOTS);
    const uint32_t head_groups = (work.n_kv_heads + HEADS - 1) / HEADS;
    work.block_heads = n_parts * head_groups * work.tokens.n_contexts < FEW_BLOCKS ? 1 : HEADS;
    const bool is_staged = may_stage_rope_table<HEAD_DIM>(work.rope);
    /* To begin early costs more than it gains where there are few rows to ask L2 for. */
    const bool is_dependent = is_staged && work.tokens.n_tokens >= GROUP_SLOTS;
    return launch_blocks(is_staged ? pack_nearest_kernel<HEAD_DIM, X_TYPE> : pack_any_kernel<HEAD_DIM, X_TYPE>, work,
                         n_parts, (work.n_kv_heads + work.block_heads - 1) / work.block_heads, PACK_THREADS<HEAD_DIM>,
                         sizeof(rope_smem<HEAD_DIM, X_TYPE>), is_dependent, stream);
}

/* Few tokens, with a transform of keys or values or both. */
template <int HEAD_DIM, uint32_t X_TYPE>
cudaError_t launch_any(pack_work &work, cudaStream_t stream)
{
    constexpr uint32_t TOKENS = few_shape<HEAD_DIM>::TOKENS;
    work.block_heads = 1;
    /* A side without a transform has parts of GROUP_SLOTS: never more of them. */
    const uint64_t n_parts = (work.tokens.n_tokens - 1) / TOKENS + 2;
    const bool is_whole = all_are_transformed(work);
    const size_t bytes = sizeof(few_smem<HEAD_DIM>), nearest_bytes = sizeof(rope_smem<HEAD_DIM, X_TYPE>);
    return launch_blocks(pack_any_kernel<HEAD_DIM, X_TYPE>, work, n_parts - is_whole, work.n_kv_heads,
                         PACK_THREADS<HEAD_DIM>, is_whole ? bytes : std::max(bytes, nearest_bytes), false, stream);
}

template <int HEAD_DIM, uint32_t X_TYPE>
cudaError_t launch_many(const pack_work &work, cudaStream_t stream)
{
    using shape = many_shape<HEAD_DIM>;
    return launch_blocks(pack_many_kernel<HEAD_DIM, X_TYPE>, work, parts_touched(work.tokens.n_tokens, shape::SLOTS),
                         work.n_kv_heads, shape::THREADS, sizeof(many_smem<HEAD_DIM>), false, stream);
}

/* The sides with a transform, or those without. */
pack_work sides_of(const pack_work &work, bool is_transformed)
{
    pack_work some = work;
    some.n_sides = 0;
    for (uint32_t i = 0; i < work.n_sides; i++)
        if (work.sides[i].is_transformed == is_transformed)
            some.sides[some.n_sides++] = work.sides[i];
    return some;
}

template <int HEAD_DIM, uint32_t X_TYPE>
cudaError_t launch_sides(const pack_work &work, cudaStream_t stream)
{
    pack_work transformed = sides_of(work, true), nearest = sides_of(work, false), all = work;
    if (transformed.n_sides && !has_many_tokens(work))
        return launch_any<HEAD_DIM, X_TYPE>(all, stream);
    cudaError_t error = nearest.n_sides ? launch_nearest<HEAD_DIM, X_TYPE>(nearest, stream) : cudaSuccess;
    if (error == cudaSuccess && transformed.n_sides)
        error = launch_many<HEAD_DIM, X_TYPE>(transformed, stream);
    return error;
}

} // namespace

template <int HEAD_DIM>
cudaError_t launch_pack(const pack_job &job, cudaStream_t stream)
{
    const pack_work work = work_of(job);
    if (job.x_type == KSORT_F16)
        return launch_sides<HEAD_DIM, KSORT_F16>(work, stream);
    if (job.x_type == KSORT_BF16)
        return launch_sides<HEAD_DIM, KSORT_BF16>(work, stream);
    return launch_sides<HEAD_DIM, KSORT_F32>(work, stream);
}

template cudaError_t launch_pack<KSORT_HEAD_DIM>(const pack_job &, cudaStream_t);
