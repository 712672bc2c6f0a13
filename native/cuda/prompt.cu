/* Prompt attention: several query tokens a sequence, on tensor cores, straight from packed tiles.
 *
 * The queries of a KV head are rows, token-major: row r is token r / group, head r % group of the group, so that the
 * heads of a group share every expanded tile. A CTA has ROWS of them, a warp 16. It walks over the tiles they see:
 *
 *                        tiles of 64 slots -->                       job of one CTA: its rows, all its tiles
 *     rows 0 ..     |0 0                      |                      - packed K and V of a tile come by cp.async,
 *     rows ROWS ..  |1 1 1 1                  |  (causal: later        two tiles ahead
 *     rows 2 ROWS ..|2 2 2 2 2 2              |  rows see more;      - all threads expand them to bf16 K and f16 V in
 *     ...           |3 3 3 3 3 3 3 3          |  they start first)     shared memory, one tile ahead
 *                                                                    - each warp: S = Q K^T, softmax, out += P V
 *
 * One half of the warps expands the next tile before its products, the other half after: so tensor cores and ALUs are
 * both busy. A head of 256 channels has room for one expanded tile only, and does one after the other.
 *
 * P is split in two f16 parts (22 bits), as values have float32's accuracy to keep; that makes 3 products of 2.
 * Bytes that must move: packed K and V of what is seen, once a CTA (from L2: the CTAs of a KV head run side by side),
 * queries in bf16 and out once. Work: 6 * head_dim flops for each pair of a row and a slot, far above what bytes cost.
 */
#include "prompt_pipeline.cuh"
#include "prompt_softmax.cuh"
#include "transform.cuh"

#include <float.h>

constexpr float LOG2_E = 1.44269504f;

/* What a lane keeps of its two rows. */
template <int HEAD_DIM>
struct lane_rows {
    float out[HEAD_DIM / 8][4];
    row_softmax softmax[ROWS_A_LANE];
    int top;                        /* of values: out is scaled by it */
    uint32_t slots[ROWS_A_LANE];    /* the rows' own */

    __device__ void init(const attend_job &job, const row_block &block)
    {
        top = job.v.layout.type == KSORT_F16 ? UNIT_TOP : FIRST_TOP;
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                out[n][e] = 0.0f;
        for (int r = 0; r < ROWS_A_LANE; r++) {
            uint32_t row = block.begin + threadIdx.x / WARP * MMA_ROWS + threadIdx.x % WARP / 4 + 8 * r;
            slots[r] = block.n_cached + min(row, block.end - 1) / job.group;
            softmax[r] = {-INFINITY, 0.0f};
        }
    }

    __device__ void rescale(const float (&factors)[ROWS_A_LANE], int new_top)
    {
        float top_factor = exponent_scale((uint8_t)max(0, 127 + top - new_top)); /* new_top is never less */
        top = new_top;
        float own[ROWS_A_LANE] = {factors[0] * top_factor, factors[1] * top_factor};
        if (!__any_sync(~0u, own[0] != 1.0f || own[1] != 1.0f))
            return;
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                out[n][e] *= own[e / 2];
    }
};

/* One tile, expanded: scores, softmax, weighted values. */
template <int HEAD_DIM, int PARTS>
__device__ inline void add_tile(lane_rows<HEAD_DIM> &rows, const uint32_t (&q)[HEAD_DIM / 16][4],
                                const tile_pipeline<HEAD_DIM> &tiles, uint32_t tile, int top, float log2_scale)
{
    const row_block &block = tiles.block;
    float scores[TILE / 8][4];
    key_product<HEAD_DIM>(scores, q, tiles.keys(tile));
    int begin = tile * TILE;
    if (begin < (int)block.whole_begin || begin + TILE > (int)block.whole_end) {
        row_view views[ROWS_A_LANE];
        for (int r = 0; r < ROWS_A_LANE; r++)
            views[r] = {(int)first_seen(rows.slots[r], tiles.job.window) - begin, (int)rows.slots[r] - begin};
        mask_scores(scores, views);
    }
    float factors[ROWS_A_LANE];
    soften_scores(scores, rows.softmax, factors, log2_scale);
    rows.rescale(factors, top);
    uint32_t p[PARTS][KEY_STEPS][4];
    split_weights<PARTS>(p, scores);
    value_product<HEAD_DIM, PARTS>(rows.out, p, tiles.values(tile));
}

/* Finished rows: through shared memory (a warp's own 16 rows), so that a warp has a whole row, restored and stored. */
template <int HEAD_DIM>
__device__ inline void store_rows(lane_rows<HEAD_DIM> &rows, const attend_job &job, const row_block &block,
                                  float *out_smem)
{
    uint32_t lane = threadIdx.x % WARP, first = threadIdx.x / WARP * MMA_ROWS;
    float *rows_smem = out_smem + first * HEAD_DIM;
    float unit = exponent_scale((uint8_t)(rows.top + 127 - UNIT_TOP));
    for (int r = 0; r < ROWS_A_LANE; r++) {
        float factor = 1.0f / quad_sum(rows.softmax[r].sum);
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n++) {
            float2 pair = {rows.out[n][2 * r] * factor * unit, rows.out[n][2 * r + 1] * factor * unit};
            *(float2 *)(rows_smem + (lane / 4 + 8 * r) * HEAD_DIM + 8 * n + lane % 4 * 2) = pair;
        }
    }
    __syncwarp();
    for (uint32_t i = 0; i < MMA_ROWS && block.begin + first + i < block.end; i++) {
        uint32_t r = block.begin + first + i;
        float x[CHANNELS_A_LANE<HEAD_DIM>];
        for (int j = 0; j < CHANNELS_A_LANE<HEAD_DIM>; j++) {
            uint32_t channel = WARP * j + lane;
            x[j] = channel < HEAD_DIM ? rows_smem[i * HEAD_DIM + channel] : 0.0f;
        }
        __syncwarp(); /* from here on the row is the transform's scratch */
        if (job.has_v_transform)
            restore_value<HEAD_DIM>(job.v_transform, block.kv_head, rows_smem + i * HEAD_DIM, x);
        size_t place = block.sequence * job.out_sequence_stride + r / job.group * job.out_token_stride +
                       (block.kv_head * job.group + r % job.group) * HEAD_DIM;
        for (int j = 0; j < CHANNELS_A_LANE<HEAD_DIM>; j++)
            if (WARP * j + lane < HEAD_DIM)
                store_float(job.out, job.x_type, place + WARP * j + lane, x[j]);
    }
}

/* Queries as left operands; of -q where the scale is negative, so that scores are multiplied by |scale|. */
template <int HEAD_DIM>
__device__ inline void load_signed_queries(uint32_t (&q)[HEAD_DIM / 16][4], const tile_pipeline<HEAD_DIM> &tiles)
{
    load_queries<HEAD_DIM>(q, tiles.queries(), prompt_shape<HEAD_DIM>::rows, threadIdx.x / WARP * MMA_ROWS);
    uint32_t signs = tiles.job.scale < 0.0f ? 0x80008000 : 0;
    for (int k = 0; k < HEAD_DIM / 16; k++)
        for (int i = 0; i < 4; i++)
            q[k][i] ^= signs;
}

template <int HEAD_DIM, int PARTS>
__global__ void __launch_bounds__(prompt_shape<HEAD_DIM>::threads, prompt_shape<HEAD_DIM>::ctas_a_multiprocessor)
    prompt_kernel(const __grid_constant__ attend_job job)
{
    typedef prompt_shape<HEAD_DIM> shape;
    extern __shared__ __align__(1024) uint8_t smem[];
    row_block block;
    if (!find_rows(job, shape::rows, block))
        return;
    tile_pipeline<HEAD_DIM> tiles = {job, block, smem, stages_values<HEAD_DIM>(job.v.layout)};
    lane_rows<HEAD_DIM> rows;
    rows.init(job, block);
    /* 0 as log2_scale would make 0 * -inf of a masked score. */
    float log2_scale = fmaxf(fabsf(job.scale) * LOG2_E, FLT_MIN);
    uint32_t q[HEAD_DIM / 16][4];

    tiles.fetch_queries();
    tiles.fetch(block.first_tile, block.first_tile);
    wait_for_copies();
    __syncthreads();
    if (shape::queries_stay) {
        load_signed_queries<HEAD_DIM>(q, tiles);
        __syncthreads();
    }
    if (shape::n_buffers == 2)
        tiles.fetch(block.first_tile + 1, block.end_tile);
    int top = tiles.expand(block.first_tile, rows.top);
    wait_for_copies();
    publish_panels();
    __syncthreads();

    bool expands_first = shape::n_buffers == 2 && threadIdx.x < shape::threads / 2;
    for (uint32_t tile = block.first_tile; tile < block.end_tile; tile++) {
        int next_top = top;
        tiles.fetch(tile + shape::n_buffers, tile + 1);
        if (expands_first)
            next_top = tiles.expand(tile + 1, top);
        if (!shape::queries_stay)
            load_signed_queries<HEAD_DIM>(q, tiles);
        add_tile<HEAD_DIM, PARTS>(rows, q, tiles, tile, top, log2_scale);
        if (shape::n_buffers == 1) {
            wait_for_copies();
            __syncthreads(); /* the stage is complete, and everyone has done with the expanded tile */
        }
        if (!expands_first)
            next_top = tiles.expand(tile + 1, top);
        top = next_top;
        wait_for_copies();
        publish_panels();
        __syncthreads();
    }
    store_rows<HEAD_DIM>(rows, job, block, (float *)smem);
}

template <int HEAD_DIM, int PARTS = 2>
static cudaError_t launch_prompt_of(const attend_job &job, cudaStream_t stream)
{
    typedef prompt_shape<HEAD_DIM> shape;
    uint32_t smem_bytes = shape::expanded_bytes + shape::n_buffers * stage_bytes<HEAD_DIM>(job);
    cudaError_t error = cudaFuncSetAttribute(prompt_kernel<HEAD_DIM, PARTS>,
                                             cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem_bytes);
    if (error != cudaSuccess)
        return error;
    size_t n_rows = (size_t)job.tokens.n_tokens * job.group;
    size_t n_blocks = (n_rows + shape::rows - 1) / shape::rows;
    dim3 grid((uint32_t)(n_blocks * job.k.pages.n_kv_heads), job.tokens.n_sequences);
    prompt_kernel<HEAD_DIM, PARTS><<<grid, shape::threads, smem_bytes, stream>>>(job);
    return cudaGetLastError();
}

cudaError_t launch_prompt(const attend_job &job, cudaStream_t stream)
{
    switch (job.k.layout.head_dim) {
    case 64:
        return launch_prompt_of<64>(job, stream);
    case 80:
        return launch_prompt_of<80>(job, stream);
    case 96:
        return launch_prompt_of<96>(job, stream);
    case 128:
        return launch_prompt_of<128>(job, stream);
    case 256:
        return launch_prompt_of<256>(job, stream);
    }
    return cudaErrorInvalidValue;
}
