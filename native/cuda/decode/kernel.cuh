/* Decode attention: one new token a context, whose slots are cut into splits; a block takes up to 8 query heads of one
 * KV head over one split.
 *
 *     grid:  x = split, row block (which share K and V through L2)   y = KV head   z = context
 *
 *     chunks of the split   0  1  2  3 | 4  5  6  7 | 8 ...        a chunk: 32 tokens, K and V
 *     warp                  0  1  2  3   0  1  2  3   0 ...
 *
 *     each warp, alone:     tiles --cp.async--> its ring of chunks in shared memory
 *                           chunk: S = Q K^T (int8), P = 2^(S - max), O += P V (f16 or bf16)    O: registers, f32
 *     at the end:           the block's warps are joined in shared memory -> partials of the split
 *
 * Warps only meet at the end, so that waiting for memory in one is hidden by others. Bytes moved: K and V tiles once
 * for each 8 query heads; head_dim 128: 68 bytes a token for BFP12, 256 for f16. Partials, 8 * (head_dim + 2) * 4
 * bytes a block, are 0.1% to 1% of that.
 */
#ifndef KSORT_CUDA_DECODE_KERNEL_CUH
#define KSORT_CUDA_DECODE_KERNEL_CUH

#include "common/dependent_launch.cuh"
#include "decode/keys.cuh"
#include "decode/values.cuh"
#include "decode/work.cuh"

/* Scores may exceed the maximum in use by this (units of log2) before sums are rescaled: weights up to 2^8 are as good
 * as weights up to 1, and after the first chunk nearly no chunk has to. */
constexpr float RISE = 8.0f;

/* Warps of a block, in shared memory after their last chunk. */
template <uint32_t HEAD_DIM, uint32_t WARPS>
struct joined_smem {
    softmax_part parts[WARPS][ROWS];
    float values[WARPS][ROWS][HEAD_DIM];
};

/* Softmax and sums of a warp: of row lane / 4; sum is of the lane's tokens alone. */
template <uint32_t N_PRODUCTS>
struct row_state {
    float max = -INFINITY;
    float sum = 0.0f;
    float values[N_PRODUCTS][4] = {};

    /* Raises the maximum where scores exceed it; lanes of a row agree on it. */
    __device__ void raise(const float (&scores)[8])
    {
        float largest = scores[0];
#pragma unroll
        for (int i = 1; i < 8; i++)
            largest = fmaxf(largest, scores[i]);
        if (!__any_sync(~0u, largest > max + RISE))
            return;
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
        largest = fmaxf(max, fmaxf(largest, __shfl_xor_sync(~0u, largest, 2)));
        const float rescale = exp2_approximate(max - largest);
        max = largest;
        sum *= rescale;
#pragma unroll
        for (uint32_t i = 0; i < N_PRODUCTS; i++)
#pragma unroll
            for (int c = 0; c < 4; c++)
                values[i][c] *= rescale;
    }
};

/* Slots outside the span: no weight, and values that are no NaN. */
template <typename VALUES>
__device__ inline void hide_slots(const attend_job &job, const slot_span &slots, uint32_t first_slot, uint32_t lane,
                                  uint8_t *v_smem, float (&scores)[8])
{
    const uint32_t slot = first_slot + lane;
    if (slot < slots.begin || slot >= slots.end)
        VALUES::clear_token(job.v.layout, v_smem, lane);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const uint32_t scored = first_slot + 8 * (lane % 4) + i;
        if (scored < slots.begin || scored >= slots.end)
            scores[i] = -INFINITY;
    }
    __syncwarp();
}

/* A warp's state into its place in shared memory. */
template <typename VALUES, uint32_t HEAD_DIM, uint32_t WARPS>
__device__ inline void store_state(row_state<VALUES::N_PRODUCTS> &state, uint32_t warp, uint32_t lane,
                                   joined_smem<HEAD_DIM, WARPS> &joined)
{
    const uint32_t row = lane / 4;
    state.sum += __shfl_xor_sync(~0u, state.sum, 1);
    state.sum += __shfl_xor_sync(~0u, state.sum, 2);
    if (lane % 4 == 0)
        joined.parts[warp][row] = {state.max, state.sum};
#pragma unroll
    for (uint32_t i = 0; i < VALUES::N_PRODUCTS; i++)
#pragma unroll
        for (uint32_t c = 0; c < 2; c++) {
            const uint32_t channel = VALUES::channel(i, 2 * (lane % 4) + c);
            if (channel < HEAD_DIM)
                joined.values[warp][row][channel] =
                    (state.values[i][c] + VALUES::LEFT_SCALE * state.values[i][c + 2]) * VALUES::OUT_SCALE;
        }
}

/* Joins the warps of a block into the split's partials. At least one warp had a chunk. */
template <uint32_t HEAD_DIM, uint32_t WARPS>
__device__ inline void write_partials(const attend_job &job, const decode_work &work,
                                      const joined_smem<HEAD_DIM, WARPS> &joined)
{
    constexpr uint32_t N_QUADS = HEAD_DIM / 4; /* four channels a thread */
    for (uint32_t at = threadIdx.x; at < work.n_rows * N_QUADS; at += blockDim.x) {
        const uint32_t row = at / N_QUADS, quad = at % N_QUADS;
        float max = -INFINITY, sum = 0.0f;
        float4 values = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (uint32_t warp = 0; warp < WARPS; warp++)
            max = fmaxf(max, joined.parts[warp][row].max);
#pragma unroll
        for (uint32_t warp = 0; warp < WARPS; warp++) {
            const float factor = exp2_approximate(joined.parts[warp][row].max - max);
            sum += factor * joined.parts[warp][row].sum;
            const float4 of_warp = reinterpret_cast<const float4 *>(joined.values[warp][row])[quad];
            values.x += factor * of_warp.x;
            values.y += factor * of_warp.y;
            values.z += factor * of_warp.z;
            values.w += factor * of_warp.w;
        }
        const uint32_t head = work.first_head + row;
        reinterpret_cast<float4 *>(part_values_of(job, work.context, head) + (size_t)work.split * HEAD_DIM)[quad] =
            values;
        if (quad == 0)
            parts_of(job, work.context, head)[work.split] = {max, sum};
    }
}

/* One chunk, arrived in shared memory: scores, weights, values. */
template <uint32_t HEAD_DIM, uint32_t K_TYPE, typename VALUES>
__device__ inline void attend_chunk(const attend_job &job, const slot_span &slots, uint32_t first_slot, uint32_t lane,
                                    const query_smem<HEAD_DIM> &queries, uint8_t *k_smem, uint8_t *v_smem,
                                    row_state<VALUES::N_PRODUCTS> &state)
{
    const uint32_t k_shift = __ffs(job.k.layout.block_size) - 1, v_shift = __ffs(job.v.layout.block_size) - 1;
    float scores[8];
    if (k_shift == 4)
        score_chunk<K_TYPE, HEAD_DIM, true>(job.k.layout, k_shift, queries, k_smem, lane, scores);
    else
        score_chunk<K_TYPE, HEAD_DIM, false>(job.k.layout, k_shift, queries, k_smem, lane, scores);
    if (first_slot < slots.begin || first_slot + CHUNK_TOKENS > slots.end)
        hide_slots<VALUES>(job, slots, first_slot, lane, v_smem, scores);
    state.raise(scores);
    float weights[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        weights[i] = exp2_approximate(scores[i] - state.max);
        state.sum += weights[i];
    }
    weight_fragments fragments;
    VALUES::weigh(weights, fragments);
    VALUES::accumulate(v_shift, v_smem, lane, fragments, state.values);
}

template <uint32_t HEAD_DIM, uint32_t K_TYPE, uint32_t V_TYPE, uint32_t WARPS, uint32_t STAGES, uint32_t BLOCKS>
__global__ void __launch_bounds__(WARP *WARPS, BLOCKS) decode_kernel(const __grid_constant__ attend_job job)
{
    using values = chunk_values<V_TYPE, HEAD_DIM>;
    using ring_of_warp = chunk_ring<HEAD_DIM, K_TYPE, V_TYPE, STAGES>;
    using joined_warps = joined_smem<HEAD_DIM, WARPS>;
    constexpr uint32_t RING_BYTES = STAGES * ring_of_warp::STAGE_BYTES;
    static_assert(sizeof(query_smem<HEAD_DIM>) == query_bytes(HEAD_DIM));
    static_assert(sizeof(joined_warps) <= WARPS * RING_BYTES);
    extern __shared__ __align__(128) uint8_t shared[];

    let_dependent_begin();
    const decode_work work = work_of_block(job);
    if (work.slots.exceeds && threadIdx.x == 0)
        report(job.tokens, KSORT_ERR_ARGUMENT);
    if (work.first_chunk == work.end_chunk) {
        wait_for_kernel_before();
        if (work.slots.end != 0 && threadIdx.x < work.n_rows)
            parts_of(job, work.context, work.first_head + threadIdx.x)[work.split] = {-INFINITY, 0.0f};
        return;
    }

    /* The shuffle shows the compiler that a warp has one number. */
    const uint32_t lane = lane_of_warp(), warp = __shfl_sync(~0u, threadIdx.x / WARP, 0);
    query_smem<HEAD_DIM> &queries = *reinterpret_cast<query_smem<HEAD_DIM> *>(shared);
    uint8_t *rings = shared + sizeof queries;
    ring_of_warp ring = {rings + warp * RING_BYTES};
    chunk_list<WARPS> list(work, warp);
    for (uint32_t i = 0; i < STAGES - 1; i++)
        ring.fetch(job, work, list, i, lane);
    wait_for_kernel_before(); /* for queries: tiles are older, see common/dependent_launch.cuh */
    load_queries<K_TYPE, HEAD_DIM>(job, work.context, work.first_head, work.n_rows, queries);
    __syncthreads();

    row_state<values::N_PRODUCTS> state;
    for (uint32_t i = 0; i < list.n_chunks; i++) {
        wait_for_copies<STAGES - 2>();
        __syncwarp(); /* all lanes' copies of chunk i are here, and all lanes are done with chunk i - 1 */
        ring.fetch(job, work, list, i + STAGES - 1, lane);
        attend_chunk<HEAD_DIM, K_TYPE, values>(job, work.slots, list.chunk(i) * CHUNK_TOKENS, lane, queries, ring.k(i),
                                               ring.v(i), state);
    }

    __syncthreads(); /* the rings are free */
    joined_warps &joined = *reinterpret_cast<joined_warps *>(rings);
    store_state<values, HEAD_DIM, WARPS>(state, warp, lane, joined);
    __syncthreads();
    write_partials<HEAD_DIM, WARPS>(job, work, joined);
}

struct device_room {
    int n_multiprocessors;
    int shared_bytes;         /* of a multiprocessor */
    int shared_bytes_a_block; /* at most */
};

inline cudaError_t room_of_device(device_room *room)
{
    int device;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&room->n_multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&room->shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&room->shared_bytes_a_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return error;
}

/* Left alone, a device may give some multiprocessors a block more than they must have, which all others wait for. So a
 * block asks for so much shared memory that one more does not fit; never less than it needs. Not where a multiprocessor
 * has one block at most: with one context of 2048 or 8192 tokens that cost an H100 0.6 us. */
inline uint32_t balanced_shared_bytes(const device_room &room, const dim3 &grid, uint32_t needed_bytes)
{
    constexpr uint32_t STEP = 128; /* in which shared memory is given */
    const uint64_t n_blocks = (uint64_t)grid.x * grid.y * grid.z, n = room.n_multiprocessors;
    const uint64_t a_multiprocessor = (n_blocks + n - 1) / n;
    const uint32_t too_much = (uint32_t)(room.shared_bytes / (a_multiprocessor + 1)) / STEP * STEP + STEP;
    return a_multiprocessor > 1 && too_much > needed_bytes ? too_much : needed_bytes;
}

template <uint32_t HEAD_DIM, uint32_t K_TYPE, uint32_t V_TYPE, uint32_t WARPS, uint32_t STAGES, uint32_t BLOCKS>
cudaError_t launch_decode_shaped(const attend_job &job, cudaStream_t stream)
{
    auto kernel = decode_kernel<HEAD_DIM, K_TYPE, V_TYPE, WARPS, STAGES, BLOCKS>;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(job.n_splits * n_row_blocks(job.group), job.k.pages.n_kv_heads, job.tokens.n_contexts);
    config.blockDim = dim3(WARP * WARPS);
    config.stream = stream;
    device_room room;
    cudaError_t error = room_of_device(&room);
    if (error != cudaSuccess)
        return error;
    config.dynamicSmemBytes =
        balanced_shared_bytes(room, config.gridDim, shared_bytes(HEAD_DIM, K_TYPE, V_TYPE, WARPS, STAGES));
    /* The same limit in every call: other threads launch the kernel too. */
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, room.shared_bytes_a_block);
    return error == cudaSuccess ? launch_dependent(config, kernel, job) : error;
}

#endif /* KSORT_CUDA_DECODE_KERNEL_CUH */
