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
 * Heads of up to 128 channels on sm_90a are prompt_wgmma.cuh's.
 *
 * P has the bits that outputs can keep: for f32 it is split in two f16 parts (22 bits), which makes 3 products of 2, and
 * some 120 us of 390 on an H100 (4096 tokens, 32 heads on 8); for f16 and bf16 one part (11 bits) does.
 * Bytes that must move: packed K and V of what is seen, once a CTA (from L2: the CTAs of a KV head run side by side),
 * queries in bf16 and out once. Work: 4 * head_dim flops (f32 outputs: 6) for each pair of a row and a slot, far above
 * what bytes cost.
 */
#include "prompt_rows.cuh"
#include "prompt_wgmma.cuh"

/* One tile, expanded: scores, softmax, weighted values. */
template <int HEAD_DIM, int PARTS>
__device__ inline void add_tile(lane_rows<HEAD_DIM> &rows, const uint32_t (&q)[HEAD_DIM / 16][4],
                                const tile_pipeline<HEAD_DIM> &tiles, uint32_t tile, int top, float log2_scale)
{
    uint32_t p[PARTS][KEY_STEPS][4];
    rows.template weigh_tile<PARTS>(
        p, tiles.job, tiles.block, threadIdx.x / WARP * MMA_ROWS, tile, log2_scale,
        [&](float(&scores)[TILE / 8][4]) { key_product<HEAD_DIM>(scores, q, tiles.keys(tile)); });
    rows.raise_top(top);
    value_product<HEAD_DIM, PARTS>(rows.out, p, tiles.values(tile));
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
    static_assert(shape::warps * staged_row_bytes<HEAD_DIM> <= shape::expanded_bytes, "out rows fit in that of tiles");
    extern __shared__ __align__(1024) uint8_t smem[];
    row_block block;
    if (!find_rows(job, shape::rows, blockIdx.x, block))
        return;
    tile_pipeline<HEAD_DIM> tiles = {job, block, smem, stages_values<HEAD_DIM>(job.v.layout)};
    lane_rows<HEAD_DIM> rows;
    uint32_t warp = threadIdx.x / WARP;
    rows.init(job);
    float log2_scale = log2_scale_of(job);
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
    store_rows<HEAD_DIM>(rows, job, block, warp * MMA_ROWS, (float *)(smem + warp * staged_row_bytes<HEAD_DIM>));
}

template <int HEAD_DIM, int PARTS>
static cudaError_t launch_prompt_of(const attend_job &job, cudaStream_t stream)
{
    typedef prompt_shape<HEAD_DIM> shape;
    if constexpr (HEAD_DIM <= 128) {
        bool has_wgmma;
        cudaError_t error = find_wgmma<HEAD_DIM, PARTS>(has_wgmma);
        if (error != cudaSuccess)
            return error;
        if (has_wgmma)
            return launch_prompt_wgmma<HEAD_DIM, PARTS>(job, stream);
    }
    uint32_t smem_bytes = shape::expanded_bytes + shape::n_buffers * stage_bytes<HEAD_DIM>(job);
    cudaError_t error = cudaFuncSetAttribute(prompt_kernel<HEAD_DIM, PARTS>,
                                             cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem_bytes);
    if (error != cudaSuccess)
        return error;
    prompt_kernel<HEAD_DIM, PARTS><<<n_row_blocks(job, shape::rows), shape::threads, smem_bytes, stream>>>(job);
    return cudaGetLastError();
}

template <int PARTS>
static cudaError_t launch_prompt_in(const attend_job &job, cudaStream_t stream)
{
    switch (job.k.layout.head_dim) {
    case 64:
        return launch_prompt_of<64, PARTS>(job, stream);
    case 80:
        return launch_prompt_of<80, PARTS>(job, stream);
    case 96:
        return launch_prompt_of<96, PARTS>(job, stream);
    case 128:
        return launch_prompt_of<128, PARTS>(job, stream);
    case 256:
        return launch_prompt_of<256, PARTS>(job, stream);
    }
    return cudaErrorInvalidValue;
}

cudaError_t launch_prompt(const attend_job &job, cudaStream_t stream)
{
    return job.x_type == KSORT_F32 ? launch_prompt_in<2>(job, stream) : launch_prompt_in<1>(job, stream);
}
