/* How the tiles that a CTA's rows see pass through shared memory. With two buffers tile t is multiplied while t + 1 is
 * expanded and t + 2 is fetched; with one, each waits for the other but the fetch.
 */
#ifndef KSORT_CUDA_PROMPT_MMA_PIPELINE_CUH
#define KSORT_CUDA_PROMPT_MMA_PIPELINE_CUH

#include "prompt/shared/expand.cuh"
#include "prompt/shared/row_blocks.cuh"

/* How many rows a CTA has, and copies of expanded and of packed tiles. */
template <int HEAD_DIM>
struct prompt_shape {
    static constexpr int rows = HEAD_DIM <= 128 ? 128 : 64;
    static constexpr int n_buffers = HEAD_DIM <= 128 ? 2 : 1;
    static constexpr int warps = rows / MMA_ROWS;
    static constexpr int threads = warps * WARP;
    static constexpr int ctas_a_multiprocessor = HEAD_DIM == 64 ? 2 : 1; /* as registers allow */
    static constexpr int tile_bytes = panel_bytes<HEAD_DIM>(TILE);
    static constexpr int query_bytes = panel_bytes<HEAD_DIM>(rows);
    /* Where they fit, queries stay in registers: they pass through the place of keys. */
    static constexpr bool queries_stay = HEAD_DIM <= 128;
    static constexpr int expanded_bytes = 2 * n_buffers * tile_bytes + (queries_stay ? 0 : query_bytes);
    static_assert(!queries_stay || query_bytes <= n_buffers * tile_bytes, "queries fit in the place of keys");
};

/* f16 values need no expanding: with two buffers they are fetched into panels. */
template <int HEAD_DIM>
__host__ __device__ inline bool stages_values(const head_layout &layout)
{
    return layout.type != KSORT_F16 || prompt_shape<HEAD_DIM>::n_buffers == 1;
}

template <int HEAD_DIM>
__host__ __device__ inline uint32_t stage_bytes(const attend_job &job)
{
    return (uint32_t)(job.k.layout.tile_bytes + (stages_values<HEAD_DIM>(job.v.layout) ? job.v.layout.tile_bytes : 0));
}

/* Shared memory: keys (n_buffers), values (n_buffers), queries where they don't stay, then n_buffers stages. */
template <int HEAD_DIM>
struct tile_pipeline {
    typedef prompt_shape<HEAD_DIM> shape;
    const attend_job &job;
    const row_block &block;
    uint8_t *smem;
    bool staged_values;

    __device__ uint8_t *keys(uint32_t tile) const { return smem + tile % shape::n_buffers * shape::tile_bytes; }
    __device__ uint8_t *values(uint32_t tile) const { return keys(tile) + shape::n_buffers * shape::tile_bytes; }
    __device__ uint8_t *queries() const
    {
        return smem + (shape::queries_stay ? 0 : 2 * shape::n_buffers * shape::tile_bytes);
    }
    __device__ uint8_t *stage(uint32_t tile) const
    {
        return smem + shape::expanded_bytes + tile % shape::n_buffers * stage_bytes<HEAD_DIM>(job);
    }
    __device__ uint32_t n_valid(uint32_t tile) const { return min(block.n_slots - tile * TILE, (uint32_t)TILE); }

    /* Queries of the block's rows into panels; zeros for rows that it lacks. */
    __device__ void fetch_queries() const
    {
        constexpr uint32_t ROW_CHUNKS = HEAD_DIM / CHUNK_CHANNELS;
        uint32_t n_heads = job.n_heads, group = job.group;
        for (uint32_t i = threadIdx.x; i < shape::rows * ROW_CHUNKS; i += shape::threads) {
            uint32_t row = i / ROW_CHUNKS, chunk = i % ROW_CHUNKS;
            uint32_t r = min(block.begin + row, block.end - 1);
            size_t token = (size_t)block.context * job.tokens.n_tokens + r / group;
            size_t prepared_row = token * n_heads + block.kv_head * group + r % group;
            copy_16_async(queries() + chunk_offset(shape::rows, row, chunk),
                          job.values + prepared_row * HEAD_DIM + chunk * CHUNK_CHANNELS, block.begin + row < block.end);
        }
    }

    /* Starts a fetch of packed tile `tile`, and of `panels_tile` for values that need no stage: keys by the first half
     * of the threads, values by the second, to find one address each. */
    __device__ void fetch(uint32_t tile, uint32_t panels_tile) const
    {
        constexpr int HALF = shape::threads / 2;
        if (threadIdx.x < HALF) {
            if (tile < block.end_tile)
                fetch_packed<HALF>(stage(tile), tile_at(job.k.pages, block.context, tile, block.kv_head),
                                   (uint32_t)job.k.layout.tile_bytes, threadIdx.x);
            return;
        }
        uint32_t values_tile = staged_values ? tile : panels_tile;
        if (values_tile >= block.end_tile)
            return;
        const uint8_t *tile_gmem = tile_at(job.v.pages, block.context, values_tile, block.kv_head);
        if (staged_values)
            fetch_packed<HALF>(stage(tile) + job.k.layout.tile_bytes, tile_gmem, (uint32_t)job.v.layout.tile_bytes,
                               threadIdx.x - HALF);
        else
            fetch_f16<HEAD_DIM, HALF>(values(values_tile), tile_gmem, n_valid(values_tile), threadIdx.x - HALF);
    }

    /* Returns the top of the values so far (prompt/shared/tops.cuh). */
    __device__ int expand(uint32_t tile, int top) const
    {
        if (tile >= block.end_tile)
            return top;
        expand_keys<HEAD_DIM, shape::threads>(keys(tile), stage(tile), job.k.layout);
        if (staged_values) {
            const uint8_t *packed = stage(tile) + job.k.layout.tile_bytes;
            if (job.v.layout.type == KSORT_BF16)
                top = max(top, largest_row_exponent<HEAD_DIM>(packed, n_valid(tile), 0, 1));
            else if (job.v.layout.type != KSORT_F16)
                top = max(top, top_of_blocks(packed, job.v.layout, n_valid(tile)));
            expand_values<HEAD_DIM, shape::threads>(values(tile), packed, job.v.layout, top, n_valid(tile));
        }
        return top;
    }
};

#endif /* KSORT_CUDA_PROMPT_MMA_PIPELINE_CUH */
