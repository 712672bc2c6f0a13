/* Nearest rounding without RoPE: a lane is a chunk of channels of QUAD neighbouring slots, whose words are 16
 * neighbouring bytes of the tile. Nothing goes through shared memory, and warps don't wait for each other:
 *
 *     lane = chunk   0 1 2 ...   x --16-byte loads--> registers, all asked for at once
 *     slots  0..3    t t t ...   lanes of a block agree on its maximum; round
 *            4..7    t t t ...   words and exponents of four tokens --16- and 4-byte stores--> tile
 *             ...
 */
#ifndef KSORT_CUDA_PACK_PLAIN_CUH
#define KSORT_CUDA_PACK_PLAIN_CUH

#include "pack/group.cuh"
#include "pack/maxima.cuh"

constexpr int QUAD = 4; /* slots */

template <int HEAD_DIM, uint32_t X_TYPE>
struct plain_shape {
    static constexpr int LANES = CHUNK_LANES<HEAD_DIM>;
    static constexpr int WARP_SLOTS = QUAD * WARP / LANES, WARPS_A_HEAD = GROUP_SLOTS / WARP_SLOTS;
    static_assert(GROUP_HEADS<HEAD_DIM, X_TYPE> * WARPS_A_HEAD <= PACK_THREADS<HEAD_DIM> / WARP, "a lane has one quad");
};

template <int HEAD_DIM, uint32_t X_TYPE>
struct plain_packer {
    using shape = plain_shape<HEAD_DIM, X_TYPE>;
    using chunk_parts = uint4[QUAD][CHUNK_PARTS<X_TYPE>];
    static constexpr uint32_t ALL_STORED = (1 << QUAD) - 1;

    const pack_work &work;
    const pack_side &side;
    const slot_group &group;
    uint32_t n_packed;           /* slots, as count_packed has them */
    uint32_t head, chunk, first; /* first: slot of the lane's quad */
    uint8_t *tile;               /* of the head */
    chunk_parts x;

    /* Whether the lane's chunk of a slot is to be packed: none is past the head's last. */
    __device__ bool is_wanted(uint32_t slot) const
    {
        return chunk * CHUNK < HEAD_DIM && slot - group.n_cached < n_packed;
    }

    /* A bit for each slot of a quad that is to be packed. */
    __device__ uint32_t wanted_slots() const
    {
        uint32_t wanted = 0;
#pragma unroll
        for (int t = 0; t < QUAD; t++)
            wanted |= is_wanted(first + t) ? 1 << t : 0;
        return wanted;
    }

    /* Asks for the quad's x; zeros where nothing is wanted. */
    __device__ void load()
    {
        const int64_t at = head_of_slot<HEAD_DIM>(work, group, first, head) + chunk * CHUNK;
        const uint8_t *from = static_cast<const uint8_t *>(side.x) + at * (int64_t)ELEMENT_BYTES<X_TYPE>;
#pragma unroll
        for (int t = 0; t < QUAD; t++) {
            const bool wanted = is_wanted(first + t);
            const uint8_t *part = from + t * work.token_stride * ELEMENT_BYTES<X_TYPE>;
#pragma unroll
            for (int i = 0; i < CHUNK_PARTS<X_TYPE>; i++, part += sizeof(uint4))
                x[t][i] = wanted ? __ldcs(reinterpret_cast<const uint4 *>(part)) : make_uint4(0, 0, 0, 0);
        }
    }

    /* to[t] = words[t] of the slots that are stored, a bit each. */
    __device__ static void store_words(uint32_t *to, const uint32_t (&words)[QUAD], uint32_t stored)
    {
        if (stored == ALL_STORED) {
            *reinterpret_cast<uint4 *>(to) = make_uint4(words[0], words[1], words[2], words[3]);
            return;
        }
#pragma unroll
        for (int t = 0; t < QUAD; t++)
            if (stored >> t & 1)
                to[t] = words[t];
    }

    /* Four lanes have a group; its first one stores it. Lanes past the head hold zeros. */
    __device__ void store_sbfp11(const uint32_t (&low)[QUAD], const uint32_t (&high)[QUAD], uint32_t stored) const
    {
        const uint32_t in_group = chunk % 4;
        uint32_t words[3][QUAD];
#pragma unroll
        for (int t = 0; t < QUAD; t++) {
            const uint32_t lower = ((low[t] & 0x03030303u) | (high[t] & 0x03030303u) << 2) << in_group % 2 * 4;
            uint32_t upper = ((low[t] >> 2 & 0x01010101u) | (high[t] >> 1 & 0x02020202u)) << 2 * in_group;
            upper |= __shfl_xor_sync(ALL_LANES, upper, 1);
            words[0][t] = lower | __shfl_xor_sync(ALL_LANES, lower, 1);
            words[1][t] = __shfl_xor_sync(ALL_LANES, words[0][t], 2);
            words[2][t] = upper | __shfl_xor_sync(ALL_LANES, upper, 2);
        }
        uint32_t *to = reinterpret_cast<uint32_t *>(
            tile + word_offset(&side.cache.layout, chunk / 4 * 3, first % KSORT_TILE_TOKENS));
#pragma unroll
        for (int w = 0; w < 3; w++)
            store_words(to + w * STRIP_TOKENS, words[w], in_group == 0 ? stored : 0);
    }

    /* Stores mantissas, four channels of a token in a word: BFP12 has a word a chunk, BFP16 two, BFP14 three words two
     * chunks, SBFP11 three words four chunks. All lanes. */
    __device__ void store_mantissas(const uint32_t (&low)[QUAD], const uint32_t (&high)[QUAD], uint32_t stored) const
    {
        const head_layout &layout = side.cache.layout;
        const uint32_t bits = layout.mantissa_bits;
        if (bits == 3) {
            store_sbfp11(low, high, stored);
            return;
        }
        const uint32_t word = bits == 4 ? chunk : bits == 8 ? 2 * chunk : chunk / 2 * 3 + chunk % 2;
        uint32_t *to = reinterpret_cast<uint32_t *>(tile + word_offset(&layout, word, first % KSORT_TILE_TOKENS));
        if (bits == 8) {
            store_words(to, low, stored);
            store_words(to + STRIP_TOKENS, high, stored);
            return;
        }
        uint32_t words[QUAD];
#pragma unroll
        for (int t = 0; t < QUAD; t++)
            words[t] = nibbles(low[t], high[t]);
        store_words(to, words, stored);
        if (bits == 4)
            return;
#pragma unroll
        for (int t = 0; t < QUAD; t++) { /* two lanes' upper bits share a word */
            const uint32_t upper = (low[t] >> 4 & 0x03030303u) | (high[t] >> 4 & 0x03030303u) << 2;
            words[t] = upper | __shfl_xor_sync(ALL_LANES, upper, 1) << 4; /* of even lanes */
        }
        store_words(to + 2 * STRIP_TOKENS, words, chunk % 2 == 0 ? stored : 0);
    }

    /* Of the first chunk of a block: its scale bytes. */
    __device__ void store_bytes(uint32_t block, const uint32_t (&bytes)[QUAD], uint32_t stored) const
    {
        uint8_t *to = tile + exponent_offset(&side.cache.layout, block, first % KSORT_TILE_TOKENS);
        if (stored == ALL_STORED) {
            *reinterpret_cast<uint32_t *>(to) = quad_of(bytes[0], bytes[1], bytes[2], bytes[3]);
            return;
        }
#pragma unroll
        for (int t = 0; t < QUAD; t++)
            if (stored >> t & 1)
                to[t] = (uint8_t)bytes[t];
    }

    /* Rounds and stores a quad to BFP or SBFP. magnitudes: of the lane's block. */
    __device__ void pack_bfp(const uint32_t (&magnitudes)[QUAD], uint32_t stored) const
    {
        const head_layout &layout = side.cache.layout;
        const uint32_t log_lanes = __ffs(layout.block_size / CHUNK) - 1; /* of a block */
        const int32_t limit = (1 << (layout.mantissa_bits - 1)) - 1;
        uint32_t low[QUAD], high[QUAD], bytes[QUAD];
#pragma unroll
        for (int t = 0; t < QUAD; t++) {
            float y[CHUNK];
            uint32_t u[CHUNK];
            chunk_values<X_TYPE>(x[t], y);
            bytes[t] = round_nearest<X_TYPE != KSORT_F16>(layout, magnitudes[t], y, u);
            low[t] = clamped_quad(u[0], u[1], u[2], u[3], limit);
            high[t] = clamped_quad(u[4], u[5], u[6], u[7], limit);
        }
        store_mantissas(low, high, stored);
        if ((chunk & ((1 << log_lanes) - 1)) == 0)
            store_bytes(chunk >> log_lanes, bytes, stored);
    }

    __device__ void pack_floats(uint32_t stored) const
    {
        const head_layout &layout = side.cache.layout;
        uint8_t *row = tile + row_offset(&layout, first % KSORT_TILE_TOKENS);
#pragma unroll
        for (int t = 0; t < QUAD; t++, row += HEAD_DIM * sizeof(uint16_t)) {
            if (!(stored >> t & 1))
                continue;
            if (X_TYPE != KSORT_F32 && layout.type == X_TYPE) {
                reinterpret_cast<uint4 *>(row)[chunk] = x[t][0];
            } else {
                float y[CHUNK];
                chunk_values<X_TYPE>(x[t], y);
                store_float_chunk(row, layout.type, chunk, y);
            }
        }
    }

    /* Of a quad's wanted slots those whose heads may be stored; the others are reported. */
    __device__ uint32_t accepted(const uint32_t (&magnitudes)[QUAD], uint32_t wanted) const
    {
        const uint32_t largest = max(max(magnitudes[0], magnitudes[1]), max(magnitudes[2], magnitudes[3]));
        const uint32_t storable = largest_storable(side);
        if (!__any_sync(ALL_LANES, largest > storable))
            return wanted;
        uint32_t stored = wanted;
#pragma unroll
        for (int t = 0; t < QUAD; t++) {
            if (!(__ballot_sync(ALL_LANES, magnitudes[t] > storable) & lanes_of_head<HEAD_DIM>()))
                continue;
            stored &= ~(1u << t);
            if (wanted >> t & 1 && chunk == 0)
                tell_refusal<HEAD_DIM, X_TYPE>(work, side, group, first + t, head);
        }
        return stored;
    }

    /* All lanes of a warp, once load() was called. */
    __device__ void pack() const
    {
        const head_layout &layout = side.cache.layout;
        uint32_t magnitudes[QUAD];
        largest_of_blocks<X_TYPE>(x, is_bfp(layout.type) ? layout.block_size / CHUNK : 1, magnitudes);
        const uint32_t stored = accepted(magnitudes, wanted_slots());
        if (is_bfp(layout.type))
            pack_bfp(magnitudes, stored);
        else
            pack_floats(stored);
    }
};

#endif /* KSORT_CUDA_PACK_PLAIN_CUH */
