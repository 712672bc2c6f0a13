/* The encoder of transformed heads where tokens are few: a warp rounds one head. Feedback is a chain of HEAD_DIM steps,
 * of which all lanes do each one alike, so that nothing of the chain goes from lane to lane within a unit:
 *
 *     all lanes   window    the unit's 16 channels, rounded one after another
 *     lane l      y[q][j]   its own channels 128 q + 4 l + j: all errors are carried to them
 *     lanes of the next unit ---y----> all lanes, as soon as the unit is rounded
 *
 * A step is a chain of six or seven operations; the other ones fit in its waits. The other warps, with tokens or
 * without, help to bring the feedback matrix.
 */
#ifndef KSORT_CUDA_PACK_FEW_PACKER_CUH
#define KSORT_CUDA_PACK_FEW_PACKER_CUH

#include "pack/heads.cuh"

template <int HEAD_DIM>
struct few_shape {
    static constexpr int WARPS = PACK_THREADS<HEAD_DIM> / WARP, TOKENS = WARPS; /* of a thread block */
    static constexpr int QUADS = (HEAD_DIM + 127) / 128;                        /* of a lane */
    static constexpr int PANELS = HEAD_DIM / UNIT_CHANNELS, STAGES = HEAD_DIM <= 128 ? PANELS : 4;
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
    uint32_t quads[QUADS];         /* mantissas, a byte each */

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
            uint32_t bits[QUAD_CHANNELS];
#pragma unroll
            for (int j = 0; j < QUAD_CHANNELS; j++)
                bits[j] = mantissa_bits_of(units_of<SCALED>(y[q][j], step.inverse), step.low, step.high);
            quads[q] = quad_of(bits[0], bits[1], bits[2], bits[3]);
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

    /* The unit's channels from the lanes that have them to all. */
    __device__ void share_unit(uint32_t unit, float (&window)[UNIT_CHANNELS]) const
    {
#pragma unroll
        for (int i = 0; i < UNIT_CHANNELS; i++) {
            const uint32_t quad = unit * UNIT_LANES + i / QUAD_CHANNELS;
            const float own = quad < WARP ? y[0][i % QUAD_CHANNELS] : y[QUADS - 1][i % QUAD_CHANNELS];
            window[i] = __shfl_sync(ALL_LANES, own, quad % WARP);
        }
    }

    /* Rounds a unit, of which all lanes have the channels, and carries its errors to the lane's own. */
    __device__ void round_unit(const panel_rows &rows, uint32_t unit, const block_step &step,
                               float (&window)[UNIT_CHANNELS])
    {
        constexpr uint32_t LAST = HEAD_DIM - QUAD_CHANNELS;
        uint32_t bits[UNIT_CHANNELS];
#pragma unroll
        for (int i = 0; i < UNIT_CHANNELS; i++) {
            bits[i] = mantissa_bits_of(units_of<SCALED>(window[i], step.inverse), step.low, step.high);
            const float error = __fmaf_rn(-mantissa_of(bits[i]), step.step, window[i]);
#pragma unroll
            for (int to = i / QUAD_CHANNELS; to < UNIT_LANES; to++) {
                float row[QUAD_CHANNELS];
                load_floats(&rows[i][unit * UNIT_CHANNELS + to * QUAD_CHANNELS], row);
#pragma unroll
                for (int j = 0; j < QUAD_CHANNELS; j++)
                    if (to * QUAD_CHANNELS + j > i)
                        window[to * QUAD_CHANNELS + j] = __fmaf_rn(-error, row[j], window[to * QUAD_CHANNELS + j]);
            }
#pragma unroll
            for (int q = 0; q < QUADS; q++) {
                float row[QUAD_CHANNELS];
                load_floats(&rows[i][min(channel(q), LAST)], row);
#pragma unroll
                for (int j = 0; j < QUAD_CHANNELS; j++) /* rounded ones too: nobody looks at them again */
                    y[q][j] = __fmaf_rn(-error, row[j], y[q][j]);
            }
        }
#pragma unroll
        for (int i = 0; i < UNIT_LANES; i++)
#pragma unroll
            for (int q = 0; q < QUADS; q++)
                if (unit * UNIT_LANES + i == q * WARP + lane_of_thread())
                    quads[q] = quad_of(bits[4 * i], bits[4 * i + 1], bits[4 * i + 2], bits[4 * i + 3]);
    }

    /* All warps of the thread block; those without a head only bring the matrix. */
    template <class Smem>
    __device__ void round_with_feedback(const float *feedback, bool has_head, Smem &smem)
    {
        block_step own[QUADS], step;
#pragma unroll
        for (int q = 0; q < QUADS; q++)
            own[q] = step_of_byte<SCALED>(bytes[q], layout.mantissa_bits);
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
            float window[UNIT_CHANNELS];
            share_unit(panel, window);
            round_unit(rows, panel, step, window);
            step = next_step;
        }
    }

    /* Stores the head's words and scale bytes at a token of a tile. */
    __device__ void store(uint8_t *tile, uint32_t token, bool is_stored) const
    {
#pragma unroll
        for (int q = 0; q < QUADS; q++) {
            const uint32_t c = channel(q), place = c / QUAD_CHANNELS;
            store_quad(tile, token, place, c < HEAD_DIM ? quads[q] : 0, is_stored && place < layout.n_quads);
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

#endif /* KSORT_CUDA_PACK_FEW_PACKER_CUH */
