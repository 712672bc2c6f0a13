/* Packing. A strip is 16 slots of one head of keys or values, a group two strips; a thread block takes
 *
 *     nearest rounding, RoPE:   a group of a few heads, a lane a slot                            (pack_rope.cuh)
 *                       none:   a group of a few heads, a lane 8 channels of four slots a time   (pack_plain.cuh)
 *     transformed heads:        a strip of one head, a warp T tokens                             (pack_transformed.cuh)
 *
 * Bytes moved, a head of one token: head_dim times 2 or 4 in, head_dim * bits / 8 + blocks out. Besides, mostly from
 * L2: rows of cos and sin and RoPE tables once a block with nearest rounding; of transformed heads all tables once a
 * token, and once a strip the rows of the feedback matrix from the diagonal on, some 2 head_dim^2 bytes.
 */
#include "dependent_launch.cuh"
#include "pack_nearest.cuh"
#include "pack_transformed.cuh"
#include "phases.cuh"

namespace {

/* Thread blocks of a multiprocessor: what leaves registers enough. */
template <int HEAD_DIM, uint32_t X_TYPE>
constexpr int RESIDENT_NEAREST = (X_TYPE == KSORT_F32 ? 768 : 1024) / strip_shape<HEAD_DIM>::THREADS;
template <int HEAD_DIM>
constexpr int RESIDENT_ANY = 768 / strip_shape<HEAD_DIM>::THREADS;

/* Thread blocks of keys or values below which each has one head, to use more multiprocessors. */
constexpr uint64_t FEW_BLOCKS = 128;

/* Grid of both kernels: x = groups or strips of the sequence, of keys and values alternately, so that a multiprocessor
 * turns keys while it waits for values; y = KV head, or group of heads; z = sequence. */
__device__ inline const pack_side &side_of_block(const pack_work &work, uint32_t &index)
{
    const uint32_t has_two = work.n_sides - 1;
    index = blockIdx.x >> has_two;
    return work.sides[blockIdx.x & has_two];
}

template <int HEAD_DIM, uint32_t X_TYPE>
__global__ void __launch_bounds__(strip_shape<HEAD_DIM>::THREADS, RESIDENT_NEAREST<HEAD_DIM, X_TYPE>)
    pack_nearest_kernel(const __grid_constant__ pack_work work)
{
    extern __shared__ uint4 shared_chunks[];
    uint32_t group_index;
    const pack_side &side = side_of_block(work, group_index);
    let_dependent_begin();
    prefetch_rows<HEAD_DIM, X_TYPE>(work, side, group_index);
    wait_for_kernel_before();
    pack_nearest<HEAD_DIM, X_TYPE, true>(work, side, group_index, reinterpret_cast<uint8_t *>(shared_chunks));
}

/* One side may have no transform, and neither has one where a rope has more frequencies than can be staged. */
template <int HEAD_DIM, uint32_t X_TYPE>
__global__ void __launch_bounds__(strip_shape<HEAD_DIM>::THREADS, RESIDENT_ANY<HEAD_DIM>)
    pack_any_kernel(const __grid_constant__ pack_work work)
{
    extern __shared__ uint4 shared_chunks[];
    uint8_t *shared = reinterpret_cast<uint8_t *>(shared_chunks);
    uint32_t index;
    const pack_side &side = side_of_block(work, index);
    if (side.is_transformed)
        pack_transformed<HEAD_DIM>(work, side, index, shared);
    else
        pack_nearest<HEAD_DIM, X_TYPE, false>(work, side, index, shared);
}

pack_work work_of(const pack_job &job)
{
    pack_work work = {};
    work.tokens = job.tokens;
    work.rope = job.rope;
    work.token_stride = job.token_stride;
    work.sequence_stride = job.sequence_stride;
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
    const bool is_nearest = !is_transformed && may_stage_angles<HEAD_DIM>(work.rope);
    void (*kernel)(pack_work) =
        is_nearest ? pack_nearest_kernel<HEAD_DIM, X_TYPE> : pack_any_kernel<HEAD_DIM, X_TYPE>;
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

template <int HEAD_DIM>
cudaError_t launch(const pack_job &job, cudaStream_t stream)
{
    pack_work work = work_of(job);
    const bool is_transformed = job.has_k_transform || job.has_v_transform;
    const uint32_t slots = is_transformed ? STRIP_TOKENS : GROUP_SLOTS;
    /* n tokens touch the most strips or groups where the first is the last of its strip. */
    const uint64_t n_parts = ((uint64_t)job.tokens.n_tokens + slots - 2) / slots + 1;
    const uint32_t group_heads =
        job.x_type == KSORT_F32 ? GROUP_HEADS<HEAD_DIM, KSORT_F32> : GROUP_HEADS<HEAD_DIM, KSORT_F16>;
    const uint32_t head_groups = (work.n_kv_heads + group_heads - 1) / group_heads;
    const bool has_few = n_parts * head_groups * job.tokens.n_sequences < FEW_BLOCKS;
    work.block_heads = has_few ? 1 : group_heads;
    const uint32_t heads_a_block = is_transformed ? 1 : work.block_heads; /* at least */
    const uint64_t blocks = n_parts * work.n_sides;
    if (blocks > INT32_MAX)
        return cudaErrorInvalidConfiguration;
    cudaLaunchConfig_t config = {};
    config.gridDim =
        dim3((uint32_t)blocks, (work.n_kv_heads + heads_a_block - 1) / heads_a_block, job.tokens.n_sequences);
    config.blockDim = dim3(strip_shape<HEAD_DIM>::THREADS);
    config.stream = stream;
    if (job.x_type == KSORT_F16)
        return launch_kernel<HEAD_DIM, KSORT_F16>(work, is_transformed, config);
    if (job.x_type == KSORT_BF16)
        return launch_kernel<HEAD_DIM, KSORT_BF16>(work, is_transformed, config);
    return launch_kernel<HEAD_DIM, KSORT_F32>(work, is_transformed, config);
}

} // namespace

cudaError_t launch_pack(const pack_job &job, cudaStream_t stream)
{
    switch (job.has_k ? job.k.layout.head_dim : job.v.layout.head_dim) {
    case 64:
        return launch<64>(job, stream);
    case 80:
        return launch<80>(job, stream);
    case 96:
        return launch<96>(job, stream);
    case 128:
        return launch<128>(job, stream);
    default:
        return launch<256>(job, stream);
    }
}
