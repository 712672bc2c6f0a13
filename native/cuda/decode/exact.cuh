/* Exact rows of decode attention: chunks of 32 f16 rows of the tail and of the sinks, which the warps with the fewest
 * packed chunks, those at the end of the last splits, take before their packed ones. So the number of blocks is that
 * without exact rows, and so are waves of them.
 *
 *     exact chunks     tail 0 1 2 3 4 | sinks 5          rows of a chunk lie together, in one tile
 *     split            n-1, n-2, ... 0, n-1, ...         the last warp of each, then the last but one, ...
 *
 * Scores: S = Q K^T in f16, rows 0 to 7 of A the high parts of queries, rows 8 to 15 the low ones (common/exact.cuh),
 * so that one product has both. Column n of product i (0 .. 3) is token 8 (n / 2) + 2 i + n % 2: so a lane has the
 * scores of tokens 8j .. 8j+7, as decode/values.cuh needs their weights. Sums of values are made in the places that
 * packed values have them in, and are then scaled as those are, by powers of two.
 */
#ifndef KSORT_CUDA_DECODE_EXACT_CUH
#define KSORT_CUDA_DECODE_EXACT_CUH

#include "decode/state.cuh"

/* A warp's place in shared memory: its ring, or keys and values of an exact chunk, of which values lie where packed
 * chunks that are fetched meanwhile do not. Where all warps have no room for that, the last two have. */
template <uint32_t HEAD_DIM, uint32_t K_TYPE, uint32_t V_TYPE, uint32_t WARPS, uint32_t STAGES>
struct exact_shape {
    static constexpr uint32_t chunk = chunk_bytes(KSORT_F16, HEAD_DIM);
    static constexpr uint32_t ring = STAGES * stage_bytes(HEAD_DIM, K_TYPE, V_TYPE);
    static constexpr uint32_t ahead = (STAGES - 1) * stage_bytes(HEAD_DIM, K_TYPE, V_TYPE);
    static constexpr uint32_t values = chunk > ahead ? chunk : ahead; /* offset */
    static constexpr uint32_t more = values + chunk > ring ? values + chunk - ring : 0;
    static constexpr uint32_t warps = HEAD_DIM > 128 && WARPS > 2 ? 2 : WARPS;
    static constexpr uint32_t more_bytes = warps * more; /* of a block, beside the rings */

    /* From that of warp 0, where there are exact rows. */
    static __device__ uint32_t place(uint32_t warp)
    {
        return warp * ring + (warp > WARPS - warps ? warp - (WARPS - warps) : 0) * more;
    }
};

/* Exact queries of a warp as A: row lane / 4, of which a lane has channels 2j and 2j+1 of every eight. */
template <uint32_t HEAD_DIM>
struct exact_query {
    static constexpr uint32_t N_PIECES = HEAD_DIM / 8;
    float2 channels[N_PIECES];
    float factor; /* of the row's scores, in units of log2 */

    /* Asks for queries; rows beyond n_rows are zeros. */
    __device__ void load(const attend_job &job, const decode_work &work, uint32_t lane)
    {
        const uint32_t row = lane / 4;
        const size_t head = (size_t)work.context * job.n_heads + work.first_head + (row < work.n_rows ? row : 0);
        const float2 *q = reinterpret_cast<const float2 *>(job.exact_queries + head * HEAD_DIM) + lane % 4;
#pragma unroll
        for (uint32_t piece = 0; piece < N_PIECES; piece++)
            channels[piece] = row < work.n_rows ? q[4 * piece] : make_float2(0.0f, 0.0f);
    }

    /* Channels become two f16 parts, in the same registers. */
    __device__ void split(float softmax_scale)
    {
        constexpr float LOG2_E = 1.44269504f;
        uint32_t largest = 0;
#pragma unroll
        for (uint32_t piece = 0; piece < N_PIECES; piece++)
            largest = max(largest, max(__float_as_uint(channels[piece].x) & 0x7FFFFFFF,
                                       __float_as_uint(channels[piece].y) & 0x7FFFFFFF));
        largest = max(largest, __shfl_xor_sync(~0u, largest, 1));
        largest = max(largest, __shfl_xor_sync(~0u, largest, 2));
        const query_scale scale = query_scale_of(largest);
        factor = scale.factor * (softmax_scale * LOG2_E);
#pragma unroll
        for (uint32_t piece = 0; piece < N_PIECES; piece++) {
            const query_parts x = parts_of_query(channels[piece].x, scale),
                              y = parts_of_query(channels[piece].y, scale);
            const __half2 high = __halves2half2(x.high, y.high), low = __halves2half2(x.low, y.low);
            memcpy(&channels[piece].x, &high, sizeof high);
            memcpy(&channels[piece].y, &low, sizeof low);
        }
    }

    /* A of 16 channels; after split. */
    __device__ void fragment(uint32_t step, uint32_t (&a)[4]) const
    {
#pragma unroll
        for (uint32_t half = 0; half < 2; half++) {
            a[2 * half] = __float_as_uint(channels[2 * step + half].x);
            a[2 * half + 1] = __float_as_uint(channels[2 * step + half].y);
        }
    }
};

/* Scores of row lane / 4 and tokens 8j .. 8j+7, in units of log2. */
template <uint32_t HEAD_DIM>
__device__ inline void score_exact_chunk(const exact_query<HEAD_DIM> &query, const uint8_t *k_smem, uint32_t lane,
                                         float (&scores)[8])
{
    float sums[4][4] = {};
    const uint32_t row = lane % 8, token = row / 2 * 8 + row % 2 + lane / 16 * 2; /* of product 0 or 1 */
#pragma unroll
    for (uint32_t step = 0; step < HEAD_DIM / 16; step++) {
        uint32_t a[4];
        query.fragment(step, a);
#pragma unroll
        for (uint32_t i = 0; i < 4; i += 2) {
            uint32_t b[4];
            load_straight(k_smem + chunk_piece_offset<HEAD_DIM>(2 * step + lane / 8 % 2, token + 2 * i), b);
            mma_f16(sums[i], a, b[0], b[1]);
            mma_f16(sums[i + 1], a, b[2], b[3]);
        }
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        scores[i] = (sums[i / 2][i % 2] + sums[i / 2][i % 2 + 2]) * query.factor;
}

/* Exact values beside values of V_TYPE, whose products have the same channels. */
template <uint32_t V_TYPE, uint32_t HEAD_DIM>
struct exact_values : chunk_values<KSORT_F16, HEAD_DIM> {
    using packed = chunk_values<V_TYPE, HEAD_DIM>;
    using rows = chunk_values<KSORT_F16, HEAD_DIM>;
    static constexpr uint32_t N_PRODUCTS = packed::N_PRODUCTS;

    static __device__ void accumulate(uint32_t, const uint8_t *chunk_smem, uint32_t lane,
                                      const weight_fragments &weights, float (&sums)[N_PRODUCTS][4])
    {
        if constexpr (V_TYPE == KSORT_F16) {
            rows::accumulate(0, chunk_smem, lane, weights, sums);
        } else {
#pragma unroll
            for (uint32_t set = 0; set < packed::N_SETS; set++)
#pragma unroll
                for (uint32_t s = 0; s < 2; s++)
                    add_column(chunk_smem, min(lane / 4 + 8 * set, packed::N_COLUMNS - 1), lane % 4 * 8 + 4 * s,
                               weights.a[s], &sums[packed::CHANNELS * set]);
        }
    }

    /* Channels of a column of values, of tokens `token` .. + 3. */
    static __device__ void add_column(const uint8_t *chunk_smem, uint32_t column, uint32_t token,
                                      const uint32_t (&weights)[4], float (*sums)[4])
    {
        constexpr uint32_t WORDS = packed::CHANNELS / 2;
        uint32_t words[4][WORDS];
#pragma unroll
        for (uint32_t t = 0; t < 4; t++) {
            const uint32_t channel = packed::CHANNELS * column;
            const uint8_t *piece = chunk_smem + chunk_piece_offset<HEAD_DIM>(channel / 8, token + t);
            memcpy(words[t], __builtin_assume_aligned(piece + channel % 8 * 2, 4 * WORDS), 4 * WORDS);
        }
#pragma unroll
        for (uint32_t i = 0; i < packed::CHANNELS; i++) {
            const uint32_t half = i % 2 ? 0x7632 : 0x5410;
            mma_f16(sums[i], weights, __byte_perm(words[0][i / 2], words[1][i / 2], half),
                    __byte_perm(words[2][i / 2], words[3][i / 2], half));
        }
    }

    /* Sums become those of packed chunks. */
    static __device__ void rescale(row_state<N_PRODUCTS> &state)
    {
#pragma unroll
        for (uint32_t i = 0; i < N_PRODUCTS; i++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const float sum = state.values[i][c] + rows::LEFT_SCALE * state.values[i][c + 2];
                state.values[i][c] = sum * (1.0f / packed::OUT_SCALE);
                state.values[i][c + 2] = 0.0f;
            }
    }
};

/* The chunks of both sections, in one line; sinks, often few rows, come last. */
struct exact_chunks {
    slot_sections sections;
    uint32_t n_tail_chunks, n_chunks;

    __device__ explicit exact_chunks(const slot_sections &sections) : sections(sections)
    {
        n_tail_chunks = n_chunks_of(sections.tail_begin, sections.end);
        n_chunks = n_tail_chunks + n_chunks_of(sections.first, sections.sinks_end);
    }

    /* Whether any warp of a split has one. */
    __device__ bool reach(const attend_job &job, uint32_t split) const { return job.n_splits - 1 - split < n_chunks; }

    __device__ static uint32_t n_chunks_of(uint32_t begin, uint32_t end)
    {
        return begin < end ? (end + CHUNK_TOKENS - 1) / CHUNK_TOKENS - begin / CHUNK_TOKENS : 0;
    }

    __device__ bool is_of_sinks(uint32_t i) const { return i >= n_tail_chunks; }

    /* Those of the chunk's section that the query sees. */
    __device__ slot_span slots(uint32_t i) const
    {
        return is_of_sinks(i) ? slot_span{sections.first, sections.sinks_end, false}
                              : slot_span{sections.tail_begin, sections.end, false};
    }

    __device__ uint32_t first_slot(uint32_t i) const
    {
        const uint32_t chunk = slots(i).begin / CHUNK_TOKENS + (is_of_sinks(i) ? i - n_tail_chunks : i);
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

/* A warp's exact chunks. All lanes call its functions. */
template <uint32_t HEAD_DIM, uint32_t K_TYPE, uint32_t V_TYPE, uint32_t WARPS, uint32_t STAGES>
struct exact_list {
    using shape = exact_shape<HEAD_DIM, K_TYPE, V_TYPE, WARPS, STAGES>;
    using values = exact_values<V_TYPE, HEAD_DIM>;
    exact_chunks chunks;
    uint32_t first, stride, end; /* chunk first, first + stride, ... */
    uint8_t *k_smem, *v_smem;

    __device__ exact_list(const attend_job &job, const decode_work &work, const exact_chunks &chunks, uint32_t warp,
                          uint8_t *warp_smem)
        : chunks(chunks), k_smem(warp_smem), v_smem(warp_smem + shape::values)
    {
        const uint32_t place = WARPS - 1 - warp;
        first = place * job.n_splits + job.n_splits - 1 - work.split;
        stride = job.n_splits * shape::warps;
        end = place < shape::warps ? chunks.n_chunks : 0;
    }

    __device__ bool is_empty() const { return first >= end; }

    /* Rows that the query sees; hide_slots makes zeros of other values. */
    __device__ void fetch_rows(const uint8_t *tile_gmem, uint32_t i, uint32_t lane, uint8_t *chunk_smem) const
    {
        constexpr uint32_t IN_ROW = HEAD_DIM / 8;
        const slot_span slots = chunks.slots(i);
        const uint32_t slot = chunks.first_slot(i), to_smem = (uint32_t)__cvta_generic_to_shared(chunk_smem);
        const uint8_t *rows_gmem = tile_gmem + (slot % KSORT_TILE_TOKENS * IN_ROW + lane) * 16;
#pragma unroll
        for (uint32_t at = 0; at < CHUNK_TOKENS * IN_ROW; at += WARP) {
            const uint32_t token = (at + lane) / IN_ROW;
            if (slot + token >= slots.begin && slot + token < slots.end)
                copy_16_async(to_smem + chunk_piece_offset<HEAD_DIM>((at + lane) % IN_ROW, token), rows_gmem + 16 * at);
        }
    }

    /* Asks for a chunk. */
    __device__ void fetch(const attend_job &job, const decode_work &work, uint32_t i, uint32_t lane) const
    {
        fetch_rows(chunks.tile(job.k, work, i), i, lane, k_smem);
        fetch_rows(chunks.tile(job.v, work, i), i, lane, v_smem);
        commit_copies();
    }

    /* Adds all chunks, of which the first has been asked for, to a fresh state. fetch_packed() may write where the keys
     * are, and begins as soon as they have been read. */
    template <typename FETCH_PACKED>
    __device__ void attend(const attend_job &job, const decode_work &work, exact_query<HEAD_DIM> &query, uint32_t lane,
                           row_state<values::N_PRODUCTS> &state, FETCH_PACKED fetch_packed) const
    {
        query.split(job.scale);
        for (uint32_t i = first; i < end; i += stride) {
            float scores[8];
            wait_for_copies<0>();
            __syncwarp();
            score_exact_chunk<HEAD_DIM>(query, k_smem, lane, scores);
            __syncwarp(); /* all lanes are done with keys */
            if (i + stride >= end)
                fetch_packed();
            attend_scores<values>(job, chunks.slots(i), chunks.first_slot(i), 0, lane, v_smem, scores, state);
            __syncwarp();
            if (i + stride < end)
                fetch(job, work, i + stride, lane);
        }
        values::rescale(state);
    }
};

#endif /* KSORT_CUDA_DECODE_EXACT_CUH */
