/* Decode attention, launched: which kernel, and into how many splits a context is cut. The kernel is in
 * decode_kernel.cuh. */
#include "decode_kernel.cuh"

static uint32_t divide_up(uint64_t a, uint64_t b)
{
    return (uint32_t)((a + b - 1) / b);
}

/* The most chunks that a sequence reads. */
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
    const uint64_t rows = (uint64_t)job.tokens.n_sequences * job.k.pages.n_kv_heads * n_row_blocks(job.group);
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

template <uint32_t HEAD_DIM, uint32_t K_TYPE, uint32_t V_TYPE>
static cudaError_t launch_types(const attend_job &job, cudaStream_t stream)
{
    constexpr decode_shape SHAPE = shape_of(HEAD_DIM, K_TYPE, V_TYPE);
    return launch_decode_shaped<HEAD_DIM, K_TYPE, V_TYPE, SHAPE.warps, SHAPE.stages, SHAPE.blocks>(job, stream);
}

template <uint32_t HEAD_DIM, uint32_t K_TYPE>
static cudaError_t launch_k(const attend_job &job, cudaStream_t stream)
{
    switch (job.v.layout.type) {
    case KSORT_F16:
        return launch_types<HEAD_DIM, K_TYPE, KSORT_F16>(job, stream);
    case KSORT_BF16:
        return launch_types<HEAD_DIM, K_TYPE, KSORT_BF16>(job, stream);
    case KSORT_BFP16:
        return launch_types<HEAD_DIM, K_TYPE, KSORT_BFP16>(job, stream);
    default:
        return launch_types<HEAD_DIM, K_TYPE, KSORT_BFP12>(job, stream);
    }
}

template <uint32_t HEAD_DIM>
static cudaError_t launch_head_dim(const attend_job &job, cudaStream_t stream)
{
    switch (job.k.layout.type) {
    case KSORT_BFP16:
        return launch_k<HEAD_DIM, KSORT_BFP16>(job, stream);
    case KSORT_BFP14:
        return launch_k<HEAD_DIM, KSORT_BFP14>(job, stream);
    default:
        return launch_k<HEAD_DIM, KSORT_BFP12>(job, stream);
    }
}

cudaError_t launch_decode(const attend_job &job, cudaStream_t stream)
{
    switch (job.k.layout.head_dim) {
    case 64:
        return launch_head_dim<64>(job, stream);
    case 80:
        return launch_head_dim<80>(job, stream);
    case 96:
        return launch_head_dim<96>(job, stream);
    case 128:
        return launch_head_dim<128>(job, stream);
    default:
        return launch_head_dim<256>(job, stream);
    }
}
