/* Prompt attention on Hopper's asynchronous tensor cores (sm_90a), for heads of up to 128 channels. As
 * prompt/mma/kernel.cuh, but with two warpgroups of their own for making tiles (prompt/wgmma/producers.cuh), so that no
 * one waits for all others:
 *
 *     CTA       0 ..  n-1                 blocks of 128 or 192 rows, those that see most tiles first; n CTAs, one a
 *     turn 0    0 ..  n-1                 multiprocessor. Turns change direction, which evens out what CTAs get
 *     turn 1    2n-1 .. n
 *
 *     producer of keys           | expand K t | ... t+1 ...                         rings of 3 expanded tiles
 *     producer of values         | expand V t | ... t+1 ...
 *     consumer 0 (64 rows)       | S(t) = Q K^T | weights | out += P(t) V | S(t+1) ...
 *     consumer 1 (64 rows)       ... | S(t) | weights | out += P(t) V ...             each at its own pace
 *     consumer 2 (64 rows)       V | S(t) | weights ...
 *
 * While some find weights, others' products run. Two consumers do where blocks of rows are few, for a context with few
 * new tokens, and where weights have two parts, which leave no registers for a third.
 *
 * What it costs: while tensor cores are busy, a scheduler issues only some 0.2 instructions a cycle (measured beside
 * products of either kind), so that instructions of all warps and products take time one after the other rather than
 * at once. For 192 rows and a tile, D 128, weights in one part, some 3,000 cycles, of which products 1,536; producers
 * of 4-bit tiles are busy for half to three quarters of it. So consumers look whether tiles are full while products
 * run, as looking alone takes 100 cycles, and do not look for maxima of scores but where weights turn out too large.
 *
 * A CTA stays for several blocks of rows: producers are at the next while consumers store. Producers begin while
 * prepare_queries still runs, and CTAs of short rows as those of long rows leave multiprocessors
 * (common/dependent_launch.cuh).
 *
 * Bytes that must move: packed K and V of the tiles that a block of rows sees, once a block (from L2: the blocks of a
 * KV head run side by side), queries in bf16 and out once.
 */
#ifndef KSORT_CUDA_PROMPT_WGMMA_KERNEL_CUH
#define KSORT_CUDA_PROMPT_WGMMA_KERNEL_CUH

#include "common/dependent_launch.cuh"
#include "prompt/wgmma/producers.cuh"

/* Consumers that registers suffice for, and registers a thread: of the launch's, dealt anew in multiples of 8. */
template <int PARTS>
constexpr uint32_t CONSUMERS = PARTS == 1 ? MOST_CONSUMERS : LEAST_CONSUMERS;
template <int PARTS>
constexpr int PRODUCER_REGISTERS = PARTS == 1 ? 48 : 56;
template <int PARTS>
constexpr int CONSUMER_REGISTERS = PARTS == 1 ? 128 : 200;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* A consumer warpgroup; a thread's part of it. */
template <int HEAD_DIM, int PARTS>
struct tile_consumer {
    typedef wgmma_shape<HEAD_DIM> shape;
    static_assert(4 * staged_row_bytes<HEAD_DIM> <= shape::query_bytes, "rows fit in the place of queries");
    const prompt_job &whole_job;
    const attend_job &job;
    const tile_rings<HEAD_DIM> &rings;
    uint32_t consumer;
    uint8_t *queries;
    uint32_t query_address;

    __device__ tile_consumer(const prompt_job &job, const tile_rings<HEAD_DIM> &rings, uint32_t consumer)
        : whole_job(job), job(job.attend), rings(rings), consumer(consumer),
          queries(rings.smem + shape::queries_offset + consumer * shape::query_bytes),
          query_address(uniform_smem_address(queries))
    {
    }
    /* The warp's first row, of the consumer's. */
    __device__ static uint32_t first_row() { return threadIdx.x % WARPGROUP / WARP * MMA_ROWS; }

    /* The consumer's queries into panels; of -q where the scale is negative, so that scores are multiplied by |scale|.
     * Its products of the block before are complete. Queries are read from L2, where those of prepare_queries are also
     * for a kernel that has not waited for it itself. */
    __device__ void load_queries(const row_block &rows) const
    {
        constexpr uint32_t ROW_CHUNKS = HEAD_DIM / CHUNK_CHANNELS, CHUNKS = MMA_ROWS * ROW_CHUNKS / WARP;
        uint32_t lane = threadIdx.x % WARP, signs = job.scale < 0.0f ? 0x80008000 : 0;
        uint4 x[CHUNKS];
#pragma unroll
        for (uint32_t i = 0; i < CHUNKS; i++) {
            uint32_t at = i * WARP + lane;
            uint32_t r = min(rows.begin + first_row() + at / ROW_CHUNKS, rows.end - 1);
            size_t token = (size_t)rows.context * job.tokens.n_tokens + r / job.group;
            size_t prepared_row = token * job.n_heads + rows.kv_head * job.group + r % job.group;
            x[i] = __ldcg((const uint4 *)(job.values + prepared_row * HEAD_DIM + at % ROW_CHUNKS * CHUNK_CHANNELS));
        }
        join_warpgroup();
#pragma unroll
        for (uint32_t i = 0; i < CHUNKS; i++) {
            uint32_t at = i * WARP + lane;
            uint4 signed_x = make_uint4(x[i].x ^ signs, x[i].y ^ signs, x[i].z ^ signs, x[i].w ^ signs);
            *(uint4 *)(queries + chunk_offset(WARPGROUP_ROWS, first_row() + at / ROW_CHUNKS, at % ROW_CHUNKS)) =
                signed_x;
        }
        publish_panels();
        join_warpgroup();
    }

    /* A tile of the rings: where it is, and what was found out about it while products ran. */
    struct tile_place {
        ring_place at;
        uint32_t keys, values; /* addresses */
        bool has_keys, has_values;

        __device__ void wait_for_keys(const tile_rings<HEAD_DIM> &rings) const
        {
            if (!has_keys)
                wait_for_phase(rings.full_keys(at.buffer), at.parity);
        }
        __device__ void wait_for_values(const tile_rings<HEAD_DIM> &rings) const
        {
            if (!has_values)
                wait_for_phase(rings.full_values(at.buffer), at.parity);
        }
    };

    /* Scores of a tile of keys that is there. */
    __device__ void find_scores(float (&scores)[TILE / 8][4], tile_place &tile) const
    {
        begin_products(scores);
        start_key_product<HEAD_DIM>(scores, query_address, tile.keys);
        tile.has_values = is_complete(rings.full_values(tile.at.buffer), tile.at.parity);
        tile.values = uniform(rings.value_address(tile.at.buffer));
        wait_for_products<0>();
        pin(scores);
    }

    /* out += P V of a tile of values. Looks for the next tile of keys, which takes a while, meanwhile. */
    __device__ void add_values(lane_rows<HEAD_DIM> &rows, const uint32_t (&p)[PARTS][KEY_STEPS][4],
                               const tile_place &tile, tile_place &next) const
    {
        tile.wait_for_values(rings);
        rows.raise_top(rings.top(tile.at.buffer));
        begin_products(rows.out);
        start_value_product<HEAD_DIM, PARTS>(rows.out, p, tile.values);
        next.at = tile.at;
        next.at.advance();
        next.keys = uniform(rings.key_address(next.at.buffer));
        next.has_keys = is_complete(rings.full_keys(next.at.buffer), next.at.parity);
        wait_for_products<0>();
        pin(rows.out);
        arrive_as_warp(rings.free_values(tile.at.buffer));
    }

    /* Tiles of a block that none of the consumer's rows sees. */
    __device__ void leave_tiles(uint32_t n_tiles, ring_place &at) const
    {
        for (; n_tiles > 0; n_tiles--) {
            wait_for_phase(rings.full_keys(at.buffer), at.parity);
            arrive_as_warp(rings.free_keys(at.buffer));
            wait_for_phase(rings.full_values(at.buffer), at.parity);
            arrive_as_warp(rings.free_values(at.buffer));
            at.advance();
        }
    }

    /* The tiles that the consumer's rows see. */
    __device__ void add_tiles(lane_rows<HEAD_DIM> &rows, const row_block &own, ring_place &at) const
    {
        tile_place tile = {at, uniform(rings.key_address(at.buffer)), 0, false, false};
        for (uint32_t slot_tile = own.first_tile; slot_tile < own.end_tile; slot_tile++) {
            uint32_t p[PARTS][KEY_STEPS][4];
            tile_place next = {};
            tile.wait_for_keys(rings);
            rows.template weigh_tile<PARTS>(p, slot_tile == own.first_tile, whole_job.log2_scale,
                                            [&](float (&scores)[TILE / 8][4]) {
                                                find_scores(scores, tile);
                                                rows.mask(scores, job, own, first_row(), slot_tile);
                                            });
            arrive_as_warp(rings.free_keys(tile.at.buffer));
            add_values(rows, p, tile, next);
            tile = next;
        }
        at = tile.at;
    }

    __device__ void add_block(const row_block &block, const row_block &own, ring_place &at) const
    {
        lane_rows<HEAD_DIM> rows;
        rows.init(job);
        rows.load_exact(job, own, first_row());
        load_queries(own);
        leave_tiles(own.first_tile - block.first_tile, at);
        add_tiles(rows, own, at);
        leave_tiles(block.end_tile - own.end_tile, at);
        if (job.has_v_transform)
            join_warpgroup(); /* queries make room for rows */
        store_rows<HEAD_DIM>(rows, job, own, first_row(),
                             (float *)(queries + first_row() / MMA_ROWS * (shape::query_bytes / 4)));
    }

    __device__ void run() const
    {
        ring_place at;
        uint32_t n_blocks = whole_job.n_blocks();
        row_block block = {};
        for (uint32_t turn = 0; turn * gridDim.x < n_blocks; turn++) {
            uint32_t index = block_of_turn(turn);
            if (index >= n_blocks || !find_rows(job, whole_job.range, whole_job.rows(), index, block))
                continue;
            row_block own = rows_of_block(job, block, consumer * WARPGROUP_ROWS, WARPGROUP_ROWS);
            if (own.begin < own.end)
                add_block(block, own, at);
            else
                leave_tiles(block.end_tile - block.first_tile, at);
        }
    }
};

/* Launched with so many threads at most; code for other devices has no body, and takes one: launch_prompt_wgmma looks.
 * */
template <int PARTS>
constexpr int WGMMA_THREADS = (N_PRODUCERS + CONSUMERS<PARTS>)*WARPGROUP;
#else
template <int PARTS>
constexpr int WGMMA_THREADS = 1;
#endif

template <int HEAD_DIM, int PARTS>
__global__ void __launch_bounds__(WGMMA_THREADS<PARTS>, 1) prompt_wgmma_kernel(const __grid_constant__ prompt_job job)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) uint8_t smem[];
    __shared__ ring_state state;
    const tile_rings<HEAD_DIM> rings(state, smem);
    if (threadIdx.x == 0) {
        rings.init(job.n_consumers * WARPGROUP / WARP);
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    uint32_t warpgroup = uniform(threadIdx.x / WARPGROUP);
    if (warpgroup < N_PRODUCERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS<PARTS>));
        if (warpgroup == 0)
            tile_producer<HEAD_DIM, true>{job, rings}.run();
        else
            tile_producer<HEAD_DIM, false>{job, rings}.run();
        wait_for_kernel_before();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS<PARTS>));
        const bool is_second = PARTS > 1 && job.is_second; /* rows with one part are the first */
        if (!is_second) {
            wait_for_kernel_before(); /* producers need not: queries alone are from there */
            let_dependent_begin();    /* it needs queries too */
        }
        tile_consumer<HEAD_DIM, PARTS>(job, rings, warpgroup - N_PRODUCERS).run();
        if (is_second)
            wait_for_kernel_before();
    }
#endif
}

/* Whether the code that the device runs has these kernels: both, or neither. */
template <int HEAD_DIM>
static cudaError_t find_wgmma(bool &found)
{
    cudaFuncAttributes code;
    cudaError_t error = cudaFuncGetAttributes(&code, prompt_wgmma_kernel<HEAD_DIM, 2>);
    found = error == cudaSuccess && code.maxThreadsPerBlock >= WARPGROUP;
    return error;
}

template <int HEAD_DIM>
static uint32_t wgmma_smem_bytes(const attend_job &job)
{
    return wgmma_shape<HEAD_DIM>::stages_offset + RING * packed_stage_bytes(job);
}

/* is_second: the kernel launched before it is the same for other rows. */
template <int HEAD_DIM, int PARTS>
static cudaError_t launch_prompt_wgmma(const attend_job &job, slot_range range, bool is_second, cudaStream_t stream)
{
    int device, n_multiprocessors;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&n_multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess)
        return error;
    prompt_job whole_job = {job, range, LEAST_CONSUMERS, is_second, log2_scale_of(job)};
    if (whole_job.n_blocks() > (uint32_t)n_multiprocessors) /* not all at once: larger ones */
        whole_job.n_consumers = CONSUMERS<PARTS>;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(min(whole_job.n_blocks(), (uint32_t)n_multiprocessors));
    config.blockDim = dim3((N_PRODUCERS + whole_job.n_consumers) * WARPGROUP);
    config.dynamicSmemBytes = wgmma_smem_bytes<HEAD_DIM>(job);
    config.stream = stream;
    return launch_dependent(config, prompt_wgmma_kernel<HEAD_DIM, PARTS>, whole_job);
}

#endif /* KSORT_CUDA_PROMPT_WGMMA_KERNEL_CUH */
