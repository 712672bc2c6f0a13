/* Which rows of a prompt a CTA has, and which tiles they see. Rows are the queries of a KV head, token-major: row r is
 * token r / group, head r % group of the group.
 */
#ifndef KSORT_CUDA_PROMPT_SHARED_ROW_BLOCKS_CUH
#define KSORT_CUDA_PROMPT_SHARED_ROW_BLOCKS_CUH

#include "common/phases.cuh"
#include "prompt/shared/panels.cuh"

constexpr int MMA_ROWS = 16;

/* The rows of a CTA and the tiles they see. */
struct row_block {
    uint32_t context, kv_head;
    uint32_t begin, end;        /* rows */
    uint32_t n_cached, n_slots; /* of the context; n_slots with the new tokens */
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

/* The tokens that a launch takes: those in slots begin .. end-1 of their contexts. */
struct slot_range {
    uint32_t begin, end;
};

/* Blocks of `rows` rows that the tokens of a range may have, with or without rows of tokens that count. */
__host__ __device__ inline uint32_t n_row_blocks(const attend_job &job, slot_range range, uint32_t rows)
{
    uint32_t n_tokens = min(job.tokens.n_tokens, range.end - range.begin);
    uint32_t n_levels = (uint32_t)(((size_t)n_tokens * job.group + rows - 1) / rows);
    return n_levels * job.tokens.n_contexts * job.k.pages.n_kv_heads;
}

/* The block of `level`, of a context's rows first .. end-1. They are counted from the last, so that a block of less
 * than `rows` rows is the one that sees the fewest tiles. */
__device__ inline void place_rows(row_block &block, uint32_t first, uint32_t end, uint32_t rows, uint32_t level)
{
    uint32_t n_left = end - first - min(end - first, level * rows);
    block.end = first + n_left;
    block.begin = block.end - min(n_left, rows);
}

/* Block `index` of a range: the last rows of all contexts and KV heads come first. False if the context has no such
 * rows. */
__device__ inline bool find_rows(const attend_job &job, slot_range range, uint32_t rows, uint32_t index,
                                 row_block &block)
{
    uint32_t n_kv_heads = job.k.pages.n_kv_heads, level = index / n_kv_heads / job.tokens.n_contexts;
    block.kv_head = index % n_kv_heads;
    block.context = index / n_kv_heads % job.tokens.n_contexts;
    block.n_cached = (uint32_t)job.tokens.n_cached[block.context];
    uint32_t capacity = min(job.max_slots, min(n_slots(job.k.pages), n_slots(job.v.pages)));
    uint32_t n_new = n_new_of(job.tokens, block.context);
    uint32_t n_fit = block.n_cached < capacity ? min(n_new, capacity - block.n_cached) : 0;
    if (n_fit < n_new && level == 0 && threadIdx.x == 0)
        report(job.tokens, KSORT_ERR_ARGUMENT);
    uint32_t first = min(max(range.begin, block.n_cached) - block.n_cached, n_fit); /* token */
    uint32_t end = min(max(range.end, block.n_cached) - block.n_cached, n_fit);
    place_rows(block, first * job.group, end * job.group, rows, level);
    if (block.begin == block.end)
        return false;
    block.n_slots = block.n_cached + n_fit;
    find_tiles(job, block);
    return true;
}

/* Rows first .. first + n - 1 of a block, as far as it has them, and the tiles that these see: none if there are none.
 * */
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

#endif /* KSORT_CUDA_PROMPT_SHARED_ROW_BLOCKS_CUH */
