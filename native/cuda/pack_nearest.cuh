/* Nearest rounding of a strip: a thread holds UNIT channels of one token, for BFP so that the lanes of half a warp are
 * the strip's 16 tokens: their words and exponents are neighbours in the tile, and what the channels of a block share,
 * partners in RoPE and frequencies, is the same for all lanes.
 *
 *     x of the strip's tokens, HEADS heads   --cp.async--> rows [head][16][head_dim]   all asked for at once
 *     cos, sin of the strip's positions      --cp.async--> angles [16][frequencies]    shared by the heads
 *     partner, sign, frequency of the heads  ------------> turns [head][head_dim]
 *     rounds of HEADS_AT_ONCE heads, a team of threads each: turn, agree on maxima, round, store
 */
#ifndef KSORT_PACK_NEAREST_CUH
#define KSORT_PACK_NEAREST_CUH

#include <cuda_pipeline.h>

#include "pack_chunks.cuh"

constexpr int UNIT = 16;         /* channels of a thread: two chunks; no block has fewer */
constexpr int HEADS_AT_ONCE = 2; /* teams of a thread block */

template <int HEAD_DIM>
struct nearest_shape {
    static constexpr int TEAM = strip_shape<HEAD_DIM>::THREADS / HEADS_AT_ONCE;
    static constexpr int UNITS = HEAD_DIM / UNIT;
    static constexpr int HEADS = HEAD_DIM <= 128 ? 8 : 4; /* of a thread block, at most */
    static_assert(UNITS * STRIP_TOKENS <= TEAM, "a thread a unit");
};

/* Rows of x follow it, see row_stride_of. */
template <int HEAD_DIM>
struct nearest_smem {
    /* cos and sin; the last is of no turn. Rows of odd length: the same frequency of 16 tokens fills all banks. */
    float2 angles[STRIP_TOKENS][HEAD_DIM / 2 + 1];
    alignas(16) uint32_t turns[nearest_shape<HEAD_DIM>::HEADS][HEAD_DIM]; /* see packed_turn */
    uint32_t maxima[HEADS_AT_ONCE][nearest_shape<HEAD_DIM>::UNITS][STRIP_TOKENS];
    alignas(16) bool is_refused[nearest_shape<HEAD_DIM>::HEADS][STRIP_TOKENS];
};

__host__ __device__ constexpr uint32_t element_bytes_of(uint32_t x_type)
{
    return x_type == KSORT_F32 ? 4 : 2;
}

/* Bytes from one token's row of x to the next: 16 more than it has, so that chunks of eight tokens fill all banks. */
template <int HEAD_DIM>
__host__ __device__ constexpr uint32_t row_stride_of(uint32_t x_type)
{
    return HEAD_DIM * element_bytes_of(x_type) + 16;
}

template <int HEAD_DIM>
constexpr size_t nearest_smem_bytes(uint32_t x_type, uint32_t heads_a_block)
{
    return sizeof(nearest_smem<HEAD_DIM>) + (size_t)heads_a_block * STRIP_TOKENS * row_stride_of<HEAD_DIM>(x_type);
}

/* A thread's part of every head that its team takes: two chunks, from channels first[0] and first[1], of the strip's
 * token s. */
struct nearest_part {
    uint32_t s, unit;
    uint32_t first[2];
    bool wanted;
};

/* The strip's heads first_head .. end_head - 1 of a thread block, in rounds. */
template <int HEAD_DIM, uint32_t X_TYPE>
struct nearest_packer {
    using shape = nearest_shape<HEAD_DIM>;
    static constexpr uint32_t ROW_STRIDE = row_stride_of<HEAD_DIM>(X_TYPE);
    static constexpr uint32_t LANES = strip_shape<HEAD_DIM>::LANES;

    const pack_work &work;
    const pack_side &side;
    const strip_place &strip; /* its tile is that of KV head 0 */
    nearest_smem<HEAD_DIM> &smem;
    uint8_t *rows;
    uint32_t first_head, end_head;

    __device__ bool has_staged_angles() const
    {
        return work.rope.n_frequencies <= HEAD_DIM / 2;
    }

    __device__ uint8_t *row_of(uint32_t head_of_block, uint32_t s) const
    {
        return rows + (head_of_block * STRIP_TOKENS + s) * ROW_STRIDE;
    }

    /* Asks for one round's rows of x: LANES threads a token. */
    __device__ void request_rows(uint32_t round) const
    {
        constexpr uint32_t ELEMENT = element_bytes_of(X_TYPE), CHUNKS = HEAD_DIM * ELEMENT / 16; /* of 16 bytes */
        const uint32_t s = threadIdx.x / LANES, of_block = round * HEADS_AT_ONCE;
        if (strip.is_new(s)) {
            const uint8_t *x = static_cast<const uint8_t *>(side.x) +
                               head_at<HEAD_DIM>(work, strip, first_head + of_block, s) * ELEMENT;
            uint8_t *row = row_of(of_block, s);
#pragma unroll
            for (uint32_t h = 0; h < HEADS_AT_ONCE; h++)
#pragma unroll
                for (uint32_t at = 0; at < CHUNKS; at += LANES) {
                    const uint32_t chunk = at + threadIdx.x % LANES;
                    if (chunk < CHUNKS && first_head + of_block + h < end_head)
                        __pipeline_memcpy_async(row + h * STRIP_TOKENS * ROW_STRIDE + chunk * 16,
                                                x + h * HEAD_DIM * ELEMENT + chunk * 16, 16);
                }
        }
    }

    /* Asks for cos and sin of the strip's new positions that have them. */
    __device__ void request_angles() const
    {
        const uint32_t s = threadIdx.x / LANES, lane = threadIdx.x % LANES, n = work.rope.n_frequencies;
        if (!strip.is_new(s) || strip.first_slot + s >= work.tokens.n_positions)
            return;
        const size_t row = (size_t)(strip.first_slot + s) * n;
        const float *cosines = work.rope.cos + row, *sines = work.rope.sin + row;
#pragma unroll
        for (uint32_t at = 0; at < HEAD_DIM / 2; at += LANES)
            if (at + lane < n) {
                __pipeline_memcpy_async(&smem.angles[s][at + lane].x, &cosines[at + lane], sizeof(float));
                __pipeline_memcpy_async(&smem.angles[s][at + lane].y, &sines[at + lane], sizeof(float));
            }
        if (lane == 0)
            smem.angles[s][HEAD_DIM / 2] = make_float2(1.0f, 0.0f);
    }

    __device__ void load_turns() const
    {
        const uint32_t no_turn = has_staged_angles() ? HEAD_DIM / 2 : work.rope.n_frequencies;
#pragma unroll
        for (uint32_t at = 0; at < shape::HEADS * HEAD_DIM; at += strip_shape<HEAD_DIM>::THREADS) {
            const uint32_t c = at + threadIdx.x;
            if (c < (end_head - first_head) * HEAD_DIM)
                smem.turns[0][c] = packed_turn(work.rope, (size_t)first_head * HEAD_DIM + c, c % HEAD_DIM, no_turn);
        }
    }

    /* Threads beside each other: tokens of a strip's words, or chunks of a float row. */
    __device__ nearest_part part_of_thread() const
    {
        const bool bfp = is_bfp(side.cache.layout.type);
        const uint32_t i = threadIdx.x % shape::TEAM;
        const uint32_t s = bfp ? i % STRIP_TOKENS : i / shape::UNITS % STRIP_TOKENS;
        const uint32_t unit = bfp ? i / STRIP_TOKENS : i % shape::UNITS;
        return {s, unit,
                {bfp ? unit * UNIT : unit * CHUNK, bfp ? unit * UNIT + CHUNK : (unit + shape::UNITS) * CHUNK},
                i < STRIP_TOKENS * shape::UNITS && is_wanted(work, strip, s)};
    }

    /* A thread's channels of its token, from rows and turned. */
    __device__ void load_values(uint32_t of_block, const nearest_part &part, float (&y)[2][CHUNK]) const
    {
        const uint8_t *row = row_of(of_block, part.s);
        const uint32_t *turns = smem.turns[of_block], no_turn = work.rope.n_frequencies;
        const float2 *angles = smem.angles[part.s];
        const size_t table_row = (size_t)(strip.first_slot + part.s) * work.rope.n_frequencies;
        const float *cosines = work.rope.cos + table_row, *sines = work.rope.sin + table_row;
        const auto staged_angle = [=](uint32_t f) { return angles[f]; };
        const auto table_angle = [=](uint32_t f) {
            return f == no_turn ? make_float2(1.0f, 0.0f) : make_float2(cosines[f], sines[f]);
        };
#pragma unroll
        for (int i = 0; i < 2; i++) {
            load_chunk(row, X_TYPE, part.first[i], y[i]);
            if (side.has_rope && has_staged_angles())
                rope_chunk<X_TYPE>(row, turns, part.first[i], staged_angle, y[i]);
            else if (side.has_rope)
                rope_chunk<X_TYPE>(row, turns, part.first[i], table_angle, y[i]);
        }
    }

    /* Tells why a head is refused: x itself, or what RoPE or the type makes of it. */
    __device__ void tell_refusal(const uint8_t *row) const
    {
        bool finite = true;
        for (uint32_t c = 0; c < HEAD_DIM; c++)
            finite = finite && magnitude_bits(load_float(row, X_TYPE, c)) < FLOAT_MAGNITUDE_INF;
        tell(work.tokens, finite ? KSORT_ERR_RANGE : KSORT_ERR_NON_FINITE);
    }

    /* Rounds and stores a thread's unit of a BFP head. */
    __device__ void store_unit(uint8_t *tile, uint32_t s, uint32_t unit,
                               const uint32_t (&maxima)[nearest_shape<HEAD_DIM>::UNITS][STRIP_TOKENS],
                               const float (&y)[2][CHUNK]) const
    {
        const head_layout &layout = side.cache.layout;
        /* The block's units differ in the lower bits of their numbers; head_dim 80 and 96 may end within a block. */
        const uint32_t in_block = layout.block_size / UNIT - 1;
        uint32_t largest = 0;
#pragma unroll 1
        for (uint32_t u = unit & ~in_block; u <= min(unit | in_block, (uint32_t)shape::UNITS - 1); u++)
            largest = max(largest, maxima[u][s]);
        const uint32_t exponent = largest >> 23;
        const struct step_inverse inverse = step_inverse_of(exponent, layout.mantissa_bits);
        const float limit = exponent == 0 ? 0.0f : (float)((1 << (layout.mantissa_bits - 1)) - 1);
        uint32_t quads[4];
#pragma unroll
        for (int q = 0; q < 4; q++) {
            uint32_t mantissas[4];
#pragma unroll
            for (int j = 0; j < 4; j++)
                mantissas[j] = mantissa_bits_of(units_of_step(y[q / 2][q % 2 * 4 + j], inverse), -limit, limit);
            quads[q] = quad_of(mantissas);
        }
        store_quads(layout, tile, strip.first_token + s, unit, quads);
        if ((unit & in_block) == 0) {
            const uint32_t block = unit >> (__ffs(in_block + 1) - 1);
            tile[exponent_offset(&layout, block, strip.first_token + s)] = (uint8_t)exponent;
        }
    }

    /* One round: a head of each team. */
    __device__ void pack_round(uint32_t round, const nearest_part &part) const
    {
        const uint32_t team = threadIdx.x / shape::TEAM, s = part.s, unit = part.unit;
        const uint32_t of_block = round * HEADS_AT_ONCE + team, head = first_head + of_block;
        const bool wanted = part.wanted && head < end_head;
        float y[2][CHUNK];
        if (wanted) {
            load_values(of_block, part, y);
            float largest = 0.0f;
#pragma unroll
            for (int j = 0; j < CHUNK; j++)
                largest = larger_magnitude(larger_magnitude(largest, y[0][j]), y[1][j]);
            smem.maxima[team][unit][s] = float_bits(largest);
            if (float_bits(largest) > largest_storable(side))
                smem.is_refused[of_block][s] = true;
        }
        __syncthreads();
        if (!wanted)
            return;
        if (smem.is_refused[of_block][s]) {
            if (unit == 0)
                tell_refusal(row_of(of_block, s));
            return;
        }
        uint8_t *tile = strip.tile + (size_t)head * side.cache.pages.head_stride;
        if (is_bfp(side.cache.layout.type)) {
            store_unit(tile, s, unit, smem.maxima[team], y);
        } else {
            uint8_t *row = tile + row_offset(&side.cache.layout, strip.first_token + s);
            store_float_chunk(row, side.cache.layout.type, unit, y[0]);
            store_float_chunk(row, side.cache.layout.type, unit + shape::UNITS, y[1]);
        }
    }

    __device__ void pack() const
    {
        for (uint32_t i = threadIdx.x; i < shape::HEADS * STRIP_TOKENS; i += strip_shape<HEAD_DIM>::THREADS)
            smem.is_refused[0][i] = false;
        if (side.has_rope && has_staged_angles())
            request_angles();
        const uint32_t n_rounds = (end_head - first_head + HEADS_AT_ONCE - 1) / HEADS_AT_ONCE;
        request_rows(0);
        __pipeline_commit();
        for (uint32_t round = 1; round < n_rounds; round++)
            request_rows(round);
        __pipeline_commit();
        if (side.has_rope)
            load_turns();
        const nearest_part part = part_of_thread();
#pragma unroll 1
        for (uint32_t round = 0; round < n_rounds; round++) {
            if (round == 0)
                __pipeline_wait_prior(1);
            else
                __pipeline_wait_prior(0);
            __syncthreads();
            pack_round(round, part);
        }
    }
};

/* Rounds the strip of a group of heads by nearest rounding. */
template <int HEAD_DIM, uint32_t X_TYPE>
__device__ inline void pack_nearest(const pack_work &work, const pack_side &side, uint32_t strip_index, uint8_t *shared)
{
    const uint32_t first_head = blockIdx.y * work.heads_a_block;
    strip_place strip;
    if (first_head >= work.n_kv_heads || !find_strip(work, side, strip_index, 0, strip))
        return;
    nearest_smem<HEAD_DIM> &smem = *reinterpret_cast<nearest_smem<HEAD_DIM> *>(shared);
    const nearest_packer<HEAD_DIM, X_TYPE> packer = {
        work, side, strip, smem, shared + sizeof smem,
        first_head, min(first_head + work.heads_a_block, work.n_kv_heads)};
    packer.pack();
}

#endif /* KSORT_PACK_NEAREST_CUH */
