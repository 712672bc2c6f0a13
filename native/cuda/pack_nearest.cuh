/* Nearest rounding of a strip of a few heads: a lane holds a chunk of channels of TOKENS neighbouring tokens, which
 * share partners and frequencies, and whose words are 16 neighbouring bytes of the tile. A team of threads is a head's
 * strip:
 *
 *     lane = chunk    0 1 2 ...            x --cp.async--> rows [head][16][head_dim]             all asked for at once
 *     tokens  0..3    t t t ...            cos, sin of the strip's positions --cp.async--> angles   shared by the teams
 *             4..7    t t t ...            token after token: turn, agree on maxima, round
 *             8..11   t t t ...            words and exponents of four tokens --16- and 4-byte stores--> tile
 *            12..15   t t t ...
 */
#ifndef KSORT_PACK_NEAREST_CUH
#define KSORT_PACK_NEAREST_CUH

#include "pack_chunks.cuh"
#include "pack_strip.cuh"

constexpr int TOKENS = 4; /* of a lane */

template <int HEAD_DIM>
struct nearest_shape {
    static constexpr int LANES = CHUNK_LANES<HEAD_DIM>;
    static constexpr int TEAM = STRIP_TOKENS / TOKENS * LANES;
    static constexpr int HEADS = strip_shape<HEAD_DIM>::THREADS / TEAM; /* of a thread block */
    /* Angles of a token: one unused after every eight, so that lanes whose frequencies are eight apart meet different
     * banks; the last is of no turn. */
    static constexpr int NO_TURN = HEAD_DIM / 2 + HEAD_DIM / 16;
    static constexpr int ANGLES = NO_TURN + 1;
};

/* Rows of x follow it: [HEADS][STRIP_TOKENS] of ROW_STRIDE bytes. */
template <int HEAD_DIM>
struct nearest_smem {
    alignas(16) float2 angles[STRIP_TOKENS][nearest_shape<HEAD_DIM>::ANGLES]; /* cos and sin */
    alignas(16) uint32_t turns[nearest_shape<HEAD_DIM>::HEADS * HEAD_DIM];    /* see packed_turn */
};

template <int HEAD_DIM, uint32_t X_TYPE>
constexpr size_t nearest_smem_bytes()
{
    return sizeof(nearest_smem<HEAD_DIM>) +
           (size_t)nearest_shape<HEAD_DIM>::HEADS * STRIP_TOKENS * ROW_STRIDE<HEAD_DIM, X_TYPE>;
}

__device__ inline uint32_t angle_index(uint32_t frequency)
{
    return frequency + frequency / 8;
}

/* What a lane's chunk of TOKENS tokens has become. */
struct rounded_chunk {
    uint32_t words[2][TOKENS]; /* as store_words has them */
    uint32_t exponents;        /* a byte a token */
    uint32_t stored;           /* a bit a token */
};

/* to[t] = words[t] of the tokens that are stored; `to` is aligned to 16 bytes. */
__device__ inline void store_tokens(uint32_t *to, const uint32_t (&words)[TOKENS], uint32_t stored)
{
    if (stored == (1 << TOKENS) - 1) {
        *reinterpret_cast<uint4 *>(to) = make_uint4(words[0], words[1], words[2], words[3]);
        return;
    }
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
        if (stored >> t & 1)
            to[t] = words[t];
}

/* A lane's share of a head's strip. STAGED: angles come through shared memory, HEAD_DIM / 2 of them at most. */
template <int HEAD_DIM, uint32_t X_TYPE, bool STAGED>
struct nearest_packer {
    using shape = nearest_shape<HEAD_DIM>;
    static constexpr uint32_t STRIDE = ROW_STRIDE<HEAD_DIM, X_TYPE>;

    const pack_work &work;
    const pack_side &side;
    const strip_place &strip; /* its tile is that of KV head 0 */
    nearest_smem<HEAD_DIM> &smem;
    uint8_t *rows; /* of the lane's tokens */
    uint32_t head, chunk, first; /* first: of the lane's tokens, in the strip */

    __device__ bool exists() const
    {
        return head < work.n_kv_heads && chunk * CHUNK < HEAD_DIM;
    }

    /* A bit for each of the lane's tokens that is to be packed; positions without RoPE rows are told. */
    __device__ uint32_t wanted_tokens() const
    {
        const uint32_t n_positions = work.rope.partner ? work.tokens.n_positions : UINT32_MAX;
        uint32_t is_new = 0, has_position = 0;
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            is_new |= exists() && strip.is_new(first + t) ? 1 << t : 0;
            has_position |= strip.first_slot + first + t < n_positions ? 1 << t : 0;
        }
        if (is_new & ~has_position)
            tell(work.tokens, KSORT_ERR_ROPE);
        return is_new & has_position;
    }

    /* Asks for cos and sin of the strip's new positions that have them. */
    __device__ void request_angles() const
    {
        constexpr uint32_t LANES = strip_shape<HEAD_DIM>::LANES; /* a token */
        const uint32_t s = threadIdx.x / LANES, lane = threadIdx.x % LANES, n = work.rope.n_frequencies;
        if (!strip.is_new(s) || strip.first_slot + s >= work.tokens.n_positions)
            return;
        const size_t row = (size_t)(strip.first_slot + s) * n;
        const float *cosines = work.rope.cos + row, *sines = work.rope.sin + row;
#pragma unroll
        for (uint32_t at = 0; at < HEAD_DIM / 2; at += LANES)
            if (at + lane < n) {
                float2 &angle = smem.angles[s][angle_index(at + lane)];
                __pipeline_memcpy_async(&angle.x, &cosines[at + lane], sizeof(float));
                __pipeline_memcpy_async(&angle.y, &sines[at + lane], sizeof(float));
            }
        if (lane == 0)
            smem.angles[s][shape::NO_TURN] = make_float2(1.0f, 0.0f);
    }

    /* RoPE of a channel in a word: bits 0 to 14 the partner's place in its row in bytes, bit 15 whether it is
     * subtracted, 16 to 31 the place of a staged angle in bytes, or the frequency. A channel that is not turned is its
     * own partner, and its angle is that of NO_TURN, (1, 0). */
    __device__ uint32_t packed_turn(size_t at, uint32_t channel) const
    {
        const int sign = work.rope.sign[at];
        const uint32_t partner = work.rope.partner[at], frequency = work.rope.frequency[at];
        const uint32_t index = !STAGED ? frequency : (sign ? angle_index(frequency) : shape::NO_TURN) * sizeof(float2);
        return (sign ? partner : channel) * ELEMENT_BYTES<X_TYPE> | (sign < 0 ? 1u << 15 : 0) | index << 16;
    }

    /* All threads: the turns of the block's heads. */
    __device__ void stage_turns() const
    {
        const uint32_t first_head = blockIdx.y * shape::HEADS;
        const uint32_t n = min(work.n_kv_heads - first_head, (uint32_t)shape::HEADS) * HEAD_DIM;
#pragma unroll
        for (uint32_t at = 0; at < shape::HEADS * HEAD_DIM; at += strip_shape<HEAD_DIM>::THREADS) {
            const uint32_t c = at + threadIdx.x;
            if (c < n)
                smem.turns[c] = packed_turn((size_t)first_head * HEAD_DIM + c, c % HEAD_DIM);
        }
    }

    __device__ void load_turns(uint32_t (&turns)[CHUNK]) const
    {
        const uint32_t of_block = head - blockIdx.y * shape::HEADS;
        const uint4 *from = reinterpret_cast<const uint4 *>(smem.turns + of_block * HEAD_DIM + chunk * CHUNK);
        const uint4 low = from[0], high = from[1];
        turns[0] = low.x, turns[1] = low.y, turns[2] = low.z, turns[3] = low.w;
        turns[4] = high.x, turns[5] = high.y, turns[6] = high.z, turns[7] = high.w;
    }

    /* cos, and sin with the partner's sign, of channel j of the chunk for the lane's t-th token. */
    __device__ float2 angle_of(int t, int j, uint32_t turn) const
    {
        float2 angle = make_float2(1.0f, 0.0f);
        if constexpr (STAGED) {
            const uint8_t *angles = reinterpret_cast<const uint8_t *>(smem.angles[first + t]);
            angle = *reinterpret_cast<const float2 *>(angles + (turn >> 16));
        } else if ((turn & 0x7FFFu) != (chunk * CHUNK + j) * ELEMENT_BYTES<X_TYPE>) {
            const size_t at = (size_t)(strip.first_slot + first + t) * work.rope.n_frequencies + (turn >> 16);
            angle = make_float2(work.rope.cos[at], work.rope.sin[at]);
        }
        angle.y = bits_float(float_bits(angle.y) ^ (turn << 16 & 1u << 31));
        return angle;
    }

    /* Tells why heads are refused, a bit a token: for x itself, or for what RoPE or the type makes of it. */
    __device__ void tell_refusals(uint32_t refused) const
    {
        for (; refused; refused &= refused - 1) {
            const size_t at = head_at<HEAD_DIM>(work, strip, head, first + __ffs(refused) - 1);
            bool finite = true;
#pragma unroll 1
            for (uint32_t c = 0; c < HEAD_DIM; c++)
                finite = finite && magnitude_bits(load_float(side.x, X_TYPE, at + c)) < FLOAT_MAGNITUDE_INF;
            tell(work.tokens, finite ? KSORT_ERR_RANGE : KSORT_ERR_NON_FINITE);
        }
    }

    /* Rounds a BFP chunk of the lane's t-th token. */
    __device__ void round(int t, uint32_t magnitude, float (&y)[CHUNK], rounded_chunk &rounded) const
    {
        const uint32_t bits = side.cache.layout.mantissa_bits;
        const uint32_t exponent = largest_of_block(magnitude, side.cache.layout.block_size / CHUNK) >> 23;
        uint32_t m[CHUNK];
        round_chunk(exponent, bits, (1 << (bits - 1)) - 1, y, m);
        const uint32_t low = quad_of(m[0], m[1], m[2], m[3]), high = quad_of(m[4], m[5], m[6], m[7]);
        rounded.exponents |= (exponent & 0xFF) << 8 * t;
        rounded.words[0][t] = bits == 8 ? low : nibbles(low, high);
        rounded.words[1][t] = bits == 8 ? high : 0;
        if (bits == 6) { /* two lanes' upper bits share a word */
            uint32_t upper = (low >> 4 & 0x03030303u) | (high >> 4 & 0x03030303u) << 2;
            rounded.words[1][t] = upper | __shfl_xor_sync(ALL_LANES, upper, 1) << 4; /* of even lanes */
        }
    }

    /* Stores a lane's words and exponents: BFP12 has a word a chunk, BFP16 two, BFP14 three words two chunks. */
    __device__ void store_words(uint8_t *tile, const rounded_chunk &rounded) const
    {
        const head_layout &layout = side.cache.layout;
        const uint32_t token = strip.first_token + first, bits = layout.mantissa_bits;
        const uint32_t word = bits == 4 ? chunk : bits == 8 ? 2 * chunk : chunk / 2 * 3 + chunk % 2;
        uint32_t *to = reinterpret_cast<uint32_t *>(tile + word_offset(&layout, word, token));
        store_tokens(to, rounded.words[0], rounded.stored);
        if (bits == 8)
            store_tokens(to + STRIP_TOKENS, rounded.words[1], rounded.stored);
        if (bits == 6 && chunk % 2 == 0)
            store_tokens(to + 2 * STRIP_TOKENS, rounded.words[1], rounded.stored);
        const uint32_t lanes_a_block = layout.block_size / CHUNK; /* a power of two, unknown to the compiler */
        if (chunk & (lanes_a_block - 1))
            return;
        uint8_t *exponents = tile + exponent_offset(&layout, chunk >> (__ffs(lanes_a_block) - 1), token);
        if (rounded.stored == (1 << TOKENS) - 1) {
            *reinterpret_cast<uint32_t *>(exponents) = rounded.exponents;
            return;
        }
#pragma unroll
        for (int t = 0; t < TOKENS; t++)
            if (rounded.stored >> t & 1)
                exponents[t] = (uint8_t)(rounded.exponents >> 8 * t);
    }

    /* All threads of the block. */
    __device__ void pack() const
    {
        const uint32_t wanted = wanted_tokens();
#pragma unroll
        for (int t = 0; t < TOKENS; t++)
            if (wanted >> t & 1)
                request_chunk<X_TYPE>(side.x, head_at<HEAD_DIM>(work, strip, head, first + t), chunk,
                                      rows + t * STRIDE);
        uint32_t turns[CHUNK] = {};
        if (side.has_rope) {
            if (STAGED)
                request_angles();
            stage_turns();
        }
        __pipeline_commit();
        __pipeline_wait_prior(0);
        if (side.has_rope) {
            __syncthreads(); /* the others have their part */
            if (exists())
                load_turns(turns);
        }
        uint8_t *tile = strip.tile + (size_t)head * side.cache.pages.head_stride;
        const bool bfp = is_bfp(side.cache.layout.type);
        rounded_chunk rounded;
        rounded.stored = rounded.exponents = 0;
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            float y[CHUNK] = {};
            if (wanted >> t & 1) {
                load_chunk<X_TYPE>(rows + t * STRIDE, chunk, y);
                if (side.has_rope)
                    rope_chunk<X_TYPE>(
                        rows + t * STRIDE, [&](int j) { return turns[j] & 0x7FFFu; },
                        [&](int j) { return angle_of(t, j, turns[j]); }, y);
            }
            const uint32_t magnitude = magnitude_of_chunk(y);
            const bool refused =
                __ballot_sync(ALL_LANES, magnitude > largest_storable(side)) & lanes_of_head<HEAD_DIM>();
            const bool stored = (wanted >> t & 1) && !refused;
            rounded.stored |= stored ? 1 << t : 0;
            if (bfp)
                round(t, magnitude, y, rounded);
            else if (stored)
                store_float_chunk(tile + row_offset(&side.cache.layout, strip.first_token + first + t),
                                  side.cache.layout.type, chunk, y);
        }
        if (bfp && rounded.stored)
            store_words(tile, rounded);
        if (wanted != rounded.stored && chunk == 0)
            tell_refusals(wanted & ~rounded.stored);
    }
};

/* Whether angles of all frequencies have room in nearest_smem. */
template <int HEAD_DIM>
bool may_stage_angles(const ksort_rope &rope)
{
    return !rope.partner || rope.n_frequencies <= HEAD_DIM / 2;
}

/* Rounds the strip of a group of heads by nearest rounding. */
template <int HEAD_DIM, uint32_t X_TYPE, bool STAGED>
__device__ inline void pack_nearest(const pack_work &work, const pack_side &side, uint32_t strip_index, uint8_t *shared)
{
    using shape = nearest_shape<HEAD_DIM>;
    const uint32_t first_head = blockIdx.y * shape::HEADS;
    strip_place strip;
    if (first_head >= work.n_kv_heads || !find_strip(work, side, strip_index, 0, strip))
        return;
    nearest_smem<HEAD_DIM> &smem = *reinterpret_cast<nearest_smem<HEAD_DIM> *>(shared);
    const uint32_t team = threadIdx.x / shape::TEAM, first = threadIdx.x % shape::TEAM / shape::LANES * TOKENS;
    uint8_t *rows = shared + sizeof smem + (team * STRIP_TOKENS + first) * ROW_STRIDE<HEAD_DIM, X_TYPE>;
    const nearest_packer<HEAD_DIM, X_TYPE, STAGED> packer = {
        work, side, strip, smem, rows, first_head + team, threadIdx.x % shape::LANES, first};
    packer.pack();
}

#endif /* KSORT_PACK_NEAREST_CUH */
