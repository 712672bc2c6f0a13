/* Which rows of a prompt a CTA has, and which tiles they see. Rows are the queries of a KV head, token-major: row r is
 * token r / group, head r % group of the group.
 */
#ifndef KSORT_CUDA_PROMPT_SHARED_ROW_BLOCKS_CUH
#define KSORT_CUDA_PROMPT_SHARED_ROW_BLOCKS_CUH

#include "common/exact.cuh"
#include "common/phases.cuh"
#include "prompt/shared/panels.cuh"

constexpr int MMA_ROWS = 16;

/* The rows of a CTA and the packed tiles they see. */
struct row_block {
    uint32_t context, kv_head;
    uint32_t begin, end;        /* rows */
    uint32_t n_cached, n_slots; /* of the context; n_slots with the new tokens */
    uint32_t first_tile, end_tile;
    uint32_t whole_begin, whole_end; /* packed slots that every row sees */
};

/* First slot that the token in `slot` sees. */
__device__ inline uint32_t first_seen(uint32_t slot, uint32_t window)
{
    return window && slot + 1 > window ? slot + 1 - window : 0;
}

/* What the token in `slot` sees. Sections of later tokens begin and end no earlier. Where the ring begins is read
 * again: registers are scarce, and few tiles need it. */
__device__ inline slot_sections sections_of_token(const attend_job &job, const row_block &block, uint32_t slot)
{
    return sections_of(job.k.exact, exact_begin(job.k.exact, block.context), first_seen(slot, job.window), slot + 1);
}

/* Of a row of the block. */
__device__ inline uint32_t slot_of_row(const attend_job &job, const row_block &block, uint32_t row)
{
    return block.n_cached + row / job.group;
}

/* Finds the packed tiles that a block's rows see. */
__device__ inline void find_tiles(const attend_job &job, row_block &block)
{
    slot_sections first = sections_of_token(job, block, slot_of_row(job, block, block.begin));
    slot_sections last = sections_of_token(job, block, slot_of_row(job, block, block.end - 1));
    block.first_tile = first.sinks_end / TILE;
    block.end_tile = first.sinks_end < last.tail_begin ? (last.tail_begin + TILE - 1) / TILE : block.first_tile;
    block.whole_begin = last.sinks_end;
    block.whole_end = first.tail_begin;
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

/* Rows first .. first + n - 1 of a block, as far as it has them, and the tiles that these see, of the block's. */
__device__ inline row_block rows_of_block(const attend_job &job, const row_block &block, uint32_t first, uint32_t n)
{
    row_block part = block;
    part.begin = min(block.begin + first, block.end);
    part.end = min(part.begin + n, block.end);
    part.end_tile = part.first_tile;
    if (part.begin < part.end)
        find_tiles(job, part);
    if (part.first_tile == part.end_tile)
        part.first_tile = part.end_tile = block.first_tile;
    return part;
}

#endif /* KSORT_CUDA_PROMPT_SHARED_ROW_BLOCKS_CUH */
