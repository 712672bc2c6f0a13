/* Into how many splits a context is cut for decode attention, and what their partial results take. Host code. */
#include "decode/common.cuh"

static uint32_t divide_up(uint64_t a, uint64_t b)
{
    return (uint32_t)((a + b - 1) / b);
}

/* The most chunks that a context reads. */
static uint32_t most_chunks(const attend_job &job)
{
    if (job.window && job.window < job.max_slots)
        return divide_up(job.window + CHUNK_TOKENS - 1, CHUNK_TOKENS);
    return divide_up(job.max_slots, CHUNK_TOKENS);
}

/* Blocks run in waves of as many as the device holds; where one wave takes all, multiprocessors share the blocks evenly
 * (balanced_shared_bytes). A wave takes LATENCY, and the time of a warp's chunks and of what a block needs to begin and
 * to end, which is that of WARM_UP chunks more. A chunk takes longer the more blocks share a multiprocessor: 0.85, 1.4
 * and 2 us with 1, 2 and 3 blocks on an H100. That is blocks + ALONE in units of 0.57 us, in which the others are too.
 * Each split costs the merge a little. The cheapest number of splits is taken, the smallest of equals. */
uint32_t decode_splits(const attend_job &job, int n_multiprocessors)
{
    constexpr float LATENCY = 2.0f, WARM_UP = 1.5f, ALONE = 0.5f, MERGING = 0.05f;
    const decode_shape shape = shape_of(job.k.layout.head_dim, job.k.layout.type, job.v.layout.type);
    const uint64_t rows = (uint64_t)job.tokens.n_contexts * job.k.pages.n_kv_heads * n_row_blocks(job.group);
    const uint32_t n_chunks = most_chunks(job), most = divide_up(n_chunks, shape.warps);
    uint32_t best = 1;
    float least = INFINITY;
    for (uint32_t n_splits = 1; n_splits <= most && n_splits <= MOST_SPLITS; n_splits++) {
        const uint32_t n_waves = divide_up(rows * n_splits, (uint64_t)n_multiprocessors * shape.blocks);
        const uint32_t blocks = n_waves > 1 ? shape.blocks : divide_up(rows * n_splits, n_multiprocessors);
        const uint32_t a_warp = divide_up(divide_up(n_chunks, n_splits), shape.warps);
        const float a_wave = LATENCY + ((float)a_warp + WARM_UP) * ((float)blocks + ALONE);
        const float cost = (float)n_waves * a_wave + MERGING * (float)n_splits;
        if (cost < least) {
            least = cost;
            best = n_splits;
        }
    }
    return best;
}

size_t decode_partial_floats(const attend_job &job)
{
    return n_parts(job) * (2 + job.k.layout.head_dim);
}
