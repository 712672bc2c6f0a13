/* Prompt attention on Hopper's asynchronous tensor cores (sm_90a), for heads of up to 128 channels. As prompt.cu, but
 * with a warpgroup of its own for making tiles (prompt_producers.cuh), so that no one waits for all others:
 *
 *     producer                   | expand K t, expand V t | ... t+1 ...              rings of 3 expanded tiles
 *     consumer 0 (64 rows)       | S(t) = Q K^T | soften | out += P(t) V | S(t+1) ...
 *     consumer 1 (64 rows)       ... | S(t) | soften | out += P(t) V ...             each at its own pace
 *     consumer 2 (64 rows)       V | S(t) | soften ...
 *
 * While some soften, others' products run. Blocks of rows are few where a sequence has few new tokens: then warpgroup 1
 * makes the values and two consumers remain, of more blocks.
 *
 * What it costs: while tensor cores are busy, a scheduler issues only some 0.2 instructions a cycle (measured beside
 * products of either kind), so that instructions of all warps and products take time one after the other rather than
 * at once. For 192 rows and a tile, D 128: 2,304 cycles of products, some 1,650 instructions a scheduler, of which
 * expanding takes 360.
 *
 * A CTA stays for several blocks of rows: producers are at the next while consumers store. Blocks are dealt in turns of
 * alternating direction (longest first), which evens out what CTAs get. Producers begin while prepare_queries still
 * runs (dependent_launch.cuh).
 */
#ifndef KSORT_PROMPT_WGMMA_CUH
#define KSORT_PROMPT_WGMMA_CUH

#include "dependent_launch.cuh"
#include "prompt_producers.cuh"

/* Registers a thread: 128 of the launch, dealt anew in multiples of 8; the second producer has a consumer's. */
constexpr int PRODUCER_REGISTERS = 80;
constexpr int CONSUMER_REGISTERS = 144;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* A consumer warpgroup; a thread's part of it. */
template <int HEAD_DIM, int PARTS>
struct tile_consumer {
    typedef wgmma_shape<HEAD_DIM> shape;
    static_assert(4 * staged_row_bytes<HEAD_DIM> <= shape::query_bytes, "rows fit in the place of queries");
    const prompt_job &whole_job;
    const attend_job &job;
    tile_rings<HEAD_DIM> &rings;
    uint8_t *smem;
    uint32_t consumer;
    float log2_scale;

    __device__ uint8_t *queries() const { return smem + shape::queries_offset + consumer * shape::query_bytes; }
    /* The warp's first row, of the consumer's. */
    __device__ static uint32_t warp_row() { return threadIdx.x % WARPGROUP / WARP * MMA_ROWS; }
    __device__ uint32_t first_row() const { return consumer * WARPGROUP_ROWS + warp_row(); } /* of the block's */

    /* The consumer's queries into panels; of -q where the scale is negative, so that scores are multiplied by |scale|.
     * Its products of the block before are complete. */
    __device__ void load_queries(const row_block &block) const
    {
        constexpr uint32_t ROW_CHUNKS = HEAD_DIM / CHUNK_CHANNELS, CHUNKS = MMA_ROWS * ROW_CHUNKS / WARP;
        uint32_t lane = threadIdx.x % WARP, signs = job.scale < 0.0f ? 0x80008000 : 0;
        uint4 x[CHUNKS];
#pragma unroll
        for (uint32_t i = 0; i < CHUNKS; i++) {
            uint32_t at = i * WARP + lane;
            uint32_t r = min(block.begin + first_row() + at / ROW_CHUNKS, block.end - 1);
            size_t token = (size_t)block.sequence * job.tokens.n_tokens + r / job.group;
            size_t prepared_row = token * job.n_heads + block.kv_head * job.group + r % job.group;
            x[i] = *(const uint4 *)(job.values + prepared_row * HEAD_DIM + at % ROW_CHUNKS * CHUNK_CHANNELS);
        }
        join_warpgroup();
#pragma unroll
        for (uint32_t i = 0; i < CHUNKS; i++) {
            uint32_t at = i * WARP + lane;
            uint4 signed_x = make_uint4(x[i].x ^ signs, x[i].y ^ signs, x[i].z ^ signs, x[i].w ^ signs);
            *(uint4 *)(queries() + chunk_offset(WARPGROUP_ROWS, warp_row() + at / ROW_CHUNKS, at % ROW_CHUNKS)) =
                signed_x;
        }
        publish_panels();
        join_warpgroup();
    }

    /* Scores of a tile of keys. */
    __device__ void find_scores(float (&scores)[TILE / 8][4], ring_place at, bool is_full) const
    {
        if (!is_full)
            wait_for_phase(&rings.full_keys[at.buffer], at.parity);
        begin_products(scores);
        start_key_product<HEAD_DIM>(scores, queries(), rings.keys(smem, at.buffer));
        wait_for_products<0>();
        pin(scores);
        arrive_as_warp(&rings.free_keys[at.buffer]);
    }

    /* out += P V of a tile of values. Returns whether the next tile of keys is full: looking takes a while, as long as
     * products that run meanwhile. */
    __device__ bool add_values(lane_rows<HEAD_DIM> &rows, const uint32_t (&p)[PARTS][KEY_STEPS][4], ring_place at,
                               ring_place next) const
    {
        wait_for_phase(&rings.full_values[at.buffer], at.parity);
        rows.raise_top(rings.tops[at.buffer]);
        begin_products(rows.out);
        start_value_product<HEAD_DIM, PARTS>(rows.out, p, rings.values(smem, at.buffer));
        bool is_full = is_complete(&rings.full_keys[next.buffer], next.parity);
        wait_for_products<0>();
        pin(rows.out);
        arrive_as_warp(&rings.free_values[at.buffer]);
        return is_full;
    }

    /* The tiles of a block. */
    __device__ void add_tiles(lane_rows<HEAD_DIM> &rows, const row_block &block, ring_place &at) const
    {
        bool is_full = false;
        for (uint32_t tile = block.first_tile; tile < block.end_tile; tile++) {
            float scores[TILE / 8][4], factors[ROWS_A_LANE];
            uint32_t p[PARTS][KEY_STEPS][4];
            ring_place next = at;
            next.advance();
            find_scores(scores, at, is_full);
            rows.mask(scores, block, tile, job.window);
            if (raise_bases(scores, rows.softmax, factors, log2_scale))
                rows.rescale(factors);
            weigh_scores<PARTS>(p, scores, rows.softmax, log2_scale);
            is_full = add_values(rows, p, at, next);
            at = next;
        }
    }

    __device__ void run() const
    {
        ring_place at;
        uint32_t n_blocks = n_row_blocks(job, whole_job.rows());
        row_block block = {};
        for (uint32_t turn = 0; turn * gridDim.x < n_blocks; turn++) {
            if (block_of_turn(turn) >= n_blocks || !find_rows(job, whole_job.rows(), block_of_turn(turn), block))
                continue;
            lane_rows<HEAD_DIM> rows;
            rows.init(job, block, first_row());
            load_queries(block);
            add_tiles(rows, block, at);
            if (job.has_v_transform)
                join_warpgroup(); /* queries make room for rows */
            store_rows<HEAD_DIM>(rows, job, block, first_row(),
                                 (float *)(queries() + warp_row() / MMA_ROWS * (shape::query_bytes / 4)));
        }
    }
};

/* Launched with so many threads; code for other devices has no body, and takes one: launch_prompt_wgmma looks. */
constexpr int WGMMA_THREADS = wgmma_shape<64>::threads;
#else
constexpr int WGMMA_THREADS = 1;
#endif

template <int HEAD_DIM, int PARTS>
__global__ void __launch_bounds__(WGMMA_THREADS, 1) prompt_wgmma_kernel(const __grid_constant__ prompt_job job)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) uint8_t smem[];
    __shared__ tile_rings<HEAD_DIM> rings;
    if (threadIdx.x == 0) {
        rings.init(job.n_consumers() * WARPGROUP / WARP);
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    uint32_t warpgroup = threadIdx.x / WARPGROUP;
    if (warpgroup == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
        tile_producer<HEAD_DIM>{job, rings, smem, true, job.n_producers == 1}.run();
        wait_for_kernel_before();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
        if (warpgroup < job.n_producers) {
            tile_producer<HEAD_DIM>{job, rings, smem, false, true}.run();
            wait_for_kernel_before();
        } else {
            wait_for_kernel_before(); /* producers need not: queries alone are from there */
            tile_consumer<HEAD_DIM, PARTS>{
                job, job.attend, rings, smem, warpgroup - job.n_producers, log2_scale_of(job.attend)}
                .run();
        }
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
    prompt_job whole_job = {job, 2};
    if (n_row_blocks(job, whole_job.rows()) > (uint32_t)n_multiprocessors) /* not all at once: larger ones */
        whole_job.n_producers = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(min(n_row_blocks(job, whole_job.rows()), (uint32_t)n_multiprocessors));
    config.blockDim = dim3(shape::threads);
    config.dynamicSmemBytes = smem_bytes;
    config.stream = stream;
    return launch_dependent(config, prompt_wgmma_kernel<HEAD_DIM, PARTS>, whole_job);
}

#endif /* KSORT_PROMPT_WGMMA_CUH */
