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

#include "pack_strip.cuh"

constexpr int UNIT = 16;         /* channels of a thread: two chunks; no block has fewer */
constexpr int HEADS_AT_ONCE = 2; /* teams of a thread block */

template <int HEAD_DIM>
struct nearest_shape {
    static constexpr int TEAM = strip_shape<HEAD_DIM>::THREADS / HEADS_AT_ONCE;
    static constexpr int UNITS = HEAD_DIM / UNIT;
    static constexpr int ROUNDS = HEAD_DIM <= 128 ? 2 : 1;
    static constexpr int HEADS = HEADS_AT_ONCE * ROUNDS; /* of a thread block, at most */
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
constexpr size_t nearest_smem_bytes(uint32_t x_type)
{
    return sizeof(nearest_smem<HEAD_DIM>) +
           (size_t)nearest_shape<HEAD_DIM>::HEADS * STRIP_TOKENS * row_stride_of<HEAD_DIM>(x_type);
}

/* RoPE of one channel in a word: bits 0 to 14 the partner, 16 to 31 the frequency, bit 15 whether the partner is
 * subtracted. A channel that is not turned is turned with itself by the angle `no_turn`, (1, 0): which gives itself. */
__device__ inline uint32_t packed_turn(const ksort_rope &rope, size_t at, uint32_t channel, uint32_t no_turn)
{
    const int sign = rope.sign[at];
    return sign == 0 ? channel | no_turn << 16
                     : rope.partner[at] | (uint32_t)rope.frequency[at] << 16 | (sign < 0 ? 1u << 15 : 0u);
}

/* The eight elements of x from `at`, which is a multiple of eight. */
__device__ inline void load_chunk(const void *x, uint32_t type, size_t at, float (&y)[CHUNK])
{
    if (type == KSORT_F32) {
        const float4 *from = reinterpret_cast<const float4 *>(static_cast<const float *>(x) + at);
        float4 low = from[0], high = from[1];
        y[0] = low.x, y[1] = low.y, y[2] = low.z, y[3] = low.w;
        y[4] = high.x, y[5] = high.y, y[6] = high.z, y[7] = high.w;
        return;
    }
    uint4 raw = *reinterpret_cast<const uint4 *>(static_cast<const uint16_t *>(x) + at);
    const uint32_t pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (type == KSORT_F16) {
            y[2 * i] = __half2float(__ushort_as_half((uint16_t)pairs[i]));
            y[2 * i + 1] = __half2float(__ushort_as_half((uint16_t)(pairs[i] >> 16)));
        } else {
            y[2 * i] = bits_float(pairs[i] << 16);
            y[2 * i + 1] = bits_float(pairs[i] & 0xFFFF0000u);
        }
    }
}

/* RoPE of channels first .. first + 7 of a row of x; angle(f) is cos and sin of frequency f. */
template <uint32_t X_TYPE, class Angle>
__device__ inline void rope_chunk(const uint8_t *row, const uint32_t *turns, uint32_t first, Angle angle,
                                  float (&y)[CHUNK])
{
    const uint4 *from = reinterpret_cast<const uint4 *>(turns + first);
    const uint4 low = from[0], high = from[1];
    const uint32_t words[CHUNK] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int j = 0; j < CHUNK; j++) {
        const float partner = load_float(row, X_TYPE, words[j] & 0x7FFFu);
        const float turned = bits_float(float_bits(partner) ^ (words[j] << 16 & 1u << 31));
        const float2 at = angle(words[j] >> 16);
        y[j] = __fadd_rn(__fmul_rn(y[j], at.x), __fmul_rn(turned, at.y));
    }
}

/* Four mantissas, in their bytes. */
__device__ inline uint32_t quad_of(const uint32_t (&mantissas)[4])
{
    uint32_t low = __byte_perm(mantissas[0], mantissas[1], 0x0040);
    uint32_t high = __byte_perm(mantissas[2], mantissas[3], 0x0040);
    return __byte_perm(low, high, 0x5410);
}

/* A chunk of a float row. */
__device__ inline void store_float_chunk(uint8_t *row, uint32_t type, uint32_t chunk, const float (&y)[CHUNK])
{
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t low, high;
        if (type == KSORT_F16) {
            low = __half_as_ushort(__float2half_rn(y[2 * i]));
            high = __half_as_ushort(__float2half_rn(y[2 * i + 1]));
        } else {
            low = __bfloat16_as_ushort(__float2bfloat16_rn(y[2 * i]));
            high = __bfloat16_as_ushort(__float2bfloat16_rn(y[2 * i + 1]));
        }
        pairs[i] = low | high << 16;
    }
    reinterpret_cast<uint4 *>(row)[chunk] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

/* The strip's heads first_head .. end_head - 1 of a thread block, in rounds. */
template <int HEAD_DIM, uint32_t X_TYPE>
struct nearest_packer {
    using shape = nearest_shape<HEAD_DIM>;
    static constexpr uint32_t ROW_STRIDE = row_stride_of<HEAD_DIM>(X_TYPE);

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

    /* Asks for one round's rows of x. */
    __device__ void request_rows(uint32_t round) const
    {
        constexpr uint32_t CHUNKS = HEAD_DIM * element_bytes_of(X_TYPE) / 16; /* of 16 bytes */
        const uint8_t *x = static_cast<const uint8_t *>(side.x);
        for (uint32_t i = threadIdx.x; i < HEADS_AT_ONCE * STRIP_TOKENS * CHUNKS; i += strip_shape<HEAD_DIM>::THREADS) {
            const uint32_t s = i / CHUNKS % STRIP_TOKENS;
            const uint32_t of_block = round * HEADS_AT_ONCE + i / (CHUNKS * STRIP_TOKENS);
            if (strip.is_new(s) && first_head + of_block < end_head)
                __pipeline_memcpy_async(row_of(of_block, s) + i % CHUNKS * 16,
                                        x + head_at<HEAD_DIM>(work, strip, first_head + of_block, s) *
                                                element_bytes_of(X_TYPE) + i % CHUNKS * 16,
                                        16);
        }
        __pipeline_commit();
    }

    /* Asks for cos and sin of the strip's new positions that have them. */
    __device__ void request_angles() const
    {
        constexpr uint32_t THREADS_A_TOKEN = strip_shape<HEAD_DIM>::THREADS / STRIP_TOKENS;
        const uint32_t s = threadIdx.x / THREADS_A_TOKEN, n = work.rope.n_frequencies;
        if (!strip.is_new(s) || strip.first_slot + s >= work.tokens.n_positions)
            return;
        const size_t row = (size_t)(strip.first_slot + s) * n;
        for (uint32_t f = threadIdx.x % THREADS_A_TOKEN; f < n; f += THREADS_A_TOKEN) {
            __pipeline_memcpy_async(&smem.angles[s][f].x, &work.rope.cos[row + f], sizeof(float));
            __pipeline_memcpy_async(&smem.angles[s][f].y, &work.rope.sin[row + f], sizeof(float));
        }
        if (threadIdx.x % THREADS_A_TOKEN == 0)
            smem.angles[s][HEAD_DIM / 2] = make_float2(1.0f, 0.0f);
    }

    __device__ void load_turns() const
    {
        const uint32_t n_channels = (end_head - first_head) * HEAD_DIM;
        for (uint32_t c = threadIdx.x; c < n_channels; c += strip_shape<HEAD_DIM>::THREADS)
            smem.turns[0][c] = packed_turn(work.rope, (size_t)first_head * HEAD_DIM + c, c % HEAD_DIM,
                                           has_staged_angles() ? HEAD_DIM / 2 : work.rope.n_frequencies);
    }

    /* A thread's channels of its token, from rows and turned. */
    __device__ void load_values(uint32_t of_block, uint32_t s, const uint32_t (&first)[2], float (&y)[2][CHUNK]) const
    {
        const uint8_t *row = row_of(of_block, s);
        const float2 *angles = smem.angles[s];
        const float *cosines = work.rope.cos + (size_t)(strip.first_slot + s) * work.rope.n_frequencies;
        const float *sines = work.rope.sin + (size_t)(strip.first_slot + s) * work.rope.n_frequencies;
        const uint32_t no_turn = work.rope.n_frequencies;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            load_chunk(row, X_TYPE, first[i], y[i]);
            if (!side.has_rope)
                continue;
            if (has_staged_angles())
                rope_chunk<X_TYPE>(row, smem.turns[of_block], first[i], [=](uint32_t f) { return angles[f]; }, y[i]);
            else
                rope_chunk<X_TYPE>(
                    row, smem.turns[of_block], first[i],
                    [=](uint32_t f) {
                        return f == no_turn ? make_float2(1.0f, 0.0f) : make_float2(cosines[f], sines[f]);
                    },
                    y[i]);
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
        const uint32_t units_a_block = layout.block_size / UNIT, block = unit / units_a_block;
        uint32_t largest = 0;
        for (uint32_t u = block * units_a_block; u < min((block + 1) * units_a_block, (uint32_t)shape::UNITS); u++)
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
        if (unit % units_a_block == 0)
            tile[exponent_offset(&layout, block, strip.first_token + s)] = (uint8_t)exponent;
    }

    /* One round: a head of each team. */
    __device__ void pack_round(uint32_t round) const
    {
        const uint32_t team = threadIdx.x / shape::TEAM, i = threadIdx.x % shape::TEAM;
        const uint32_t of_block = round * HEADS_AT_ONCE + team, head = first_head + of_block;
        const bool bfp = is_bfp(side.cache.layout.type);
        /* Threads beside each other: tokens of a strip's words, or chunks of a float row. */
        const uint32_t s = bfp ? i % STRIP_TOKENS : i / shape::UNITS % STRIP_TOKENS;
        const uint32_t unit = bfp ? i / STRIP_TOKENS : i % shape::UNITS;
        const uint32_t first[2] = {bfp ? unit * UNIT : unit * CHUNK,
                                   bfp ? unit * UNIT + CHUNK : (unit + shape::UNITS) * CHUNK};
        const bool wanted = i < STRIP_TOKENS * shape::UNITS && head < end_head && is_wanted(work, strip, s);
        float y[2][CHUNK];
        if (wanted) {
            load_values(of_block, s, first, y);
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
        if (bfp) {
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
        for (uint32_t round = 0; round < shape::ROUNDS; round++)
            request_rows(round); /* those past the last round are empty */
        if (side.has_rope)
            load_turns();
        for (uint32_t round = 0; round < n_rounds; round++) {
            if (round + 1 < shape::ROUNDS)
                __pipeline_wait_prior(1);
            else
                __pipeline_wait_prior(0);
            __syncthreads();
            pack_round(round);
        }
    }
};

/* Rounds `heads_a_block` heads of a strip by nearest rounding; `index` counts (strip, group of heads). */
template <int HEAD_DIM, uint32_t X_TYPE>
__device__ inline void pack_nearest(const pack_work &work, const pack_side &side, uint32_t index, uint8_t *shared)
{
    const uint32_t n_groups = (work.n_kv_heads + work.heads_a_block - 1) / work.heads_a_block;
    strip_place strip;
    if (!find_strip(work, side, index / n_groups, 0, strip))
        return;
    const uint32_t first_head = index % n_groups * work.heads_a_block;
    nearest_smem<HEAD_DIM> &smem = *reinterpret_cast<nearest_smem<HEAD_DIM> *>(shared);
    const nearest_packer<HEAD_DIM, X_TYPE> packer = {
        work, side, strip, smem, shared + sizeof smem,
        first_head, min(first_head + work.heads_a_block, work.n_kv_heads)};
    packer.pack();
}

#endif /* KSORT_PACK_NEAREST_CUH */
