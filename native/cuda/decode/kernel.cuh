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
 * Some warps have exact rows first (decode/exact.cuh). Warps only meet at the end, so that waiting for memory in one
 * is hidden by others. Bytes moved: K and V tiles once for each 8 query heads; head_dim 128: 68 bytes a token for
 * BFP12, 256 for f16. Partials, 8 * (head_dim + 2) * 4 bytes a block, are 0.1% to 1% of that.
 */
#ifndef KSORT_CUDA_DECODE_KERNEL_CUH
#define KSORT_CUDA_DECODE_KERNEL_CUH

#include "decode/exact.cuh"

/* One chunk, arrived in shared memory. */
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
    attend_scores<VALUES>(job, slots, first_slot, v_shift, lane, v_smem, scores, state);
}

template <uint32_t HEAD_DIM, uint32_t K_TYPE, uint32_t V_TYPE, uint32_t WARPS, uint32_t STAGES, uint32_t BLOCKS>
__global__ void __launch_bounds__(WARP *WARPS, BLOCKS) decode_kernel(const __grid_constant__ attend_job job)
{
    using values = chunk_values<V_TYPE, HEAD_DIM>;
    using ring_of_warp = chunk_ring<HEAD_DIM, K_TYPE, V_TYPE, STAGES>;
    using joined_warps = joined_smem<HEAD_DIM, WARPS>;
    constexpr uint32_t RING_BYTES = STAGES * ring_of_warp::STAGE_BYTES;
    using exact_list_of_warp = exact_list<HEAD_DIM, K_TYPE, V_TYPE, WARPS, STAGES>;
    constexpr bool MAY_BE_EXACT = V_TYPE != KSORT_BF16; /* such values have no exact rows beside them */
    static_assert(sizeof(query_smem<HEAD_DIM>) == query_bytes(HEAD_DIM));
    static_assert(sizeof(joined_warps) <= WARPS * RING_BYTES);
    extern __shared__ __align__(128) uint8_t shared[];

    let_dependent_begin();
    const decode_work work = work_of_block(job);
    if (work.slots.exceeds && threadIdx.x == 0)
        report(job.tokens, KSORT_ERR_ARGUMENT);
    const bool has_exact = MAY_BE_EXACT && job.exact_queries;
    const exact_chunks exact(work.sections);
    if (work.first_chunk == work.end_chunk && !(has_exact && exact.reach(job, work.split))) {
        wait_for_kernel_before();
        write_empty_part(job, work);
        return;
    }

    /* The shuffle shows the compiler that a warp has one number. */
    const uint32_t lane = lane_of_warp(), warp = __shfl_sync(~0u, threadIdx.x / WARP, 0);
    query_smem<HEAD_DIM> &queries = *reinterpret_cast<query_smem<HEAD_DIM> *>(shared);
    uint8_t *rings = shared + sizeof queries;
    ring_of_warp ring = {rings + (has_exact ? exact_list_of_warp::shape::place(warp) : warp * RING_BYTES)};
    chunk_list<WARPS> list(work, warp);
    auto fetch_first = [&] {
        for (uint32_t i = 0; i < STAGES - 1; i++)
            ring.fetch(job, work, list, i, lane);
    };
    const exact_list_of_warp exact_list(job, work, exact, warp, ring.smem);
    const bool is_exact = has_exact && !exact_list.is_empty();
    if (is_exact)
        exact_list.fetch(job, work, exact_list.first, lane);
    else
        fetch_first();
    wait_for_kernel_before(); /* for queries: tiles are older, see common/dependent_launch.cuh */
    exact_query<HEAD_DIM> exact_query;
    if (is_exact)
        exact_query.load(job, work, lane);
    load_queries<K_TYPE, HEAD_DIM>(job, work.context, work.first_head, work.n_rows, queries);
    __syncthreads();

    row_state<values::N_PRODUCTS> state;
    if constexpr (MAY_BE_EXACT)
        if (is_exact)
            exact_list.attend(job, work, exact_query, lane, state, fetch_first);
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
    uint32_t bytes = shared_bytes(HEAD_DIM, K_TYPE, V_TYPE, WARPS, STAGES);
    if (job.exact_queries)
        bytes += exact_shape<HEAD_DIM, K_TYPE, V_TYPE, WARPS, STAGES>::more_bytes;
    config.dynamicSmemBytes = balanced_shared_bytes(room, config.gridDim, bytes);
    /* The same limit in every call: other threads launch the kernel too. */
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, room.shared_bytes_a_block);
    return error == cudaSuccess ? launch_dependent(config, kernel, job) : error;
}

#endif /* KSORT_CUDA_DECODE_KERNEL_CUH */
