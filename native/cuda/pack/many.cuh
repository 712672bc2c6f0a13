/* The encoder of transformed heads where tokens are many: a warp has 8 groups of 4 lanes, a lane TOKENS tokens of its
 * group, which is what a value of the feedback matrix, once loaded, is used for:
 *
 *     lane 4 g + l     y[t][u][j]: channel 16 u + 4 l + j of the group's token t         128 registers
 *     unit u           y --shared memory--> lanes that each have all 16 channels of one token: a chain of 16 steps
 *                      errors --shared memory--> all lanes of the group: y of later units -= errors * feedback
 *
 * The second is a product of a 16-column matrix, 16 multiply-adds for each load of 16 bytes: seven eighths of all work.
 * One warp's chains fill the waits of another's products. A lane stores the words of its token, so that 32 of them are
 * neighbours. The feedback matrix comes in panels of 16 rows, shared by the warps: panel u in use, the two after it on
 * their way.
 */
#ifndef KSORT_CUDA_PACK_MANY_CUH
#define KSORT_CUDA_PACK_MANY_CUH

#include "pack/heads.cuh"

template <int HEAD_DIM>
struct many_shape {
    static constexpr int WARPS = 4, THREADS = WARPS * WARP, RESIDENT = 2; /* RESIDENT: blocks, of 255 registers */
    static constexpr int TOKENS = HEAD_DIM <= 128 ? 4 : 2;                /* of a lane */
    static constexpr int GROUPS = WARP / UNIT_LANES;
    static constexpr int WARP_SLOTS = TOKENS * GROUPS, SLOTS = WARPS * WARP_SLOTS;
    static constexpr int UNITS = HEAD_DIM / UNIT_CHANNELS;
    static constexpr int STAGES = 3;
    static constexpr int ROW = HEAD_DIM + 4, UNIT_ROW = UNIT_CHANNELS + 4; /* floats: other banks for other tokens */
    static constexpr int TOGETHER = 4;                                     /* heads that a warp makes rows of */
};

/* A warp's own. */
template <int HEAD_DIM>
struct many_warp_smem {
    using shape = many_shape<HEAD_DIM>;
    union {
        alignas(16) float rows[shape::GROUPS][shape::ROW]; /* a token of each group: on its way to their lanes */
        struct {
            float unit[shape::WARP_SLOTS][shape::UNIT_ROW];
            float errors[UNIT_CHANNELS][shape::WARP_SLOTS];
        };
    };
    uint8_t bytes[shape::UNITS][shape::WARP_SLOTS]; /* scale bytes, of blocks */
};

template <int HEAD_DIM>
struct many_smem {
    using shape = many_shape<HEAD_DIM>;
    feedback_panels<HEAD_DIM, shape::STAGES> feedback;
    many_warp_smem<HEAD_DIM> warps[shape::WARPS];
    alignas(8) uint16_t permutation[HEAD_DIM];
};

/* A warp's tokens on their way. */
template <int HEAD_DIM, bool SCALED>
struct many_packer {
    using shape = many_shape<HEAD_DIM>;
    static constexpr int TOKENS = shape::TOKENS, UNITS = shape::UNITS;
    using unit_values = float[UNITS][QUAD_CHANNELS];

    const head_layout &layout;
    many_smem<HEAD_DIM> &smem;
    many_warp_smem<HEAD_DIM> &own;
    unit_values y[TOKENS];

    __device__ static uint32_t group() { return lane_of_thread() / UNIT_LANES; }
    __device__ static uint32_t lane_of_group() { return lane_of_thread() % UNIT_LANES; }
    /* The token that a lane rounds: of the warp's slots; neighbours' where lanes have fewer than four. */
    __device__ static uint32_t own_slot() { return group() * TOKENS + lane_of_thread() % TOKENS; }

    /* Takes a token of each group from its row as the last one of the lanes, and forgets the first. */
    __device__ void take_rows()
    {
        const float *row = own.rows[group()];
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
#pragma unroll
            for (int t = 0; t + 1 < TOKENS; t++)
#pragma unroll
                for (int j = 0; j < QUAD_CHANNELS; j++)
                    y[t][u][j] = y[t + 1][u][j];
            const ushort4 from = *reinterpret_cast<const ushort4 *>(
                &smem.permutation[u * UNIT_CHANNELS + lane_of_group() * QUAD_CHANNELS]);
            y[TOKENS - 1][u][0] = row[from.x], y[TOKENS - 1][u][1] = row[from.y];
            y[TOKENS - 1][u][2] = row[from.z], y[TOKENS - 1][u][3] = row[from.w];
        }
    }

    /* blocks[u]: of the block that unit u belongs to. */
    __device__ void find_extremes(const unit_values &y, extremes (&blocks)[UNITS]) const
    {
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
            blocks[u] = {0.0f, 0.0f};
            blocks[u].add(y[u]);
        }
#pragma unroll
        for (int apart = 1; apart < UNITS; apart *= 2)
#pragma unroll
            for (int u = 0; u + apart < UNITS; u++)
                if (!(u & apart) && apart * UNIT_CHANNELS < (int)layout.block_size) {
                    blocks[u].add(blocks[u + apart]);
                    blocks[u + apart] = blocks[u];
                }
#pragma unroll
        for (int u = 0; u < UNITS; u++)
            blocks[u].share(1), blocks[u].share(2);
    }

    /* Chooses the scale bytes of the token taken last, the `token`-th of its group. */
    __device__ void choose_bytes(uint32_t token)
    {
        const int block_units = (int)layout.block_size / UNIT_CHANNELS;
        const unit_values &last = y[TOKENS - 1];
        extremes blocks[UNITS];
        find_extremes(last, blocks);
        uint32_t positive = 0;
        bool has_tie = false;
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
            positive |= blocks[u].top > blocks[u].bottom ? 1u << u : 0;
            has_tie = has_tie || blocks[u].is_tie();
        }
        const bool is_slow = SCALED && __any_sync(ALL_LANES, has_tie);
        if (is_slow)
            positive = signs_of_blocks<HEAD_DIM>(layout.block_size,
                                                 [this](uint32_t c) { return own.rows[group()][smem.permutation[c]]; });
        scale_trial<SCALED> trial;
        float sums[2][QUAD_CHANNELS];
        uint32_t block = 0;
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
            if ((u & (block_units - 1)) == 0) {
                trial.begin(blocks[u], positive >> (is_slow ? block : u) & 1, layout.mantissa_bits);
#pragma unroll
                for (int j = 0; j < QUAD_CHANNELS; j++)
                    sums[0][j] = sums[1][j] = 0.0f;
            }
#pragma unroll
            for (int j = 0; j < QUAD_CHANNELS; j++) {
                float r[2];
                trial.errors(last[u][j], r);
                sums[0][j] = __fmaf_rn(r[0], r[0], sums[0][j]);
                sums[1][j] = __fmaf_rn(r[1], r[1], sums[1][j]);
            }
            if (((u + 1) & (block_units - 1)) == 0 || u == UNITS - 1) {
                const uint32_t byte = trial.choose(sums);
                if (lane_of_group() == 0)
                    own.bytes[block][group() * TOKENS + token] = (uint8_t)byte;
                block++;
            }
        }
    }

    /* Rounds the 16 channels of the lane's token, whose errors go to shared memory. panel: feedback rows of the unit. */
    template <bool FEEDBACK>
    __device__ void round_unit(int unit, const float (&panel)[UNIT_CHANNELS][HEAD_DIM], const block_step &step,
                               uint32_t (&quads)[UNIT_LANES])
    {
        float x[UNIT_LANES][QUAD_CHANNELS];
#pragma unroll
        for (int q = 0; q < UNIT_LANES; q++)
            load_floats(&own.unit[own_slot()][q * QUAD_CHANNELS], x[q]);
#pragma unroll
        for (int q = 0; q < UNIT_LANES; q++) {
            uint32_t bits[QUAD_CHANNELS];
#pragma unroll
            for (int j = 0; j < QUAD_CHANNELS; j++) {
                const int c = q * QUAD_CHANNELS + j;
                bits[j] = mantissa_bits_of(units_of<SCALED>(x[q][j], step.inverse), step.low, step.high);
                if (!FEEDBACK)
                    continue;
                const float error = __fmaf_rn(-mantissa_of(bits[j]), step.step, x[q][j]);
                own.errors[c][own_slot()] = error;
#pragma unroll
                for (int later = q; later < UNIT_LANES; later++) {
                    float row[QUAD_CHANNELS];
                    load_floats(&panel[c][unit * UNIT_CHANNELS + later * QUAD_CHANNELS], row);
#pragma unroll
                    for (int i = 0; i < QUAD_CHANNELS; i++)
                        if (later > q || i > j)
                            x[later][i] = __fmaf_rn(-error, row[i], x[later][i]);
                }
            }
            quads[q] = quad_of(bits[0], bits[1], bits[2], bits[3]);
        }
    }

    /* Carries the errors of a unit to all later ones. */
    template <int UNIT>
    __device__ void carry_errors(const float (&panel)[UNIT_CHANNELS][HEAD_DIM])
    {
#pragma unroll 4
        for (int row = 0; row < UNIT_CHANNELS; row++) {
            float errors[TOKENS];
            load_floats(&own.errors[row][group() * TOKENS], errors);
#pragma unroll
            for (int u = UNIT + 1; u < UNITS; u++) {
                float values[QUAD_CHANNELS];
                load_floats(&panel[row][u * UNIT_CHANNELS + lane_of_group() * QUAD_CHANNELS], values);
#pragma unroll
                for (int t = 0; t < TOKENS; t++)
#pragma unroll
                    for (int j = 0; j < QUAD_CHANNELS; j++)
                        y[t][u][j] = __fmaf_rn(-errors[t], values[j], y[t][u][j]);
            }
        }
    }

    /* Rounds and stores the units from UNIT on. All warps of the block come along; those without tokens only bring
     * their share of the panels. */
    template <int UNIT, bool FEEDBACK>
    __device__ void round_units(const float *feedback, bool has_tokens, bool is_stored, word_writer &words)
    {
        if constexpr (UNIT < UNITS) {
            if (FEEDBACK) {
                __pipeline_wait_prior(shape::STAGES - 2);
                __syncthreads(); /* all have panel UNIT, and are done with the one before it, whose place is next */
                smem.feedback.template request<shape::THREADS>(feedback, UNIT + shape::STAGES - 1);
            }
            if (has_tokens) {
                const auto &panel = smem.feedback.panel(UNIT);
                const uint32_t block = UNIT * UNIT_CHANNELS / layout.block_size, byte = own.bytes[block][own_slot()];
#pragma unroll
                for (int t = 0; t < TOKENS; t++)
                    *reinterpret_cast<float4 *>(&own.unit[group() * TOKENS + t][lane_of_group() * QUAD_CHANNELS]) =
                        make_float4(y[t][UNIT][0], y[t][UNIT][1], y[t][UNIT][2], y[t][UNIT][3]);
                __syncwarp();
                uint32_t quads[UNIT_LANES];
                round_unit<FEEDBACK>(UNIT, panel, step_of_byte<SCALED>(byte, layout.mantissa_bits), quads);
                if (is_stored) {
                    words.store(UNIT, quads);
                    if (UNIT * UNIT_CHANNELS % layout.block_size == 0)
                        words.tile[exponent_offset(&layout, block, words.token)] = (uint8_t)byte;
                }
                __syncwarp();
                if (FEEDBACK)
                    carry_errors<UNIT>(panel);
            }
            round_units<UNIT + 1, FEEDBACK>(feedback, has_tokens, is_stored, words);
        }
    }
};

/* A warp's slots of a context, of which first_new .. end_new - 1 are new. */
struct many_slots {
    uint32_t first, first_new, end_new, n_positions;

    /* Of the slots that can be stored. */
    __device__ bool is_wanted(uint32_t slot) const { return slot >= first_new && slot < end_new && slot < n_positions; }
};

/* Makes heads of all the warp's tokens, one of each group a time, and chooses their scale bytes. Returns a bit for each
 * slot that may be stored. */
template <int HEAD_DIM, bool SCALED, uint32_t X_TYPE>
__device__ inline uint32_t take_tokens(const head_maker<HEAD_DIM, X_TYPE> &maker, const many_slots &slots,
                                       size_t context_at, many_packer<HEAD_DIM, SCALED> &packer)
{
    using shape = many_shape<HEAD_DIM>;
    using maker_type = head_maker<HEAD_DIM, X_TYPE>;
    constexpr int TOGETHER = shape::TOGETHER, STEPS = shape::GROUPS / TOGETHER;
    uint32_t stored = 0;
    const auto slot_of = [](int step,
                            int i) { /* of the warp's: token step / STEPS of a group */
                                     return (uint32_t)((step % STEPS * TOGETHER + i) * shape::TOKENS + step / STEPS);
    };
    float next[TOGETHER][maker_type::N];
    const auto load = [&](int step) {
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            const uint32_t slot = slots.first + slot_of(step, i);
            maker.load(context_at + (slot - slots.first_new) * maker.work.token_stride, slots.is_wanted(slot), next[i]);
        }
    };
    load(0);
#pragma unroll 1
    for (int step = 0; step < STEPS * shape::TOKENS; step++) {
        float x[TOGETHER][maker_type::N];
        uint32_t positions[TOGETHER];
        bool wanted[TOGETHER];
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            positions[i] = slots.first + slot_of(step, i);
            wanted[i] = slots.is_wanted(positions[i]);
#pragma unroll
            for (int n = 0; n < maker_type::N; n++)
                x[i][n] = next[i][n];
        }
        if (step + 1 < STEPS * shape::TOKENS)
            load(step + 1);
        float *rows = packer.own.rows[step % STEPS * TOGETHER];
        const uint32_t may = maker.template make_rows<TOGETHER>(positions, wanted, rows, shape::ROW, x);
#pragma unroll
        for (int i = 0; i < TOGETHER; i++)
            stored |= (may >> i & 1) << slot_of(step, i);
        if (step % STEPS < STEPS - 1)
            continue;
        __syncwarp();
        packer.take_rows();
        packer.choose_bytes(step / STEPS);
        __syncwarp();
    }
    return stored;
}

template <int HEAD_DIM, bool SCALED, uint32_t X_TYPE>
__device__ inline void round_many(const pack_work &work, const pack_side &side, const many_slots &slots,
                                  const float *feedback, many_smem<HEAD_DIM> &smem)
{
    using packer_type = many_packer<HEAD_DIM, SCALED>;
    const uint32_t context = blockIdx.z, kv_head = blockIdx.y, last = slots.first + many_shape<HEAD_DIM>::WARP_SLOTS;
    packer_type packer = {side.cache.layout, smem, smem.warps[threadIdx.x / WARP]};
    const bool has_tokens = last > slots.first_new && slots.first < min(slots.end_new, slots.n_positions);
    const uint32_t slot = slots.first + packer.own_slot();
    uint32_t stored = 0;
    uint8_t *tile = nullptr;
    if (has_tokens) {
        const head_maker<HEAD_DIM, X_TYPE> maker(work, side, kv_head);
        tile = tile_at(side.cache.pages, context, slots.first / KSORT_TILE_TOKENS, kv_head);
        stored = take_tokens<HEAD_DIM, SCALED, X_TYPE>(
            maker, slots, context * work.context_stride + (size_t)kv_head * HEAD_DIM, packer);
    }
    const bool is_stored = stored >> packer.own_slot() & 1 && packer.lane_of_group() < many_shape<HEAD_DIM>::TOKENS;
    word_writer words = {side.cache.layout, tile, slot % KSORT_TILE_TOKENS};
    if (feedback)
        packer.template round_units<0, true>(feedback, has_tokens, is_stored, words);
    else
        packer.template round_units<0, false>(nullptr, has_tokens, is_stored, words);
}

/* Rounds the index-th SLOTS slots of a context that new tokens touch, of one KV head. */
template <int HEAD_DIM, uint32_t X_TYPE>
__device__ inline void pack_many(const pack_work &work, const pack_side &side, uint32_t index, uint8_t *shared)
{
    using shape = many_shape<HEAD_DIM>;
    many_smem<HEAD_DIM> &smem = *reinterpret_cast<many_smem<HEAD_DIM> *>(shared);
    const uint32_t context = blockIdx.z, kv_head = blockIdx.y;
    many_slots slots;
    slots.first_new = (uint32_t)work.tokens.n_cached[context];
    slots.end_new = slots.first_new + n_new_of(work.tokens, context);
    const uint32_t first = (slots.first_new / shape::SLOTS + index) * shape::SLOTS;
    if (first >= slots.end_new || slots.first_new == slots.end_new)
        return;
    slots.first = first + threadIdx.x / WARP * shape::WARP_SLOTS;
    slots.n_positions = n_slots(side.cache.pages);
    if (threadIdx.x == 0 && min(first + shape::SLOTS, slots.end_new) > slots.n_positions)
        report(work.tokens, KSORT_ERR_ARGUMENT);
    if (work.rope.partner && work.tokens.n_positions < slots.n_positions) {
        slots.n_positions = work.tokens.n_positions;
        const uint32_t end = min(min(first + shape::SLOTS, slots.end_new), n_slots(side.cache.pages));
        if (threadIdx.x == 0 && end > max(slots.n_positions, max(first, slots.first_new)))
            report(work.tokens, KSORT_ERR_ROPE);
    }
    const float *feedback = side.transform.feedback;
    if (feedback) {
        feedback += (size_t)kv_head * HEAD_DIM * HEAD_DIM;
        for (int panel = 0; panel < shape::STAGES - 1; panel++)
            smem.feedback.template request<shape::THREADS>(feedback, panel);
    }
    for (uint32_t c = threadIdx.x; c < HEAD_DIM; c += shape::THREADS) {
        const uint16_t *permutation = side.transform.permutation;
        smem.permutation[c] = permutation ? permutation[(size_t)kv_head * HEAD_DIM + c] : (uint16_t)c;
    }
    __syncthreads();
    if (side.cache.layout.is_scaled)
        round_many<HEAD_DIM, true, X_TYPE>(work, side, slots, feedback, smem);
    else
        round_many<HEAD_DIM, false, X_TYPE>(work, side, slots, feedback, smem);
}

#endif /* KSORT_CUDA_PACK_MANY_CUH */
