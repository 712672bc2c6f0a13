/* Prompt attention on Hopper's asynchronous tensor cores (sm_90a), for heads of up to 128 channels. As prompt.cu, but
 * with warpgroups of their own for making tiles (prompt_producers.cuh), so that no one waits for all others:
 *
 *     key producer                  | fetch K t+1, expand K t   | ... t+1 ...       rings of 3 expanded tiles
 *     value producer                | fetch V t+1, expand V t   | ...
 *     consumer 0 (rows 0 .. 63)     | start S(t+1) = Q K^T and out += P(t) V | soften S(t+1) meanwhile, P(t+1) | ...
 *     consumer 1 (rows 64 .. 127)   | ... P(t)                  | start ...         consumers start in turns
 *
 * A CTA stays for several blocks of rows: producers are at the next while consumers store. Blocks are dealt in turns of
 * alternating direction (longest first), which evens out what CTAs get. Producers begin while prepare_queries still
 * runs (dependent_launch.cuh).
 */
#ifndef KSORT_PROMPT_WGMMA_CUH
#define KSORT_PROMPT_WGMMA_CUH

#include "dependent_launch.cuh"
#include "prompt_producers.cuh"

/* Registers a thread: 128 of the launch, dealt anew in multiples of 8. */
constexpr int PRODUCER_REGISTERS = 56;
constexpr int CONSUMER_REGISTERS = 200;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int FIRST_TURN = 3; /* its barrier, and that of the other consumer; producers have 1 and 2 */

/* A consumer warpgroup; a thread's part of it. */
template <int HEAD_DIM, int PARTS>
struct tile_consumer {
    typedef wgmma_shape<HEAD_DIM> shape;
    const attend_job &job;
    tile_rings<HEAD_DIM> &rings;
    uint8_t *smem;
    float log2_scale;

    /* Queries as left operands; of -q where the scale is negative, so that scores are multiplied by |scale|. */
    __device__ void load_queries(uint32_t (&q)[HEAD_DIM / 16][4], const row_block &block, uint32_t first_row) const
    {
        uint32_t lane = threadIdx.x % WARP, signs = job.scale < 0.0f ? 0x80008000 : 0;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t r = min(block.begin + first_row + lane / 4 + 8 * half, block.end - 1);
            size_t token = (size_t)block.sequence * job.tokens.n_tokens + r / job.group;
            size_t prepared_row = token * job.n_heads + block.kv_head * job.group + r % job.group;
            const uint32_t *pairs = (const uint32_t *)(job.values + prepared_row * HEAD_DIM) + lane % 4;
#pragma unroll
            for (int k = 0; k < HEAD_DIM / 16; k++) {
                q[k][half] = pairs[8 * k] ^ signs;
                q[k][half + 2] = pairs[8 * k + 4] ^ signs;
            }
        }
    }

    /* Scores to weights; returns whether sums must be rescaled by factors. */
    __device__ bool soften(lane_rows<HEAD_DIM> &rows, float (&scores)[TILE / 8][4], const row_block &block,
                           uint32_t tile, float (&factors)[ROWS_A_LANE]) const
    {
        rows.mask(scores, block, tile, job.window);
        bool raised = raise_bases(scores, rows.softmax, factors, log2_scale);
        soften_scores(scores, rows.softmax, log2_scale);
        return raised;
    }

    /* Starts the scores of the next tile of keys. */
    __device__ void start_scores(float (&scores)[TILE / 8][4], const uint32_t (&q)[HEAD_DIM / 16][4],
                                 ring_place keys) const
    {
        begin_products(scores);
        start_key_product<HEAD_DIM>(scores, q, rings.keys(smem, keys.buffer));
    }

    /* Scores whose product is complete to weights. */
    __device__ bool finish_scores(lane_rows<HEAD_DIM> &rows, float (&scores)[TILE / 8][4], const row_block &block,
                                  uint32_t tile, ring_place &keys, float (&factors)[ROWS_A_LANE]) const
    {
        pin(scores);
        arrive_as_warp(&rings.free_keys[keys.buffer]);
        keys.advance();
        return soften(rows, scores, block, tile, factors);
    }

    /* Consumers start their products in turns: while one softens, the other's products run. */
    __device__ static void wait_for_turn()
    {
        join_threads<2 * WARPGROUP>(FIRST_TURN + threadIdx.x / WARPGROUP % 2);
    }

    __device__ static void give_turn()
    {
        join_later<2 * WARPGROUP>(FIRST_TURN + 1 - threadIdx.x / WARPGROUP % 2);
    }

    /* Keeps the softening ahead of a wait that follows, where nvcc 13.0 moves it behind otherwise: a branch that needs
     * the sums ends the instructions that it orders anew. It is never taken. */
    __device__ static void finish_softening(const lane_rows<HEAD_DIM> &rows)
    {
        if (rows.softmax[0].sum + rows.softmax[1].sum < 0.0f)
            asm volatile("nanosleep.u32 0;");
    }

    /* Starts out += P V of the next tile of values. */
    __device__ void start_sums(lane_rows<HEAD_DIM> &rows, const uint32_t (&p)[PARTS][KEY_STEPS][4],
                               ring_place values) const
    {
        begin_products(rows.out);
        start_value_product<HEAD_DIM, PARTS>(rows.out, p, rings.values(smem, values.buffer));
    }

    __device__ void finish_sums(lane_rows<HEAD_DIM> &rows, ring_place &values) const
    {
        wait_for_products<0>();
        pin(rows.out);
        arrive_as_warp(&rings.free_values[values.buffer]);
        values.advance();
    }

    /* One block of rows. While out += P V of a tile runs, the scores of the next are softened. */
    __device__ void add_tiles(lane_rows<HEAD_DIM> &rows, const uint32_t (&q)[HEAD_DIM / 16][4], const row_block &block,
                              ring_place &keys, ring_place &values) const
    {
        float scores[TILE / 8][4], factors[ROWS_A_LANE];
        uint32_t p[PARTS][KEY_STEPS][4];
        wait_for_phase(&rings.full_keys[keys.buffer], keys.parity);
        start_scores(scores, q, keys);
        wait_for_products<0>();
        finish_scores(rows, scores, block, block.first_tile, keys, factors);
        split_weights<PARTS>(p, scores);
        for (uint32_t tile = block.first_tile + 1; tile < block.end_tile; tile++) {
            wait_for_phase(&rings.full_values[values.buffer], values.parity);
            rows.raise_top(rings.tops[values.buffer]);
            wait_for_phase(&rings.full_keys[keys.buffer], keys.parity);
            wait_for_turn();
            start_scores(scores, q, keys);
            start_sums(rows, p, values);
            give_turn();
            wait_for_products<1>();
            bool raised = finish_scores(rows, scores, block, tile, keys, factors);
            finish_softening(rows);
            finish_sums(rows, values);
            if (raised)
                rows.rescale(factors);
            split_weights<PARTS>(p, scores);
        }
        wait_for_phase(&rings.full_values[values.buffer], values.parity);
        rows.raise_top(rings.tops[values.buffer]);
        start_sums(rows, p, values);
        finish_sums(rows, values);
    }

    __device__ void run() const
    {
        ring_place keys, values;
        uint32_t n_blocks = n_row_blocks(job, shape::rows);
        uint32_t warp = threadIdx.x / WARP - shape::producers * WARPGROUP / WARP; /* of the consumers' */
        float *staged_smem = (float *)(smem + shape::staged_offset + warp * staged_row_bytes<HEAD_DIM>);
        row_block block = {};
        if (threadIdx.x / WARPGROUP == shape::producers + 1)
            give_turn(); /* consumer 0 begins */
        for (uint32_t turn = 0; turn * gridDim.x < n_blocks; turn++) {
            if (block_of_turn(turn) >= n_blocks || !find_rows(job, shape::rows, block_of_turn(turn), block))
                continue;
            lane_rows<HEAD_DIM> rows;
            uint32_t q[HEAD_DIM / 16][4];
            rows.init(job, block, warp * MMA_ROWS);
            load_queries(q, block, warp * MMA_ROWS);
            add_tiles(rows, q, block, keys, values);
            store_rows<HEAD_DIM>(rows, job, block, warp * MMA_ROWS, staged_smem);
        }
    }
};

/* Launched with so many threads; code for other devices has no body, and takes one: launch_prompt_wgmma looks. */
constexpr int WGMMA_THREADS = wgmma_shape<64>::threads;
#else
constexpr int WGMMA_THREADS = 1;
#endif

template <int HEAD_DIM, int PARTS>
__global__ void __launch_bounds__(WGMMA_THREADS, 1) prompt_wgmma_kernel(const __grid_constant__ attend_job job)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) uint8_t smem[];
    __shared__ tile_rings<HEAD_DIM> rings;
    if (threadIdx.x == 0) {
        rings.init();
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    uint32_t warpgroup = threadIdx.x / WARPGROUP;
    if (warpgroup < wgmma_shape<HEAD_DIM>::producers) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
        if (warpgroup == 0)
            produce_tiles<HEAD_DIM>(key_producer<HEAD_DIM>{job, rings, smem});
        else
            produce_tiles<HEAD_DIM>(value_producer<HEAD_DIM>{job, rings, smem});
        wait_for_kernel_before();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
        wait_for_kernel_before(); /* producers need not: queries alone are from there */
        tile_consumer<HEAD_DIM, PARTS>{job, rings, smem, log2_scale_of(job)}.run();
    }
#endif
}

/* Whether the code that the device runs has the kernel. */
template <int HEAD_DIM, int PARTS>
static cudaError_t find_wgmma(bool &found)
{
    cudaFuncAttributes code;
    cudaError_t error = cudaFuncGetAttributes(&code, prompt_wgmma_kernel<HEAD_DIM, PARTS>);
    found = error == cudaSuccess && code.maxThreadsPerBlock >= wgmma_shape<HEAD_DIM>::threads;
    return error;
}

template <int HEAD_DIM, int PARTS>
static cudaError_t launch_prompt_wgmma(const attend_job &job, cudaStream_t stream)
{
    typedef wgmma_shape<HEAD_DIM> shape;
    int device, n_multiprocessors;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&n_multiprocessors, cudaDevAttrMultiProcessorCount, device);
    uint32_t smem_bytes = shape::stages_offset + RING * packed_stage_bytes(job);
    if (error == cudaSuccess)
        error = cudaFuncSetAttribute(prompt_wgmma_kernel<HEAD_DIM, PARTS>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     (int)smem_bytes);
    if (error != cudaSuccess)
        return error;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(min(n_row_blocks(job, shape::rows), (uint32_t)n_multiprocessors));
    config.blockDim = dim3(shape::threads);
    config.dynamicSmemBytes = smem_bytes;
    config.stream = stream;
    return launch_dependent(config, prompt_wgmma_kernel<HEAD_DIM, PARTS>, job);
}

#endif /* KSORT_PROMPT_WGMMA_CUH */
