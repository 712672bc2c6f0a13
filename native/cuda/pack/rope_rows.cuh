/* Keys on their way into shared memory, for packing with RoPE (pack/rope.cuh): rows of x, cos and sin, turns.
 *
 *     x     --16-byte loads, of all heads at once--> registers --> rows [head][slot] of an odd number of words: lanes,
 *                                                                  which are slots, read different banks
 *     cos, sin of 32 positions --> registers --> rope table [frequency][slot]     shared by the heads
 *     partner, frequency, sign           --> turns [head][channel]
 */
#ifndef KSORT_CUDA_PACK_ROPE_ROWS_CUH
#define KSORT_CUDA_PACK_ROPE_ROWS_CUH

#include "common/shared_loads.cuh"
#include "pack/group.cuh"

constexpr int HALF_UNIT = 16; /* channels: the smallest block, and BFP14's group */
constexpr int UNIT = 2 * HALF_UNIT;

template <int HEAD_DIM, uint32_t X_TYPE>
struct rope_shape {
    static constexpr int THREADS = PACK_THREADS<HEAD_DIM>, WARPS = THREADS / WARP;
    static constexpr int HEADS = GROUP_HEADS<HEAD_DIM, X_TYPE>;
    static constexpr int UNITS = (HEAD_DIM + UNIT - 1) / UNIT; /* of a head */
    static_assert(HEADS * UNITS <= WARPS, "a warp for each unit");
    static constexpr int ROW_WORDS = HEAD_DIM * ELEMENT_BYTES<X_TYPE> / 4 + 1;
    static constexpr int NO_TURN = HEAD_DIM / 2;          /* row of the rope table */
    static constexpr int ENTRIES_A_ROW = GROUP_SLOTS + 1; /* neighbouring frequencies are written to different banks */
};

/* RoPE of a channel. One that is not turned is its own partner, and its cos and sin are those of NO_TURN, (1, 0). */
struct channel_turn {
    uint32_t partner; /* its place in a row in bytes */
    uint32_t entry;   /* index of lane 0's cos and sin, or the frequency where they are not staged; bit 31: the partner
                         is subtracted */
};

template <int HEAD_DIM, uint32_t X_TYPE>
struct rope_smem {
    using shape = rope_shape<HEAD_DIM, X_TYPE>;
    alignas(16) channel_turn turns[shape::HEADS * HEAD_DIM];
    float2 rope_table[shape::NO_TURN + 1][shape::ENTRIES_A_ROW]; /* cos and sin */
    uint32_t rows[shape::HEADS][GROUP_SLOTS][shape::ROW_WORDS];
    uint32_t magnitudes[shape::WARPS][GROUP_SLOTS]; /* of units */
};

/* A thread block's keys. STAGED: cos and sin come through shared memory, of HEAD_DIM / 2 frequencies at most. */
template <int HEAD_DIM, uint32_t X_TYPE, bool STAGED>
struct rope_rows {
    using shape = rope_shape<HEAD_DIM, X_TYPE>;

    const pack_work &work;
    const pack_side &side;
    const slot_group &group;
    rope_smem<HEAD_DIM, X_TYPE> &smem;
    uint32_t first_head, n_heads; /* n_heads: HEADS at most */
    uint32_t n_packed;            /* slots, as count_packed has them */
    uint32_t warp, lane;

    /* Whether slot s of the group is to be packed. */
    __device__ bool is_wanted(uint32_t s) const { return group.first + s - group.n_cached < n_packed; }

    /* Rows come in pieces of 16 bytes: a warp's load is SLOTS_A_LOAD slots x PIECES_A_LOAD pieces, which it writes to
     * 32 banks. A warp always loads the same pieces of a row. */
    static constexpr int PIECES = HEAD_DIM * ELEMENT_BYTES<X_TYPE> / 16, PIECES_A_LOAD = 8, SLOTS_A_LOAD = 4;
    static constexpr int LOADS_A_ROW = PIECES <= 8 ? 1 : PIECES <= 16 ? 2 : PIECES <= 32 ? 4 : 8;
    static constexpr int SLOT_STEP = SLOTS_A_LOAD * shape::WARPS / LOADS_A_ROW; /* that the block loads together */
    static constexpr int LOADS = GROUP_SLOTS / SLOT_STEP;                       /* of a head */

    __device__ uint32_t piece() const { return warp % LOADS_A_ROW * PIECES_A_LOAD + lane % PIECES_A_LOAD; }

    __device__ uint32_t slot_of_load(int load) const
    {
        return load * SLOT_STEP + warp / LOADS_A_ROW * SLOTS_A_LOAD + lane / PIECES_A_LOAD;
    }

    /* The slot that stands for slot s of the group: one that is packed. What comes of the others, nobody stores. */
    __device__ uint32_t packed_slot(uint32_t s) const
    {
        return min(max(group.first + s, group.n_cached), group.n_cached + n_packed - 1);
    }

    using row_pieces = uint4[shape::HEADS][LOADS];

    __device__ void load_rows(row_pieces &pieces) const
    {
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            const int64_t at = head_of_slot<HEAD_DIM>(work, group, packed_slot(slot_of_load(i)), first_head);
            const uint8_t *from = static_cast<const uint8_t *>(side.x) + at * (int64_t)ELEMENT_BYTES<X_TYPE> +
                                  16 * min(piece(), (uint32_t)PIECES - 1);
#pragma unroll
            for (int head = 0; head < shape::HEADS; head++, from += HEAD_DIM * ELEMENT_BYTES<X_TYPE>)
                if (head < n_heads)
                    pieces[head][i] = __ldcs(reinterpret_cast<const uint4 *>(from));
        }
    }

    __device__ void stage_rows(int head, const uint4 (&pieces)[LOADS]) const
    {
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            uint32_t *to = smem.rows[head][slot_of_load(i)] + 4 * piece();
            if (piece() < PIECES)
                to[0] = pieces[i].x, to[1] = pieces[i].y, to[2] = pieces[i].z, to[3] = pieces[i].w;
        }
    }

    /* cos and sin of a warp's share of the positions, which are slots: a lane has every WARP-th frequency. */
    static constexpr int ROPE_SLOTS = GROUP_SLOTS / shape::WARPS, ENTRIES_A_SLOT = (HEAD_DIM / 2 + WARP - 1) / WARP;
    using lane_entries = float2[ROPE_SLOTS][ENTRIES_A_SLOT];

    __device__ void load_rope_table(lane_entries &entries) const
    {
        const uint32_t n = work.rope.n_frequencies;
#pragma unroll
        for (int s = 0; s < ROPE_SLOTS; s++) {
            const size_t row = (size_t)packed_slot(warp * ROPE_SLOTS + s) * n;
#pragma unroll
            for (uint32_t i = 0; i < ENTRIES_A_SLOT; i++) {
                const size_t at = row + min(i * WARP + lane, n - 1);
                entries[s][i] = make_float2(work.rope.cos[at], work.rope.sin[at]);
            }
        }
    }

    __device__ void stage_rope_table(const lane_entries &entries) const
    {
#pragma unroll
        for (int s = 0; s < ROPE_SLOTS; s++)
#pragma unroll
            for (uint32_t i = 0; i < ENTRIES_A_SLOT; i++)
                if (i * WARP + lane < HEAD_DIM / 2)
                    smem.rope_table[i * WARP + lane][warp * ROPE_SLOTS + s] = entries[s][i];
        if (warp == 0)
            smem.rope_table[shape::NO_TURN][lane] = make_float2(1.0f, 0.0f);
    }

    /* Tables of the block's channels threadIdx.x, threadIdx.x + THREADS ...: read before they are needed. */
    static constexpr int CHANNELS = shape::HEADS * HEAD_DIM, TURNS = (CHANNELS + shape::THREADS - 1) / shape::THREADS;

    struct table_entries {
        uint32_t partner[TURNS], frequency[TURNS];
        int sign[TURNS];
    };

    __device__ void load_tables(table_entries &tables) const
    {
        const uint32_t last = work.n_kv_heads * HEAD_DIM - 1;
#pragma unroll
        for (int i = 0; i < TURNS; i++) {
            const uint32_t at = min(first_head * HEAD_DIM + i * shape::THREADS + threadIdx.x, last);
            tables.sign[i] = work.rope.sign[at];
            tables.partner[i] = work.rope.partner[at];
            tables.frequency[i] = work.rope.frequency[at];
        }
    }

    __device__ void stage_turns(const table_entries &tables) const
    {
#pragma unroll
        for (int i = 0; i < TURNS; i++) {
            const uint32_t c = i * shape::THREADS + threadIdx.x;
            const int sign = tables.sign[i];
            const uint32_t partner = sign ? tables.partner[i] : c % HEAD_DIM, frequency = tables.frequency[i];
            const uint32_t entry = !STAGED ? frequency : (sign ? frequency : shape::NO_TURN) * shape::ENTRIES_A_ROW;
            if (c < CHANNELS)
                smem.turns[c] = {partner * ELEMENT_BYTES<X_TYPE>, entry | (sign < 0 ? 1u << 31 : 0)};
        }
    }

    /* Everything into shared memory: all is asked for before anything is waited for. */
    __device__ void stage() const
    {
        row_pieces pieces;
        load_rows(pieces);
        table_entries tables;
        load_tables(tables);
        lane_entries entries;
        if (STAGED)
            load_rope_table(entries);
        __syncthreads(); /* else the compiler asks for a few entries at a time, to save registers: 10% slower in all */
        stage_turns(tables);
        if (STAGED)
            stage_rope_table(entries);
#pragma unroll
        for (int head = 0; head < shape::HEADS; head++)
            stage_rows(head, pieces[head]);
    }
};

#endif /* KSORT_CUDA_PACK_ROPE_ROWS_CUH */
