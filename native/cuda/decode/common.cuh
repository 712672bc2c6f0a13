/* What decode/launch.cu, its kernel and decode/merge.cu agree on: which slots a context reads, how a block is cut into
 * warps and stages, and where partial results are.
 *
 * Words: a "chunk" is 32 tokens of one KV head, half a tile, the step of a warp; a "split" is a block's share of a
 * context's chunks; a "row" is a query head.
 */
#ifndef KSORT_CUDA_DECODE_COMMON_CUH
#define KSORT_CUDA_DECODE_COMMON_CUH

#include "common/phases.cuh"

constexpr uint32_t CHUNK_TOKENS = 2 * STRIP_TOKENS;
constexpr uint32_t MOST_SPLITS = 512;
constexpr uint32_t ROWS = 8; /* query heads of one KV head that a block attends with: half the rows of an mma */

HOST_DEVICE constexpr uint32_t n_row_blocks(uint32_t group)
{
    return (group + ROWS - 1) / ROWS;
}

HOST_DEVICE constexpr uint32_t mantissa_bits_of(uint32_t type)
{
    return type == KSORT_SBFP11                          ? 3
           : type == KSORT_BFP12 || type == KSORT_SBFP12 ? 4
           : type == KSORT_BFP14                         ? 6
           : type == KSORT_BFP16                         ? 8
                                                         : 0;
}

HOST_DEVICE constexpr bool is_scaled_type(uint32_t type)
{
    return type == KSORT_SBFP12 || type == KSORT_SBFP11;
}

/* Words of a token; head dimensions that kernels take are multiples of 16, so that no groups but those of SBFP11, of 32
 * channels, need padding. */
HOST_DEVICE constexpr uint32_t n_words_of(uint32_t type, uint32_t head_dim)
{
    return type == KSORT_SBFP11 ? (head_dim + 31) / 32 * 3 : head_dim * mantissa_bits_of(type) / 32;
}

/* A chunk in shared memory: its words, then CHUNK_TOKENS exponents of each block, of which the smallest blocks make
 * head_dim / 16; or rows of 2-byte values. */
HOST_DEVICE constexpr uint32_t chunk_bytes(uint32_t type, uint32_t head_dim)
{
    return mantissa_bits_of(type) ? CHUNK_TOKENS * (4 * n_words_of(type, head_dim) + head_dim / 16)
                                  : CHUNK_TOKENS * head_dim * 2;
}

/* mma steps of 32 channels that a score takes. */
HOST_DEVICE constexpr uint32_t n_channel_steps(uint32_t head_dim)
{
    return (head_dim + 31) / 32;
}

/* Shared memory for the queries: 16 bytes a lane and step, and a factor for each row and half step. */
HOST_DEVICE constexpr uint32_t query_bytes(uint32_t head_dim)
{
    return n_channel_steps(head_dim) * (WARP * 16 + 2 * ROWS * 4);
}

/* How a block is made. Each warp has a ring of `stages` chunks (K and V) in shared memory. */
struct decode_shape {
    uint32_t warps;
    uint32_t stages;
    uint32_t blocks; /* that fit a multiprocessor of an H100 */
};

HOST_DEVICE constexpr uint32_t stage_bytes(uint32_t head_dim, uint32_t k_type, uint32_t v_type)
{
    return chunk_bytes(k_type, head_dim) + chunk_bytes(v_type, head_dim);
}

HOST_DEVICE constexpr uint32_t shared_bytes(uint32_t head_dim, uint32_t k_type, uint32_t v_type, uint32_t warps,
                                            uint32_t stages)
{
    return query_bytes(head_dim) + warps * stages * stage_bytes(head_dim, k_type, v_type);
}

/* Bytes that a multiprocessor should have on their way: more than the latency of device memory takes, and not much
 * more, as deeper rings were slower on an H100. */
constexpr uint32_t BYTES_UNDER_WAY = 48 * 1024;

/* Three blocks of four warps, so that 168 registers a thread are left; two where three have no room for two stages or
 * head_dim takes more registers, of two warps where four had no two stages. A warp works on one stage while the others
 * are on their way. */
constexpr decode_shape shape_of(uint32_t head_dim, uint32_t k_type, uint32_t v_type)
{
    constexpr uint32_t SHARED = 227 * 1024, A_BLOCK = 1024; /* bytes of an H100; kept by CUDA */
    const uint32_t stage = stage_bytes(head_dim, k_type, v_type), queries = query_bytes(head_dim);
    uint32_t warps = 4, blocks = 3, room = (SHARED / 3 - A_BLOCK - queries) / (warps * stage);
    if (room < 2 || head_dim > 128) {
        blocks = 2;
        room = (SHARED / 2 - A_BLOCK - queries) / (warps * stage);
        if (room < 2) {
            warps = 2;
            room = (SHARED / 2 - A_BLOCK - queries) / (warps * stage);
        }
    }
    const uint32_t a_stage = blocks * warps * stage, stages = 1 + (BYTES_UNDER_WAY + a_stage - 1) / a_stage;
    return {warps, stages < room ? stages : room, blocks};
}

/* Slots begin .. end-1 that the new token of a context sees; none where it has no new token, or where they exceed
 * max_slots or a cache's pages. */
struct slot_span {
    uint32_t begin;
    uint32_t end;
    bool exceeds;
};

__device__ inline slot_span slots_of(const attend_job &job, uint32_t context)
{
    const uint32_t end = (uint32_t)job.tokens.n_cached[context] + 1;
    if (n_new_of(job.tokens, context) == 0)
        return {0, 0, false};
    if (end > job.max_slots || end > n_slots(job.k.pages) || end > n_slots(job.v.pages))
        return {0, 0, true};
    return {job.window && end > job.window ? end - job.window : 0, end, false};
}

/* What a split adds to a row's softmax: with scores s_i in units of log2, sum = sum of 2^(s_i - max), beside the
 * average's numerator, values[head_dim] = sum of 2^(s_i - max) * v_i. max = -inf: no token, and values were not
 * written. max may be a little below the largest score. */
struct softmax_part {
    float max;
    float sum;
};

/* job.partials: values [n_contexts][n_heads][n_splits][head_dim], aligned to 16 bytes as head_dim is a multiple of 4,
 * then softmax_part [n_contexts][n_heads][n_splits]. */
HOST_DEVICE inline size_t n_parts(const attend_job &job)
{
    return (size_t)job.tokens.n_contexts * job.n_heads * job.n_splits;
}

__device__ inline float *part_values_of(const attend_job &job, uint32_t context, uint32_t head)
{
    return job.partials + ((size_t)context * job.n_heads + head) * job.n_splits * job.k.layout.head_dim;
}

__device__ inline softmax_part *parts_of(const attend_job &job, uint32_t context, uint32_t head)
{
    float *parts = job.partials + n_parts(job) * job.k.layout.head_dim;
    return reinterpret_cast<softmax_part *>(parts) + ((size_t)context * job.n_heads + head) * job.n_splits;
}

/* 2^x to 2 ulp; 2^-inf = 0. */
__device__ inline float exp2_approximate(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#endif /* KSORT_CUDA_DECODE_COMMON_CUH */
