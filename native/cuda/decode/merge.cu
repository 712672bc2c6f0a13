/* Joins the splits of decode attention, one block a row (query head of a context):
 *
 *     parts [n_splits] --a thread each--> factors [n_splits], shared; sum
 *     values [n_splits][head_dim] --warp w: splits w, w + n_warps, ...--> sums [n_warps][head_dim], shared
 *     --warp 0: over the warps, / sum, restore--> out [head_dim]
 *
 * Bytes moved: (head_dim + 2) * 4 a split, mostly from L2, and out. What takes time is latency: a warp asks for BATCH
 * splits at a time, and for the first before factors are known. The block itself waits for decode where it stands.
 */
#include "common/dependent_launch.cuh"
#include "common/transform.cuh"
#include "decode/common.cuh"

constexpr uint32_t MERGE_WARPS = 16; /* at most; n_splits where these are fewer */
constexpr uint32_t BATCH = 4;
static_assert(MERGE_WARPS * WARP >= MOST_SPLITS); /* a thread a split */

struct larger {
    static constexpr float NONE = -INFINITY;

    static __device__ float join(float a, float b) { return fmaxf(a, b); }
};

struct added {
    static constexpr float NONE = 0.0f;

    static __device__ float join(float a, float b) { return a + b; }
};

template <typename OPERATION>
static __device__ float over_warp(float x)
{
    for (uint32_t distance = WARP / 2; distance > 0; distance /= 2)
        x = OPERATION::join(x, __shfl_xor_sync(ALL_LANES, x, distance));
    return x;
}

/* Joins a value of every thread of the block, always in the same order; all threads get the result. */
template <typename OPERATION>
static __device__ float over_block(float x)
{
    __shared__ float of_warps[MERGE_WARPS];
    const uint32_t lane = threadIdx.x % WARP;
    x = over_warp<OPERATION>(x);
    if (lane == 0)
        of_warps[threadIdx.x / WARP] = x;
    __syncthreads();
    return over_warp<OPERATION>(lane < blockDim.x / WARP ? of_warps[lane] : OPERATION::NONE);
}

/* Factors of the splits' values, 0 where a split has none. Returns the sum of weights. */
static __device__ float weigh_splits(softmax_part part, float *factors_smem)
{
    const float max = over_block<larger>(part.max);
    const float factor = exp2_approximate(part.max - max);
    factors_smem[threadIdx.x] = factor;
    return over_block<added>(factor * part.sum);
}

/* Values of BATCH splits, n_warps apart; a lane has channels 4 * (WARP * i + lane) .. + 3 of each. */
template <int HEAD_DIM>
struct split_batch {
    static constexpr uint32_t N_QUADS = HEAD_DIM / 4, QUADS_A_LANE = (N_QUADS + WARP - 1) / WARP;

    float4 quads[BATCH][QUADS_A_LANE];

    __device__ void load(const float *values, uint32_t first_split, uint32_t n_splits, uint32_t n_warps, uint32_t lane)
    {
#pragma unroll
        for (uint32_t b = 0; b < BATCH; b++)
#pragma unroll
            for (uint32_t i = 0; i < QUADS_A_LANE; i++) {
                const uint32_t split = first_split + b * n_warps, quad = WARP * i + lane;
                if (split < n_splits && quad < N_QUADS)
                    quads[b][i] = reinterpret_cast<const float4 *>(values + (size_t)split * HEAD_DIM)[quad];
            }
    }

    __device__ void add_to(float4 (&sums)[QUADS_A_LANE], const float *factors_smem, uint32_t first_split,
                           uint32_t n_splits, uint32_t n_warps) const
    {
#pragma unroll
        for (uint32_t b = 0; b < BATCH; b++) {
            const uint32_t split = first_split + b * n_warps;
            const float factor = split < n_splits ? factors_smem[split] : 0.0f;
            if (factor == 0.0f)
                continue; /* values may not have been written */
#pragma unroll
            for (uint32_t i = 0; i < QUADS_A_LANE; i++) {
                sums[i].x += factor * quads[b][i].x;
                sums[i].y += factor * quads[b][i].y;
                sums[i].z += factor * quads[b][i].z;
                sums[i].w += factor * quads[b][i].w;
            }
        }
    }
};

template <int HEAD_DIM>
static __device__ void write_row(const attend_job &job, uint32_t context, uint32_t head, uint32_t lane,
                                 const float (&x)[CHANNELS_A_LANE<HEAD_DIM>])
{
    bool finite = true;
#pragma unroll
    for (int i = 0; i < CHANNELS_A_LANE<HEAD_DIM>; i++) {
        finite = finite && isfinite(x[i]);
        if (holds_channel<HEAD_DIM>(i))
            store_float(job.out, job.x_type,
                        context * job.out_context_stride + (size_t)head * HEAD_DIM + i * WARP + lane, x[i]);
    }
    if (!finite)
        report(job.tokens, KSORT_ERR_NON_FINITE);
}

/* Warp 0: the row from the warps' sums, which are scratch afterwards. */
template <int HEAD_DIM>
static __device__ void finish_row(const attend_job &job, uint32_t context, uint32_t head, uint32_t lane, float sum,
                                  float (&sums_smem)[MERGE_WARPS][HEAD_DIM])
{
    float x[CHANNELS_A_LANE<HEAD_DIM>];
#pragma unroll
    for (int i = 0; i < CHANNELS_A_LANE<HEAD_DIM>; i++) {
        x[i] = 0.0f;
        for (uint32_t w = 0; w < blockDim.x / WARP; w++)
            x[i] += holds_channel<HEAD_DIM>(i) ? sums_smem[w][i * WARP + lane] : 0.0f;
        x[i] /= sum;
    }
    __syncwarp();
    if (job.has_v_transform)
        restore_value<HEAD_DIM>(job.v_transform, head / job.group, sums_smem[0], x);
    write_row<HEAD_DIM>(job, context, head, lane, x);
}

template <int HEAD_DIM>
static __global__ void __launch_bounds__(WARP *MERGE_WARPS) merge_kernel(const __grid_constant__ attend_job job)
{
    using batch_of_warp = split_batch<HEAD_DIM>;
    __shared__ __align__(16) float sums_smem[MERGE_WARPS][HEAD_DIM];
    __shared__ float factors_smem[MERGE_WARPS * WARP];
    const uint32_t head = blockIdx.x, context = blockIdx.y, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const uint32_t n_warps = blockDim.x / WARP;
    const bool has_token = slots_of(job, context).end != 0;
    wait_for_kernel_before();
    if (!has_token)
        return;
    const float *values = part_values_of(job, context, head);
    softmax_part part = {-INFINITY, 0.0f};
    if (threadIdx.x < job.n_splits)
        part = parts_of(job, context, head)[threadIdx.x];
    batch_of_warp batch;
    batch.load(values, warp, job.n_splits, n_warps, lane);
    const float sum = weigh_splits(part, factors_smem);

    float4 sums[batch_of_warp::QUADS_A_LANE] = {};
    for (uint32_t split = warp; split < job.n_splits;) {
        batch.add_to(sums, factors_smem, split, job.n_splits, n_warps);
        split += BATCH * n_warps;
        batch.load(values, split, job.n_splits, n_warps, lane);
    }
#pragma unroll
    for (uint32_t i = 0; i < batch_of_warp::QUADS_A_LANE; i++)
        if (WARP * i + lane < batch_of_warp::N_QUADS)
            reinterpret_cast<float4 *>(sums_smem[warp])[WARP * i + lane] = sums[i];
    __syncthreads();
    if (warp == 0)
        finish_row<HEAD_DIM>(job, context, head, lane, sum, sums_smem);
}

template <int HEAD_DIM>
cudaError_t launch_merge(const attend_job &job, cudaStream_t stream)
{
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(job.n_heads, job.tokens.n_contexts);
    config.blockDim = dim3(WARP * (job.n_splits < MERGE_WARPS ? job.n_splits : MERGE_WARPS));
    config.stream = stream;
    return launch_dependent(config, merge_kernel<HEAD_DIM>, job);
}

template cudaError_t launch_merge<KSORT_HEAD_DIM>(const attend_job &, cudaStream_t);
