/* Packing. A strip is 16 slots of one head of keys or values; a thread block takes
 *
 *     nearest rounding:   a strip of four heads, a thread 8 channels of four tokens    (pack_nearest.cuh)
 *     transformed heads:  a strip of one head, a warp T tokens                         (pack_transformed.cuh)
 *
 * Bytes moved, a head of one token: head_dim times 2 or 4 in, head_dim * bits / 8 + blocks out. Besides, mostly from
 * L2: rows of cos and sin and RoPE tables once a block with nearest rounding; of transformed heads all tables once a
 * token, and once a strip the rows of the feedback matrix from the diagonal on, some 2 head_dim^2 bytes.
 */
#include "pack_nearest.cuh"
#include "pack_transformed.cuh"
#include "phases.cuh"

namespace {

/* Of a multiprocessor: what leaves registers enough. */
constexpr int RESIDENT_NEAREST = 1280, RESIDENT_ANY = 768;

/* Grid of both kernels: x = strips of the sequence, those of keys first, as RoPE takes longer: alternating, keys and
 * values would go to different multiprocessors; y = KV head or group of them; z = sequence. */
__device__ inline const pack_side &side_of_block(const pack_work &work, uint32_t &strip_index)
{
    const uint32_t second = blockIdx.x >= work.n_strips;
    strip_index = blockIdx.x - second * work.n_strips;
    return work.sides[second];
}

template <int HEAD_DIM, uint32_t X_TYPE>
__global__ void __launch_bounds__(strip_shape<HEAD_DIM>::THREADS, RESIDENT_NEAREST / strip_shape<HEAD_DIM>::THREADS)
    pack_nearest_kernel(const __grid_constant__ pack_work work)
{
    extern __shared__ uint4 shared_chunks[];
    uint32_t strip_index;
    const pack_side &side = side_of_block(work, strip_index);
    pack_nearest<HEAD_DIM, X_TYPE, true>(work, side, strip_index, reinterpret_cast<uint8_t *>(shared_chunks));
}

/* One side may have no transform, and neither has one where a rope has more frequencies than can be staged. */
template <int HEAD_DIM, uint32_t X_TYPE>
__global__ void __launch_bounds__(strip_shape<HEAD_DIM>::THREADS, RESIDENT_ANY / strip_shape<HEAD_DIM>::THREADS)
    pack_any_kernel(const __grid_constant__ pack_work work)
{
    extern __shared__ uint4 shared_chunks[];
    uint8_t *shared = reinterpret_cast<uint8_t *>(shared_chunks);
    uint32_t strip_index;
    const pack_side &side = side_of_block(work, strip_index);
    if (side.is_transformed)
        pack_transformed<HEAD_DIM>(work, side, strip_index, shared);
    else
        pack_nearest<HEAD_DIM, X_TYPE, false>(work, side, strip_index, shared);
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
    void (*kernel)(pack_work) = !is_transformed && may_stage_angles<HEAD_DIM>(work.rope)
                                    ? pack_nearest_kernel<HEAD_DIM, X_TYPE>
                                    : pack_any_kernel<HEAD_DIM, X_TYPE>;
    size_t bytes = nearest_smem_bytes<HEAD_DIM, X_TYPE>();
    if (is_transformed && sizeof(pack_smem<HEAD_DIM>) > bytes)
        bytes = sizeof(pack_smem<HEAD_DIM>);
    config.dynamicSmemBytes = bytes;
    if (bytes > 48 << 10) { /* what a kernel may have without asking */
        cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
        if (error != cudaSuccess)
            return error;
    }
    return cudaLaunchKernelEx(&config, kernel, work);
}

template <int HEAD_DIM>
cudaError_t launch(const pack_job &job, cudaStream_t stream)
{
    pack_work work = work_of(job);
    /* n tokens touch the most strips where the first is the last of its strip. */
    const uint64_t n_strips = ((uint64_t)job.tokens.n_tokens + STRIP_TOKENS - 2) / STRIP_TOKENS + 1;
    work.n_strips = (uint32_t)n_strips;
    const bool is_transformed = job.has_k_transform || job.has_v_transform;
    const uint32_t heads_a_block = is_transformed ? 1 : nearest_shape<HEAD_DIM>::HEADS;
    const uint64_t blocks = n_strips * work.n_sides;
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
