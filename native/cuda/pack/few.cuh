/* The encoder of transformed heads where tokens are few: a warp rounds one head. Feedback is a chain of HEAD_DIM steps,
 * of which all lanes do each one alike, so that nothing of the chain goes from lane to lane:
 *
 *     all lanes            window    w[0..3]: the channels that are next, rounded one after another
 *                          next      the four after them, which come while the window is rounded
 *     lane l               y[q][j]   its own channels 128 q + 4 l + j: all errors are carried to them
 *     lane of `next`       ---y----> all lanes, as soon as the first of the window is rounded; its errors after that
 *                                    are carried to the copies
 *
 * A step is a chain of six or seven operations, and about 20 other ones, which fit in its waits. The other warps, with
 * tokens or without, help to bring the feedback matrix.
 */
#ifndef KSORT_CUDA_PACK_FEW_CUH
#define KSORT_CUDA_PACK_FEW_CUH

#include "pack/heads.cuh"

template <int HEAD_DIM>
struct few_shape {
    static constexpr int WARPS = PACK_THREADS<HEAD_DIM> / WARP, TOKENS = WARPS; /* of a thread block */
    static constexpr int QUADS = (HEAD_DIM + 127) / 128;                        /* of a lane */
    static constexpr int PANELS = HEAD_DIM / UNIT_CHANNELS, STAGES = HEAD_DIM <= 128 ? PANELS : 4;
};

/* Rows of the feedback matrix [HEAD_DIM][HEAD_DIM] in shared memory, in panels of a unit's: all of them, or STAGES. */
template <int HEAD_DIM, int STAGES>
struct feedback_panels {
    static constexpr int PANELS = HEAD_DIM / UNIT_CHANNELS;
    alignas(16) float rows[STAGES][UNIT_CHANNELS][HEAD_DIM];

    /* Asks for a panel from its own channels on, or nothing past the last one. */
    template <int THREADS>
    __device__ void request(const float *feedback, int panel)
    {
        constexpr int LANES = THREADS / UNIT_CHANNELS; /* of a row */
        const int row = threadIdx.x / LANES, at = panel * UNIT_CHANNELS + row;
        if (panel < PANELS)
            for (int column = panel * UNIT_CHANNELS + threadIdx.x % LANES * 4; column < HEAD_DIM; column += LANES * 4)
                request_floats(&rows[panel % STAGES][row][column], feedback + (size_t)at * HEAD_DIM + column, 4);
        __pipeline_commit();
    }

    __device__ const float (&panel(int panel) const)[UNIT_CHANNELS][HEAD_DIM] { return rows[panel % STAGES]; }
};

template <int HEAD_DIM>
struct few_smem {
    feedback_panels<HEAD_DIM, few_shape<HEAD_DIM>::STAGES> feedback;
    alignas(16) float rows[few_shape<HEAD_DIM>::WARPS][HEAD_DIM];
};

/* A warp's head on its way. */
template <int HEAD_DIM, bool SCALED>
struct few_packer {
    using shape = few_shape<HEAD_DIM>;
    static constexpr int QUADS = shape::QUADS;
    using panel_rows = float[UNIT_CHANNELS][HEAD_DIM];

    const head_layout &layout;
    float y[QUADS][QUAD_CHANNELS]; /* of channels past the head: 0 */
    uint32_t bytes[QUADS];         /* scale bytes of the quads' blocks */
    uint32_t mantissas[QUADS][QUAD_CHANNELS];

    __device__ static uint32_t channel(int q) { return q * 128 + lane_of_thread() * QUAD_CHANNELS; }

    /* The first of the largest magnitudes of a quad's block. */
    __device__ float largest_of_block(int q) const
    {
        float largest = larger_of(larger_of(y[q][0], y[q][1]), larger_of(y[q][2], y[q][3]));
#pragma unroll
        for (uint32_t apart = 1; apart < WARP; apart *= 2)
            if (apart * QUAD_CHANNELS < layout.block_size) {
                const float other = __shfl_xor_sync(ALL_LANES, largest, apart);
                largest = lane_of_thread() & apart ? larger_of(other, largest) : larger_of(largest, other);
            }
        return largest;
    }

    /* In halves, of four lanes with four partial sums each. */
    __device__ static float sum_of(float (&sums)[QUAD_CHANNELS])
    {
#pragma unroll
        for (uint32_t apart = 2; apart > 0; apart /= 2)
#pragma unroll
            for (int j = 0; j < QUAD_CHANNELS; j++)
                sums[j] = __fadd_rn(sums[j], __shfl_xor_sync(ALL_LANES, sums[j], apart));
        return __fadd_rn(__fadd_rn(sums[0], sums[2]), __fadd_rn(sums[1], sums[3]));
    }

    __device__ void choose_bytes()
    {
        const uint32_t block_lanes = layout.block_size / QUAD_CHANNELS;
        const uint32_t first_lane = (lane_of_thread() & ~(block_lanes - 1)) + lane_of_thread() % UNIT_LANES;
#pragma unroll
        for (int q = 0; q < QUADS; q++) {
            scale_trial<SCALED> trial;
            trial.begin(largest_of_block(q), layout.mantissa_bits);
            float r[2][QUAD_CHANNELS], sums[2][QUAD_CHANNELS] = {};
#pragma unroll
            for (int j = 0; j < QUAD_CHANNELS; j++) {
                float both[2];
                trial.errors(y[q][j], both);
                r[0][j] = both[0], r[1][j] = both[1];
            }
            for (uint32_t lane = 0; lane < block_lanes; lane += UNIT_LANES)
#pragma unroll
                for (int i = 0; i < 2; i++)
#pragma unroll
                    for (int j = 0; j < QUAD_CHANNELS; j++) {
                        const float error = __shfl_sync(ALL_LANES, r[i][j], first_lane + lane);
                        sums[i][j] = __fmaf_rn(error, error, sums[i][j]);
                    }
            bytes[q] = trial.choose(sum_of(sums[0]), sum_of(sums[1]));
        }
    }

    __device__ void round_alone()
    {
#pragma unroll
        for (int q = 0; q < QUADS; q++) {
            const block_step step = step_of_byte<SCALED>(bytes[q], layout.mantissa_bits);
#pragma unroll
            for (int j = 0; j < QUAD_CHANNELS; j++)
                mantissas[q][j] = mantissa_bits_of(units_of<SCALED>(y[q][j], step.inverse), step.low, step.high);
        }
    }

    /* The step of a panel goes from a lane that has it in its own block to all. */
    __device__ block_step step_of_panel(const block_step (&own)[QUADS], uint32_t panel) const
    {
        const block_step unit = unit_step(layout.mantissa_bits);
        const uint32_t quad = min(panel, shape::PANELS - 1u) * UNIT_LANES;
        const bool is_first = quad < WARP;
        block_step step;
        step.step = __shfl_sync(ALL_LANES, is_first ? own[0].step : own[QUADS - 1].step, quad % WARP);
        const step_inverse inverse = is_first ? own[0].inverse : own[QUADS - 1].inverse;
        step.inverse.first = __shfl_sync(ALL_LANES, inverse.first, quad % WARP);
        step.inverse.second = SCALED ? 1.0f : __shfl_sync(ALL_LANES, inverse.second, quad % WARP);
        step.low = step.step == 0.0f ? 0.0f : unit.low;
        step.high = step.step == 0.0f ? 0.0f : unit.high;
        return step;
    }

    /* Rounds the window, quad `quad` of the head, whose feedback rows are `rows`. */
    __device__ void round_window(const float *rows, uint32_t quad, const block_step &step,
                                 float (&window)[QUAD_CHANNELS])
    {
        constexpr uint32_t LAST = HEAD_DIM - QUAD_CHANNELS;
        const uint32_t next_quad = min(quad + 1, LAST / QUAD_CHANNELS);
        float next[QUAD_CHANNELS];
#pragma unroll
        for (int i = 0; i < QUAD_CHANNELS; i++) {
            float to_window[QUAD_CHANNELS], to_next[QUAD_CHANNELS], to_own[QUADS][QUAD_CHANNELS];
            load_floats(rows + i * HEAD_DIM + quad * QUAD_CHANNELS, to_window);
            load_floats(rows + i * HEAD_DIM + next_quad * QUAD_CHANNELS, to_next);
#pragma unroll
            for (int q = 0; q < QUADS; q++)
                load_floats(rows + i * HEAD_DIM + min(channel(q), LAST), to_own[q]);
            const uint32_t bits = mantissa_bits_of(units_of<SCALED>(window[i], step.inverse), step.low, step.high);
            const float error = __fmaf_rn(-mantissa_of(bits), step.step, window[i]);
#pragma unroll
            for (int j = i + 1; j < QUAD_CHANNELS; j++)
                window[j] = __fmaf_rn(-error, to_window[j], window[j]);
#pragma unroll
            for (int q = 0; q < QUADS; q++)
#pragma unroll
                for (int j = 0; j < QUAD_CHANNELS; j++) /* rounded ones too: nobody looks at them again */
                    y[q][j] = __fmaf_rn(-error, to_own[q][j], y[q][j]);
#pragma unroll
            for (int j = 0; j < QUAD_CHANNELS; j++)
                next[j] = i == 0
                              ? __shfl_sync(ALL_LANES, next_quad < WARP ? y[0][j] : y[QUADS - 1][j], next_quad % WARP)
                              : __fmaf_rn(-error, to_next[j], next[j]);
#pragma unroll
            for (int q = 0; q < QUADS; q++)
                mantissas[q][i] = quad == q * WARP + lane_of_thread() ? bits : mantissas[q][i];
        }
#pragma unroll
        for (int j = 0; j < QUAD_CHANNELS; j++)
            window[j] = next[j];
    }

    /* All warps of the thread block; those without a head only bring the matrix. */
    template <class Smem>
    __device__ void round_with_feedback(const float *feedback, bool has_head, Smem &smem)
    {
        block_step own[QUADS], step;
        float window[QUAD_CHANNELS];
#pragma unroll
        for (int q = 0; q < QUADS; q++)
            own[q] = step_of_byte<SCALED>(bytes[q], layout.mantissa_bits);
#pragma unroll
        for (int j = 0; j < QUAD_CHANNELS; j++)
            window[j] = __shfl_sync(ALL_LANES, y[0][j], 0);
        step = step_of_panel(own, 0);
#pragma unroll 1
        for (int panel = 0; panel < shape::PANELS; panel++) {
            if (shape::STAGES < shape::PANELS || panel == 0) {
                __pipeline_wait_prior(shape::STAGES < shape::PANELS ? shape::STAGES - 2 : 0);
                __syncthreads();
                if (shape::STAGES < shape::PANELS)
                    smem.feedback.template request<PACK_THREADS<HEAD_DIM>>(feedback, panel + shape::STAGES - 1);
            }
            if (!has_head)
                continue;
            const panel_rows &rows = smem.feedback.panel(panel);
            const block_step next_step = step_of_panel(own, panel + 1);
#pragma unroll
            for (int i = 0; i < UNIT_LANES; i++)
                round_window(rows[i * QUAD_CHANNELS], panel * UNIT_LANES + i, step, window);
            step = next_step;
        }
    }

    /* Stores the head's words and scale bytes at a token of a tile. */
    __device__ void store(uint8_t *tile, uint32_t token, bool is_stored) const
    {
#pragma unroll
        for (int q = 0; q < QUADS; q++) {
            const uint32_t c = channel(q), place = c / QUAD_CHANNELS;
            const uint32_t quad = quad_of(mantissas[q][0], mantissas[q][1], mantissas[q][2], mantissas[q][3]);
            store_quad(tile, token, place, c < HEAD_DIM ? quad : 0, is_stored && place < layout.n_quads);
            if (is_stored && c < HEAD_DIM && (c & (layout.block_size - 1)) == 0)
                tile[exponent_offset(&layout, c / layout.block_size, token)] = (uint8_t)bytes[q];
        }
    }

  private:
    /* The quad at `place` of the head with those of the lanes beside it: the same bits of all, in their bytes. */
    __device__ static uint32_t joined(uint32_t bits, uint32_t lanes)
    {
        for (uint32_t apart = 1; apart < lanes; apart *= 2)
            bits |= __shfl_xor_sync(ALL_LANES, bits, apart);
        return bits;
    }

    __device__ void store_quad(uint8_t *tile, uint32_t token, uint32_t place, uint32_t quad, bool is_stored) const
    {
        const uint32_t bits = layout.mantissa_bits;
        const auto store_word = [&](uint32_t w, uint32_t word, bool by_lane) {
            if (is_stored && by_lane)
                *reinterpret_cast<uint32_t *>(tile + word_offset(&layout, w, token)) = word;
        };
        if (bits == 8) {
            store_word(place, quad, true);
        } else if (bits == 3) {
            const uint32_t group = place / 8 * 3;
            store_word(group + place % 8 / 4, joined((quad & 0x03030303u) << place % 4 * 2, 4), place % 4 == 0);
            store_word(group + 2, joined((quad >> 2 & 0x01010101u) << place % 8, 8), place % 8 == 0);
        } else {
            const uint32_t word = bits == 4 ? place / 2 : place / 4 * 3 + place % 4 / 2;
            store_word(word, joined((quad & 0x0F0F0F0Fu) << place % 2 * 4, 2), place % 2 == 0);
            if (bits == 6)
                store_word(place / 4 * 3 + 2, joined((quad >> 4 & 0x03030303u) << place % 4 * 2, 4), place % 4 == 0);
        }
    }
};

/* Rounds a warp's head that stands in its row, and stores it. */
template <int HEAD_DIM, bool SCALED, class Smem>
__device__ inline void round_few(const pack_side &side, const float *feedback,
                                 uint32_t (&from)[few_shape<HEAD_DIM>::QUADS][QUAD_CHANNELS], uint8_t *tile,
                                 uint32_t token, bool has_head, bool is_stored, Smem &smem)
{
    few_packer<HEAD_DIM, SCALED> packer = {side.cache.layout};
#pragma unroll
    for (int q = 0; q < few_shape<HEAD_DIM>::QUADS; q++)
#pragma unroll
        for (int j = 0; j < QUAD_CHANNELS; j++) {
            packer.y[q][j] = packer.channel(q) < HEAD_DIM ? smem.rows[threadIdx.x / WARP][from[q][j]] : 0.0f;
            packer.mantissas[q][j] = 0;
        }
    if (has_head)
        packer.choose_bytes();
    if (feedback)
        packer.round_with_feedback(feedback, has_head, smem);
    else
        packer.round_alone();
    if (has_head)
        packer.store(tile, token, is_stored);
}

/* Rounds the index-th TOKENS new tokens of a context, of one KV head. */
template <int HEAD_DIM, uint32_t X_TYPE>
__device__ inline void pack_few(const pack_work &work, const pack_side &side, uint32_t index, uint8_t *shared)
{
    using shape = few_shape<HEAD_DIM>;
    using maker_type = head_maker<HEAD_DIM, X_TYPE>;
    few_smem<HEAD_DIM> &smem = *reinterpret_cast<few_smem<HEAD_DIM> *>(shared);
    const uint32_t context = blockIdx.z, kv_head = blockIdx.y, warp = threadIdx.x / WARP;
    const uint32_t token = index * shape::TOKENS + warp;
    const bool may_exist = token < work.tokens.n_tokens;
    /* Everything is asked for before it is known how many tokens are new. */
    const uint32_t n_cached = (uint32_t)work.tokens.n_cached[context], n_new = n_new_of(work.tokens, context);
    const maker_type maker(work, side, kv_head);
    float x[1][maker_type::N];
    maker.load(context * work.context_stride + token * work.token_stride + (size_t)kv_head * HEAD_DIM, may_exist, x[0]);
    const float *feedback = side.transform.feedback;
    if (feedback) {
        feedback += (size_t)kv_head * HEAD_DIM * HEAD_DIM;
#pragma unroll
        for (int panel = 0; panel < shape::STAGES - (shape::STAGES < shape::PANELS); panel++)
            smem.feedback.template request<PACK_THREADS<HEAD_DIM>>(feedback, panel);
    }
    uint32_t from[shape::QUADS][QUAD_CHANNELS];
#pragma unroll
    for (int q = 0; q < shape::QUADS; q++)
#pragma unroll
        for (int j = 0; j < QUAD_CHANNELS; j++) {
            const uint32_t c = q * 128 + lane_of_thread() * QUAD_CHANNELS + j;
            from[q][j] = side.transform.permutation && c < HEAD_DIM
                             ? side.transform.permutation[(size_t)kv_head * HEAD_DIM + c]
                             : c;
        }
    const uint32_t slot = n_cached + token;
    const bool has_room = slot < n_slots(side.cache.pages);
    const bool has_position = !work.rope.partner || slot < work.tokens.n_positions;
    const bool is_new = may_exist && token < n_new;
    const bool wanted[1] = {is_new && has_room && has_position};
    if (is_new && !wanted[0])
        report(work.tokens, has_room ? KSORT_ERR_ROPE : KSORT_ERR_ARGUMENT);
    bool is_stored = false;
    float *row = smem.rows[warp];
    uint8_t *tile = nullptr;
    if (wanted[0]) {
        tile = tile_at(side.cache.pages, context, slot / KSORT_TILE_TOKENS, kv_head);
        const uint32_t positions[1] = {slot};
        const auto store_row = [&](const float (&x)[1][maker_type::N]) {
#pragma unroll
            for (int i = 0; i < maker_type::N; i++)
                if (holds_channel<HEAD_DIM>(i))
                    row[i * WARP + lane_of_thread()] = x[0][i];
            __syncwarp();
        };
        is_stored = maker.template make_heads<1>(
            positions, wanted, x, [&](const float (&x)[1][maker_type::N], float (&partners)[1][maker_type::N]) {
                store_row(x);
#pragma unroll
                for (int i = 0; i < maker_type::N; i++)
                    partners[0][i] = holds_channel<HEAD_DIM>(i) ? row[maker.turns.partner[i]] : 0.0f;
                __syncwarp();
            });
        store_row(x);
    }
    if (side.cache.layout.is_scaled)
        round_few<HEAD_DIM, true>(side, feedback, from, tile, slot % KSORT_TILE_TOKENS, wanted[0], is_stored, smem);
    else
        round_few<HEAD_DIM, false>(side, feedback, from, tile, slot % KSORT_TILE_TOKENS, wanted[0], is_stored, smem);
}

#endif /* KSORT_CUDA_PACK_FEW_CUH */
