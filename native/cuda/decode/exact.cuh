/* Exact rows of decode attention: splits of their own, of which each warp takes chunks of 32 f16 rows of the sinks
 * and of the tail, one after another (these are few: several warps and splits share them).
 *
 *     chunks     sinks 0 1 | tail 0 1 2 3 4          rows of a chunk lie together, in one tile
 *     warp             0 1        2 3 0 1 2 ...      of all exact splits
 *
 * Scores: S = Q K^T in f16, rows 0 to 7 of A the high parts of queries, rows 8 to 15 the low ones (common/exact.cuh),
 * so that one product has both. Column n of product i (0 .. 3) is token 8 (n / 2) + 2 i + n % 2: so a lane has the
 * scores of tokens 8j .. 8j+7, as decode/values.cuh needs their weights.
 */
#ifndef KSORT_CUDA_DECODE_EXACT_CUH
#define KSORT_CUDA_DECODE_EXACT_CUH

#include "common/exact.cuh"
#include "decode/state.cuh"

template <uint32_t HEAD_DIM>
struct exact_query_smem {
    uint4 fragments[HEAD_DIM / 16][WARP]; /* A of each step of 16 channels */
    float factors[ROWS];                  /* of a row's scores, in units of log2 */
};

/* Every warp has a chunk of keys and one of values. */
template <uint32_t HEAD_DIM, uint32_t WARPS>
struct exact_shape {
    static constexpr uint32_t warps = HEAD_DIM > 128 && WARPS > 2 ? 2 : WARPS; /* that have room */
    static constexpr uint32_t chunk = chunk_bytes(KSORT_F16, HEAD_DIM);
    static constexpr uint32_t shared_bytes = sizeof(exact_query_smem<HEAD_DIM>) + warps * 2 * chunk;
};

/* The largest of a row's channels as float bits, by a warp. */
template <uint32_t HEAD_DIM>
__device__ inline uint32_t largest_of_row(const float *row, uint32_t lane)
{
    uint32_t largest = 0;
    for (uint32_t c = lane; c < HEAD_DIM; c += WARP)
        largest = max(largest, __float_as_uint(row[c]) & 0x7FFFFFFF);
    return __reduce_max_sync(~0u, largest);
}

/* Exact queries of heads first_head .. first_head + n_rows-1, by all warps of a block. Rows beyond are zeros. */
template <uint32_t HEAD_DIM>
__device__ inline void load_exact_queries(const attend_job &job, const decode_work &work, uint32_t warp, uint32_t lane,
                                          exact_query_smem<HEAD_DIM> &queries)
{
    constexpr float LOG2_E = 1.44269504f;
    for (uint32_t row = warp; row < ROWS; row += blockDim.x / WARP) {
        const bool exists = row < work.n_rows;
        const float *q =
            job.exact_queries + ((size_t)work.context * job.n_heads + work.first_head + (exists ? row : 0)) * HEAD_DIM;
        const query_scale scale = query_scale_of(exists ? largest_of_row<HEAD_DIM>(q, lane) : 0);
        for (uint32_t c = lane; c < HEAD_DIM; c += WARP) {
            const query_parts parts = parts_of_query(exists ? q[c] : 0.0f, scale);
            const uint32_t k = c % 16, register_pair = k / 8 * 2, j = k % 8 / 2;
            __half *fragment = reinterpret_cast<__half *>(&queries.fragments[c / 16][4 * row + j]) + k % 2;
            fragment[2 * register_pair] = parts.high;
            fragment[2 * (register_pair + 1)] = parts.low;
        }
        if (lane == 0)
            queries.factors[row] = scale.factor * (job.scale * LOG2_E);
    }
}

/* Scores of row lane / 4 and tokens 8j .. 8j+7, in units of log2. */
template <uint32_t HEAD_DIM>
__device__ inline void score_exact_chunk(const exact_query_smem<HEAD_DIM> &queries, const uint8_t *k_smem,
                                         uint32_t lane, float (&scores)[8])
{
    float sums[4][4] = {};
    const uint32_t row = lane % 8, token = row / 2 * 8 + row % 2 + lane / 16 * 2; /* of product 0 or 1 */
#pragma unroll
    for (uint32_t step = 0; step < HEAD_DIM / 16; step++) {
        const uint4 fragment = queries.fragments[step][lane];
        const uint32_t a[4] = {fragment.x, fragment.y, fragment.z, fragment.w};
#pragma unroll
        for (uint32_t i = 0; i < 4; i += 2) {
            uint32_t b[4];
            load_straight(k_smem + chunk_piece_offset<HEAD_DIM>(2 * step + lane / 8 % 2, token + 2 * i), b);
            mma_f16(sums[i], a, b[0], b[1]);
            mma_f16(sums[i + 1], a, b[2], b[3]);
        }
    }
    const float factor = queries.factors[lane / 4];
#pragma unroll
    for (int i = 0; i < 8; i++)
        scores[i] = (sums[i / 2][i % 2] + sums[i / 2][i % 2 + 2]) * factor;
}

/* The chunks of both sections, in one line. */
struct exact_chunks {
    slot_sections sections;
    uint32_t n_sink_chunks, n_chunks;

    __device__ explicit exact_chunks(const slot_sections &sections) : sections(sections)
    {
        n_sink_chunks = n_chunks_of(sections.first, sections.sinks_end);
        n_chunks = n_sink_chunks + n_chunks_of(sections.tail_begin, sections.end);
    }

    __device__ static uint32_t n_chunks_of(uint32_t begin, uint32_t end)
    {
        return begin < end ? (end + CHUNK_TOKENS - 1) / CHUNK_TOKENS - begin / CHUNK_TOKENS : 0;
    }

    __device__ bool is_of_sinks(uint32_t i) const { return i < n_sink_chunks; }

    /* Those of the chunk's section that the query sees. */
    __device__ slot_span slots(uint32_t i) const
    {
        return is_of_sinks(i) ? slot_span{sections.first, sections.sinks_end, false}
                              : slot_span{sections.tail_begin, sections.end, false};
    }

    __device__ uint32_t first_slot(uint32_t i) const
    {
        const uint32_t chunk = slots(i).begin / CHUNK_TOKENS + (is_of_sinks(i) ? i : i - n_sink_chunks);
        return chunk * CHUNK_TOKENS;
    }

    /* The f16 tile that a chunk is in, of keys or of values that are f16 themselves. */
    __device__ const uint8_t *tile(const device_cache &cache, const decode_work &work, uint32_t i) const
    {
        const uint32_t slot_tile = first_slot(i) / KSORT_TILE_TOKENS;
        if (cache.layout.type == KSORT_F16)
            return tile_at(cache.pages, work.context, slot_tile, work.kv_head);
        return exact_tile_at(cache.exact, work.context, is_of_sinks(i) ? 0 : ring_tile(cache.exact, slot_tile),
                             work.kv_head);
    }
};

/* A warp's chunks of an exact split: from `first` on, every `stride`-th. */
template <uint32_t HEAD_DIM, uint32_t WARPS>
__device__ inline void attend_exact_chunks(const attend_job &job, const decode_work &work, const exact_chunks &chunks,
                                           uint32_t first, uint32_t stride, uint32_t lane,
                                           exact_query_smem<HEAD_DIM> &queries, uint8_t *k_smem,
                                           row_state<chunk_values<KSORT_F16, HEAD_DIM>::N_PRODUCTS> &state)
{
    using values = chunk_values<KSORT_F16, HEAD_DIM>;
    uint8_t *v_smem = k_smem + exact_shape<HEAD_DIM, WARPS>::chunk;
    const uint32_t k_address = (uint32_t)__cvta_generic_to_shared(k_smem);
    const uint32_t v_address = (uint32_t)__cvta_generic_to_shared(v_smem);
    auto fetch = [&](uint32_t i) {
        const uint32_t first_token = chunks.first_slot(i) % KSORT_TILE_TOKENS;
        fetch_rows<KSORT_F16, HEAD_DIM>(chunks.tile(job.k, work, i), first_token, lane, k_address);
        fetch_rows<KSORT_F16, HEAD_DIM>(chunks.tile(job.v, work, i), first_token, lane, v_address);
    };
    if (first < chunks.n_chunks)
        fetch(first);
    commit_copies();
    wait_for_kernel_before(); /* for queries: rows are older */
    load_exact_queries<HEAD_DIM>(job, work, threadIdx.x / WARP, lane, queries);
    __syncthreads();
    for (uint32_t i = first; i < chunks.n_chunks; i += stride) {
        wait_for_copies<0>();
        __syncwarp();
        float scores[8];
        score_exact_chunk<HEAD_DIM>(queries, k_smem, lane, scores);
        attend_scores<values>(job, chunks.slots(i), chunks.first_slot(i), 0, lane, v_smem, scores, state);
        __syncwarp(); /* all lanes are done with the chunk */
        if (i + stride < chunks.n_chunks)
            fetch(i + stride);
        commit_copies();
    }
}

/* A block of an exact split. All threads of it call this. */
template <uint32_t HEAD_DIM, uint32_t WARPS>
__device__ inline void attend_exact(const attend_job &job, const decode_work &work, uint32_t warp, uint32_t lane,
                                    uint8_t *shared)
{
    using values = chunk_values<KSORT_F16, HEAD_DIM>;
    using shape = exact_shape<HEAD_DIM, WARPS>;
    using joined_warps = joined_smem<HEAD_DIM, WARPS>;
    static_assert(sizeof(joined_warps) <= shape::shared_bytes - sizeof(exact_query_smem<HEAD_DIM>));
    exact_query_smem<HEAD_DIM> &queries = *reinterpret_cast<exact_query_smem<HEAD_DIM> *>(shared);
    uint8_t *rows = shared + sizeof queries;
    const exact_chunks chunks(work.sections);
    const uint32_t exact_split = work.split - (job.n_splits - job.n_exact_splits);
    if (exact_split * shape::warps >= chunks.n_chunks) {
        wait_for_kernel_before();
        write_empty_part(job, work);
        return;
    }
    row_state<values::N_PRODUCTS> state;
    const uint32_t first = warp < shape::warps ? exact_split * shape::warps + warp : chunks.n_chunks;
    attend_exact_chunks<HEAD_DIM, WARPS>(job, work, chunks, first, job.n_exact_splits * shape::warps, lane, queries,
                                         rows + warp % shape::warps * 2 * shape::chunk, state);
    __syncthreads(); /* rows make room */
    joined_warps &joined = *reinterpret_cast<joined_warps *>(rows);
    store_state<values, HEAD_DIM, WARPS>(state, warp, lane, joined);
    __syncthreads();
    write_partials<HEAD_DIM, WARPS>(job, work, joined);
}

#endif /* KSORT_CUDA_DECODE_EXACT_CUH */
