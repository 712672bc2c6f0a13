/* The phases of a call: each has a folder of its own; api.cu checks the arguments and launches them one after another.
 *
 *     pack:    k_x, v_x --pack--> tiles;  --pack_exact--> exact rows
 *     attend:  q --prepare_queries--> prepared queries (workspace)
 *              1 token a context:    prepared --decode--> partials (workspace) --merge--> out
 *              more:                 prepared --prompt_exact--> sums over exact rows (workspace) --prompt--> out
 *
 * Arguments are checked before; all functions only enqueue.
 */
#ifndef KSORT_CUDA_COMMON_PHASES_CUH
#define KSORT_CUDA_COMMON_PHASES_CUH

#include "common/device.cuh"

/* A row's softmax over its exact slots: prompt/shared/softmax.cuh. */
struct exact_softmax {
    float shift, sum;
};

/* A call of ksort_cuda_attend after its checks, as kernels take it by value. */
struct attend_job {
    device_cache k;
    device_cache v;
    ksort_cuda_tokens tokens;
    ksort_rope rope;             /* partner NULL: none */
    ksort_transform k_transform; /* zeros: none */
    ksort_transform v_transform;
    bool has_v_transform;
    const void *q;
    void *out;
    size_t q_token_stride, q_context_stride, out_token_stride, out_context_stride; /* elements */
    uint32_t x_type, n_heads, group, window, max_slots;
    float scale;
    /* Prepared queries, in the workspace: row ((context * n_tokens + token) * n_heads + head), written by
     * prepare_queries, in one of two forms; the pointers of the other are NULL.
     * Decode: the value of channel c is mantissas[c] * 2^(exponents[c / block_size] - 127 - 6), 0 where the exponent is
     * 0; exactly what ksort_attend rounds a query to. Mantissas from head_dim to query_stride are 0.
     * Prompt: values are the same in bf16, exactly (below 2^-126 as subnormals). */
    int8_t *mantissas;     /* [rows][query_stride] */
    uint8_t *exponents;    /* [rows][MAX_BLOCKS] */
    __nv_bfloat16 *values; /* [rows][head_dim] */
    uint32_t query_stride; /* bytes: 4 * k.layout.n_quads rounded up to 32 */
    float *exact_queries;  /* [rows][head_dim]: as they are before rounding, for exact rows; NULL without these */
    /* Prompt, with exact rows: a row's softmax. What they add to its outputs, before these are divided by the sum, takes
     * the place of exact_queries. */
    exact_softmax *exact_rows; /* [rows] */
    /* Decode: softmax states and accumulators of the splits of a row, in the workspace. */
    uint32_t n_splits;
    float *partials; /* as decode/common.cuh lays them out */
};

/* A call of ksort_cuda_pack after its checks. */
struct pack_job {
    device_cache k, v;
    bool has_k, has_v;
    ksort_cuda_tokens tokens;
    ksort_rope rope;
    ksort_transform k_transform, v_transform;
    bool has_k_transform, has_v_transform; /* then BFP heads are rounded by the encoder of transformed heads */
    const void *k_x, *v_x;
    size_t token_stride, context_stride;
    uint32_t x_type;
};

/* Into how many splits the contexts of a job are cut (head counts, max_slots and layouts are set), and the floats of
 * partials they need (n_splits is set). decode/splits.cu */
uint32_t decode_splits(const attend_job &job, int n_multiprocessors);
size_t decode_partial_floats(const attend_job &job);

/* Compiled once for each head dimension; common/head_dim.cuh chooses. */
template <int HEAD_DIM>
cudaError_t launch_pack(const pack_job &job, cudaStream_t stream); /* pack/launch.cu */
template <int HEAD_DIM>
cudaError_t launch_pack_exact(const pack_job &job, cudaStream_t stream); /* pack/exact.cu */
template <int HEAD_DIM>
cudaError_t launch_prepare_queries(const attend_job &job, cudaStream_t stream); /* query/launch.cu */
template <int HEAD_DIM>
cudaError_t launch_decode(const attend_job &job, cudaStream_t stream); /* decode/launch.cu */
template <int HEAD_DIM>
cudaError_t launch_merge(const attend_job &job, cudaStream_t stream); /* decode/merge.cu */
template <int HEAD_DIM>
cudaError_t launch_prompt_exact(const attend_job &job, cudaStream_t stream); /* prompt/exact.cu */
template <int HEAD_DIM>
cudaError_t launch_prompt(const attend_job &job, cudaStream_t stream); /* prompt/launch.cu */

#endif /* KSORT_CUDA_COMMON_PHASES_CUH */
