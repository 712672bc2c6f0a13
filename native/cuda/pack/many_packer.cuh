/* The encoder of transformed heads where tokens are many. A warp has 32 tokens, which stand in shared memory as
 * [place][token], places being channels in the permutation's order:
 *
 *     make      4 tokens a time: a lane has every 32nd channel of them, and stores 4 tokens of a channel at once
 *     choose    lane t: the scale bytes of token t
 *     units of 16 places, one after another:
 *       look back    lane 4 g + l: 4 tokens g of 4 places l -= errors of all places before * feedback
 *       round        lane t: the 16 places of token t, a chain; their errors take their place in shared memory
 *
 * To look back is seven eighths of the work: 16 multiply-adds for two loads of 16 bytes. As one unit's code serves all,
 * the kernel stays in the instruction cache, which running through it once would not. The unit's columns of the feedback
 * matrix are shared by the warps; those of the next come meanwhile.
 */
#ifndef KSORT_CUDA_PACK_MANY_PACKER_CUH
#define KSORT_CUDA_PACK_MANY_PACKER_CUH

#include "pack/heads.cuh"

template <int HEAD_DIM>
struct many_shape {
    static constexpr int WARPS = HEAD_DIM <= 128 ? 4 : 2, THREADS = WARPS * WARP, RESIDENT = 2; /* RESIDENT: blocks */
    static constexpr int SLOTS = WARPS * WARP, TOGETHER = 4; /* TOGETHER: heads that a warp makes */
    static constexpr int UNITS = HEAD_DIM / UNIT_CHANNELS;
    static constexpr int STAGES = HEAD_DIM <= 128 ? 2 : 1; /* 99 KB of shared memory */
    static constexpr int ROW = WARP + 4;                   /* floats: quads of neighbouring rows in other banks */
};

template <int HEAD_DIM>
struct many_smem {
    using shape = many_shape<HEAD_DIM>;
    alignas(16) float y[shape::WARPS][HEAD_DIM][shape::ROW];
    alignas(16) float columns[shape::STAGES][HEAD_DIM][UNIT_CHANNELS]; /* of the feedback matrix */
    uint8_t bytes[shape::WARPS][shape::UNITS][WARP];                   /* scale bytes, of blocks */
    uint16_t places[HEAD_DIM];                                         /* of channels */

    /* Asks for a unit's columns down to the diagonal, or nothing past the last one. */
    __device__ void request(const float *feedback, int unit)
    {
        constexpr int QUADS = UNIT_CHANNELS / 4;
        const int n = unit < shape::UNITS ? (unit + 1) * UNIT_CHANNELS * QUADS : 0;
        for (int i = threadIdx.x; i < n; i += shape::THREADS) {
            const int row = i / QUADS, column = i % QUADS * 4;
            request_floats(&columns[unit % shape::STAGES][row][column],
                           feedback + (size_t)row * HEAD_DIM + unit * UNIT_CHANNELS + column, 4);
        }
        __pipeline_commit();
    }
};

/* A warp's slots of a context, of which first_new .. end_new - 1 are new. */
struct many_slots {
    uint32_t first, first_new, end_new, n_positions;

    /* Of the slots that can be stored. */
    __device__ bool is_wanted(uint32_t slot) const { return slot >= first_new && slot < end_new && slot < n_positions; }
};

/* A warp's tokens on their way. */
template <int HEAD_DIM, bool SCALED>
struct many_packer {
    using shape = many_shape<HEAD_DIM>;

    const head_layout &layout;
    many_smem<HEAD_DIM> &smem;
    float (&y)[HEAD_DIM][shape::ROW];
    uint8_t (&bytes)[shape::UNITS][WARP];

    /* Makes heads of the warp's tokens. Returns a bit for each slot that may be stored. context_at: element of x where
     * the first new token's begins. */
    template <uint32_t X_TYPE>
    __device__ uint32_t make_tokens(const head_maker<HEAD_DIM, X_TYPE> &maker, const many_slots &slots,
                                    size_t context_at)
    {
        constexpr int TOGETHER = shape::TOGETHER, N = head_maker<HEAD_DIM, X_TYPE>::N;
        float next[TOGETHER][N];
        const auto load = [&](uint32_t first) {
#pragma unroll
            for (int t = 0; t < TOGETHER; t++)
                maker.load(context_at + (first + t - slots.first_new) * maker.work.token_stride,
                           slots.is_wanted(first + t), next[t]);
        };
        load(slots.first);
        uint32_t stored = 0;
#pragma unroll 1
        for (int at = 0; at < WARP; at += TOGETHER) {
            float x[TOGETHER][N];
            uint32_t positions[TOGETHER];
            bool wanted[TOGETHER];
#pragma unroll
            for (int t = 0; t < TOGETHER; t++) {
                positions[t] = slots.first + at + t;
                wanted[t] = slots.is_wanted(positions[t]);
#pragma unroll
                for (int i = 0; i < N; i++)
                    x[t][i] = next[t][i];
            }
            if (at + TOGETHER < WARP)
                load(slots.first + at + TOGETHER);
            const auto exchange = [&](const float (&x)[TOGETHER][N], float (&partners)[TOGETHER][N]) {
                store_tokens(x, at, [](uint32_t c) { return c; });
                __syncwarp();
#pragma unroll
                for (int i = 0; i < N; i++) {
                    float quad[TOGETHER];
                    load_floats(&y[holds_channel<HEAD_DIM>(i) ? maker.turns.partner[i] : 0][at], quad);
#pragma unroll
                    for (int t = 0; t < TOGETHER; t++)
                        partners[t][i] = quad[t];
                }
                __syncwarp();
            };
            stored |= maker.template make_heads<TOGETHER>(positions, wanted, x, exchange) << at;
            store_tokens(x, at, [this](uint32_t c) { return smem.places[c]; });
        }
        __syncwarp();
        return stored;
    }

    /* Chooses the scale bytes of the lane's token. */
    __device__ void choose_bytes()
    {
        const int block_units = (int)layout.block_size / UNIT_CHANNELS;
#pragma unroll 1
        for (int first = 0; first < shape::UNITS; first += block_units) {
            const int end = min(first + block_units, shape::UNITS);
            float largest = 0.0f; /* with its sign; the first of equal ones */
            for (int unit = first; unit < end; unit++)
                largest = larger_of(largest, largest_of_unit(unit));
            scale_trial<SCALED> trial;
            trial.begin(largest, layout.mantissa_bits);
            float sums[2][UNIT_CHANNELS] = {};
#pragma unroll 1
            for (int unit = first; unit < end; unit++)
#pragma unroll
                for (int i = 0; i < UNIT_CHANNELS; i++) {
                    float r[2];
                    trial.errors(y[unit * UNIT_CHANNELS + i][lane_of_thread()], r);
                    sums[0][i] = __fmaf_rn(r[0], r[0], sums[0][i]);
                    sums[1][i] = __fmaf_rn(r[1], r[1], sums[1][i]);
                }
            bytes[first / block_units][lane_of_thread()] = (uint8_t)trial.choose(sum_of(sums[0]), sum_of(sums[1]));
        }
        __syncwarp();
    }

    /* Takes the errors of all places before the unit from what the unit's tokens are. */
    __device__ void look_back(int unit)
    {
        const uint32_t token = lane_of_thread() / UNIT_LANES * QUAD_CHANNELS;
        const uint32_t column = lane_of_thread() % UNIT_LANES * QUAD_CHANNELS;
        const float (*const columns)[UNIT_CHANNELS] = smem.columns[unit % shape::STAGES];
        float rest[QUAD_CHANNELS][QUAD_CHANNELS]; /* [place][token] */
#pragma unroll
        for (int j = 0; j < QUAD_CHANNELS; j++)
            load_floats(&y[unit * UNIT_CHANNELS + column + j][token], rest[j]);
#pragma unroll 8
        for (int place = 0; place < unit * UNIT_CHANNELS; place++) {
            float errors[QUAD_CHANNELS], values[QUAD_CHANNELS];
            load_floats(&y[place][token], errors);
            load_floats(&columns[place][column], values);
#pragma unroll
            for (int j = 0; j < QUAD_CHANNELS; j++)
#pragma unroll
                for (int t = 0; t < QUAD_CHANNELS; t++)
                    rest[j][t] = __fmaf_rn(-errors[t], values[j], rest[j][t]);
        }
#pragma unroll
        for (int j = 0; j < QUAD_CHANNELS; j++)
            store_floats(&y[unit * UNIT_CHANNELS + column + j][token], rest[j][0], rest[j][1], rest[j][2], rest[j][3]);
        __syncwarp();
    }

    /* Rounds the unit's places of the lane's token, whose errors take their place. */
    template <bool FEEDBACK>
    __device__ void round_unit(int unit, const block_step &step, uint32_t (&quads)[UNIT_LANES])
    {
        const float (*const rows)[UNIT_CHANNELS] = smem.columns[unit % shape::STAGES] + unit * UNIT_CHANNELS;
        float x[UNIT_CHANNELS];
        uint32_t bits[UNIT_CHANNELS];
#pragma unroll
        for (int i = 0; i < UNIT_CHANNELS; i++)
            x[i] = y[unit * UNIT_CHANNELS + i][lane_of_thread()];
#pragma unroll
        for (int i = 0; i < UNIT_CHANNELS; i++) {
            bits[i] = mantissa_bits_of(units_of<SCALED>(x[i], step.inverse), step.low, step.high);
            if (!FEEDBACK)
                continue;
            const float error = __fmaf_rn(-mantissa_of(bits[i]), step.step, x[i]);
            y[unit * UNIT_CHANNELS + i][lane_of_thread()] = error;
#pragma unroll
            for (int quad = i / QUAD_CHANNELS; quad < UNIT_LANES; quad++) {
                float values[QUAD_CHANNELS];
                load_floats(&rows[i][quad * QUAD_CHANNELS], values);
#pragma unroll
                for (int j = 0; j < QUAD_CHANNELS; j++)
                    if (quad * QUAD_CHANNELS + j > i)
                        x[quad * QUAD_CHANNELS + j] = __fmaf_rn(-error, values[j], x[quad * QUAD_CHANNELS + j]);
            }
        }
#pragma unroll
        for (int q = 0; q < UNIT_LANES; q++)
            quads[q] = quad_of(bits[4 * q], bits[4 * q + 1], bits[4 * q + 2], bits[4 * q + 3]);
        __syncwarp();
    }

    /* Rounds and stores all units. All warps of the block come along; those without tokens only bring their share of the
     * feedback matrix. */
    template <bool FEEDBACK>
    __device__ void round_units(const float *feedback, bool has_tokens, bool is_stored, word_writer &words)
    {
#pragma unroll 1
        for (int unit = 0; unit < shape::UNITS; unit++) {
            if (FEEDBACK) {
                __pipeline_wait_prior(0);
                __syncthreads(); /* all have the columns, and are done with those before */
                if (shape::STAGES > 1)
                    smem.request(feedback, unit + 1);
            }
            if (has_tokens) {
                const uint32_t block = unit * UNIT_CHANNELS / layout.block_size, byte = bytes[block][lane_of_thread()];
                uint32_t quads[UNIT_LANES];
                if (FEEDBACK)
                    look_back(unit);
                round_unit<FEEDBACK>(unit, step_of_byte<SCALED>(byte, layout.mantissa_bits), quads);
                if (is_stored) {
                    words.store(unit, quads);
                    if (unit * UNIT_CHANNELS % layout.block_size == 0)
                        words.tile[exponent_offset(&layout, block, words.token)] = (uint8_t)byte;
                }
            }
            if (FEEDBACK && shape::STAGES == 1) {
                __syncthreads();
                smem.request(feedback, unit + 1);
            }
        }
    }

  private:
    /* Four tokens from `at` on, each channel's in row place(channel). */
    template <int N, class Place>
    __device__ void store_tokens(const float (&x)[shape::TOGETHER][N], int at, Place place)
    {
#pragma unroll
        for (int i = 0; i < N; i++)
            if (holds_channel<HEAD_DIM>(i))
                store_floats(&y[place(i * WARP + lane_of_thread())][at], x[0][i], x[1][i], x[2][i], x[3][i]);
    }

    __device__ float largest_of_unit(int unit) const
    {
        float x[UNIT_CHANNELS];
#pragma unroll
        for (int i = 0; i < UNIT_CHANNELS; i++)
            x[i] = y[unit * UNIT_CHANNELS + i][lane_of_thread()];
#pragma unroll
        for (int apart = 1; apart < UNIT_CHANNELS; apart *= 2)
#pragma unroll
            for (int i = 0; i < UNIT_CHANNELS; i += 2 * apart)
                x[i] = larger_of(x[i], x[i + apart]);
        return x[0];
    }

    /* In halves. */
    __device__ static float sum_of(float (&sums)[UNIT_CHANNELS])
    {
#pragma unroll
        for (int i = 0; i < 8; i++)
            sums[i] = __fadd_rn(sums[i], sums[i + 8]);
#pragma unroll
        for (int i = 0; i < 4; i++)
            sums[i] = __fadd_rn(sums[i], sums[i + 4]);
        return __fadd_rn(__fadd_rn(sums[0], sums[2]), __fadd_rn(sums[1], sums[3]));
    }
};

#endif /* KSORT_CUDA_PACK_MANY_PACKER_CUH */
