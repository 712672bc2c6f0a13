/* The tiles that a CTA of prompt attention walks over: which rows it has, which tiles they see, and how these pass
 * through shared memory. With two buffers tile t is multiplied while t + 1 is expanded and t + 2 is fetched; with one,
 * each waits for the other but the fetch.
 */
#ifndef KSORT_PROMPT_PIPELINE_CUH
#define KSORT_PROMPT_PIPELINE_CUH

#include "phases.cuh"
#include "prompt_expand.cuh"

constexpr int MMA_ROWS = 16;

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

/* The rows of a CTA and the tiles they see. */
struct row_block {
    uint32_t sequence, kv_head;
    uint32_t begin, end;            /* rows */
    uint32_t n_cached, n_slots;     /* of the sequence; n_slots with the new tokens */
    uint32_t first_tile, end_tile;
    uint32_t whole_begin, whole_end; /* slots that every row sees */
};

/* First slot that the token in `slot` sees. */
__device__ inline uint32_t first_seen(uint32_t slot, uint32_t window)
{
    return window && slot + 1 > window ? slot + 1 - window : 0;
}

/* Finds the tiles that a block's rows see. */
__device__ inline void find_tiles(const attend_job &job, row_block &block)
{
    uint32_t first_slot = block.n_cached + block.begin / job.group;
    uint32_t last_slot = block.n_cached + (block.end - 1) / job.group;
    block.first_tile = first_seen(first_slot, job.window) / TILE;
    block.end_tile = last_slot / TILE + 1;
    block.whole_begin = first_seen(last_slot, job.window);
    block.whole_end = first_slot + 1;
}

/* The tokens that a launch takes: those in slots begin .. end-1 of their sequences. */
struct slot_range {
    uint32_t begin, end;
};

/* Blocks of `rows` rows that the tokens of a range may have, with or without rows of tokens that count. */
__host__ __device__ inline uint32_t n_row_blocks(const attend_job &job, slot_range range, uint32_t rows)
{
    uint32_t n_tokens = min(job.tokens.n_tokens, range.end - range.begin);
    uint32_t n_levels = (uint32_t)(((size_t)n_tokens * job.group + rows - 1) / rows);
    return n_levels * job.tokens.n_sequences * job.k.pages.n_kv_heads;
}

/* The block of `level`, of a sequence's rows first .. end-1. They are counted from the last, so that a block of less
 * than `rows` rows is the one that sees the fewest tiles. */
__device__ inline void place_rows(row_block &block, uint32_t first, uint32_t end, uint32_t rows, uint32_t level)
{
    uint32_t n_left = end - first - min(end - first, level * rows);
    block.end = first + n_left;
    block.begin = block.end - min(n_left, rows);
}

/* Block `index` of a range: the last rows of all sequences and KV heads come first. False if the sequence has no such
 * rows. */
__device__ inline bool find_rows(const attend_job &job, slot_range range, uint32_t rows, uint32_t index,
                                 row_block &block)
{
    uint32_t n_kv_heads = job.k.pages.n_kv_heads, level = index / n_kv_heads / job.tokens.n_sequences;
    block.kv_head = index % n_kv_heads;
    block.sequence = index / n_kv_heads % job.tokens.n_sequences;
    block.n_cached = (uint32_t)job.tokens.n_cached[block.sequence];
    uint32_t capacity = min(job.max_slots, min(n_slots(job.k.pages), n_slots(job.v.pages)));
    uint32_t n_new = n_new_of(job.tokens, block.sequence);
    uint32_t n_fit = block.n_cached < capacity ? min(n_new, capacity - block.n_cached) : 0;
    if (n_fit < n_new && level == 0 && threadIdx.x == 0)
        tell(job.tokens, KSORT_ERR_ARGUMENT);
    uint32_t first = min(max(range.begin, block.n_cached) - block.n_cached, n_fit); /* token */
    uint32_t end = min(max(range.end, block.n_cached) - block.n_cached, n_fit);
    place_rows(block, first * job.group, end * job.group, rows, level);
    if (block.begin == block.end)
        return false;
    block.n_slots = block.n_cached + n_fit;
    find_tiles(job, block);
    return true;
}

/* Rows first .. first + n - 1 of a block, as far as it has them, and the tiles that these see: none if there are none. */
__device__ inline row_block rows_of_block(const attend_job &job, const row_block &block, uint32_t first, uint32_t n)
{
    row_block part = block;
    part.begin = min(block.begin + first, block.end);
    part.end = min(part.begin + n, block.end);
    if (part.begin == part.end)
        part.end_tile = part.first_tile;
    else
        find_tiles(job, part);
    return part;
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
            size_t token = (size_t)block.sequence * job.tokens.n_tokens + r / group;
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
                fetch_packed<HALF>(stage(tile), tile_at(job.k.pages, block.sequence, tile, block.kv_head),
                                   (uint32_t)job.k.layout.tile_bytes, threadIdx.x);
            return;
        }
        uint32_t values_tile = staged_values ? tile : panels_tile;
        if (values_tile >= block.end_tile)
            return;
        const uint8_t *tile_gmem = tile_at(job.v.pages, block.sequence, values_tile, block.kv_head);
        if (staged_values)
            fetch_packed<HALF>(stage(tile) + job.k.layout.tile_bytes, tile_gmem, (uint32_t)job.v.layout.tile_bytes,
                               threadIdx.x - HALF);
        else
            fetch_f16<HEAD_DIM, HALF>(values(values_tile), tile_gmem, n_valid(values_tile), threadIdx.x - HALF);
    }

    /* Returns the top of the values so far (prompt_expand.cuh). */
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
                top = max(top, largest_block_exponent(packed, job.v.layout, n_valid(tile)));
            expand_values<HEAD_DIM, shape::threads>(values(tile), packed, job.v.layout, top, n_valid(tile));
        }
        return top;
    }
};

#endif /* KSORT_PROMPT_PIPELINE_CUH */
