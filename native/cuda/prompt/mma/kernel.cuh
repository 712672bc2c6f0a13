/* Prompt attention where all warps do the same: products by mma.sync, and on sm_90a, for heads of 256 channels, by
 * wgmma, waited for at once.
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
 * Parts of P (PARTS): prompt/launch.cu.
 *
 * Bytes that must move: packed K and V of what is seen, once a CTA (from L2: the CTAs of a KV head run side by side),
 * queries in bf16 and out once. Work: 4 * head_dim flops (f32 outputs: 6) for each pair of a row and a slot, far above
 * what bytes cost.
 */
#ifndef KSORT_CUDA_PROMPT_MMA_KERNEL_CUH
#define KSORT_CUDA_PROMPT_MMA_KERNEL_CUH

#include "prompt/mma/pipeline.cuh"
#include "prompt/shared/rows.cuh"

/* One tile, expanded: scores, softmax, weighted values. */
template <int HEAD_DIM, int PARTS>
__device__ inline void add_tile(lane_rows<HEAD_DIM> &rows, const uint32_t (&q)[HEAD_DIM / 16][4],
                                const tile_pipeline<HEAD_DIM> &tiles, uint32_t tile, int top, float log2_scale)
{
    uint32_t p[PARTS][KEY_STEPS][4];
    rows.template weigh_tile<PARTS>(p, tile == tiles.block.first_tile, log2_scale, [&](float (&scores)[TILE / 8][4]) {
        key_product<HEAD_DIM>(scores, q, tiles.keys(tile));
        rows.mask(scores, tiles.job, tiles.block, threadIdx.x / WARP * MMA_ROWS, tile);
    });
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
    prompt_kernel(const __grid_constant__ attend_job job, slot_range range)
{
    typedef prompt_shape<HEAD_DIM> shape;
    static_assert(shape::warps * staged_row_bytes<HEAD_DIM> <= shape::expanded_bytes, "out rows fit in that of tiles");
    extern __shared__ __align__(1024) uint8_t smem[];
    row_block block;
    if (!find_rows(job, range, shape::rows, blockIdx.x, block))
        return;
    tile_pipeline<HEAD_DIM> tiles = {job, block, smem, stages_values<HEAD_DIM>(job.v.layout)};
    lane_rows<HEAD_DIM> rows;
    uint32_t warp = threadIdx.x / WARP;
    rows.init(job);
    rows.load_exact(job, block, warp * MMA_ROWS);
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

#endif /* KSORT_CUDA_PROMPT_MMA_KERNEL_CUH */
