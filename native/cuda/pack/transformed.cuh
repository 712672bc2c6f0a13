/* The encoder of transformed heads over a strip: a warp holds T tokens in common/transform.cuh's layout, rounded
 * together.
 *
 *     channel c: lane c % WARP rounds y[c / WARP]; its error goes to all lanes, which carry it to their later channels
 *     feedback   [HEAD_DIM][HEAD_DIM]: panels of FEEDBACK_ROWS rows come through shared memory, shared by all warps:
 *                panel p in use, p + 1 and p + 2 on their way
 *
 * A step is a chain of about ten operations and a shuffle; the warp's T tokens and the other warps fill its waits.
 */
#ifndef KSORT_CUDA_PACK_TRANSFORMED_CUH
#define KSORT_CUDA_PACK_TRANSFORMED_CUH

#include <cuda_pipeline.h>

#include "pack/strip.cuh"

/* The heads of a warp. */
template <int HEAD_DIM>
struct warp_heads {
    static constexpr int T = strip_shape<HEAD_DIM>::TOKENS_A_WARP;
    static constexpr int N = strip_shape<HEAD_DIM>::REGISTERS;
    float y[T][N];
    uint32_t exponents[T][N];
    uint32_t mantissas[T][N]; /* in the low 8 bits */
    bool any_wanted;          /* the others are zeros */
};

/* Loads, turns and transforms the warp's heads, and chooses their exponents. */
template <int HEAD_DIM, class Smem>
__device__ inline void load_heads(const pack_work &work, const pack_side &side, const strip_place &strip,
                                  const head_turns<HEAD_DIM> &turns, const transform_entries<HEAD_DIM> &entries,
                                  Smem &smem, warp_heads<HEAD_DIM> &heads)
{
    using heads_type = warp_heads<HEAD_DIM>;
    heads.any_wanted = false;
#pragma unroll
    for (int t = 0; t < heads_type::T; t++) {
        const uint32_t s = threadIdx.x / WARP * heads_type::T + t;
        const bool wanted = is_wanted(work, strip, s);
        float (&y)[heads_type::N] = heads.y[t];
        uint32_t before = 0, after = 0;
#pragma unroll
        for (int i = 0; i < heads_type::N; i++) {
            const size_t at = head_at<HEAD_DIM>(work, strip, strip.kv_head, s) + i * WARP + lane_of_thread();
            y[i] = wanted && holds_channel<HEAD_DIM>(i) ? load_float(side.x, work.x_type, at) : 0.0f;
            before = max(before, magnitude_bits(y[i]));
        }
        if (wanted) {
            if (side.has_rope) {
                head_cos_sin<HEAD_DIM> cos_sin;
                load_cos_sin<HEAD_DIM>(work.rope, strip.first_slot + s, turns, cos_sin);
                rope_head<HEAD_DIM>(work.rope, turns, cos_sin, smem.rows[s], y);
            }
            transform_key<HEAD_DIM>(side.transform, entries, smem.rows[s], y);
        }
#pragma unroll
        for (int i = 0; i < heads_type::N; i++)
            after = max(after, magnitude_bits(y[i]));
        const bool stored = may_store(work, side, wanted, before, after, ALL_LANES);
        if (lane_of_thread() == 0)
            smem.is_stored[s] = stored;
        heads.any_wanted = heads.any_wanted || wanted;
        least_error_exponents<heads_type::N>(y, side.cache.layout, heads.exponents[t]);
    }
}

/* Asks for panel `panel` of a head's feedback [HEAD_DIM][HEAD_DIM], or nothing past the last one: each warp brings
 * whole rows, from the first register of channels that are not all rounded. */
template <int HEAD_DIM, class Smem>
__device__ inline void request_feedback(const float *feedback, int panel, Smem &smem)
{
    if (panel < HEAD_DIM / FEEDBACK_ROWS)
        for (int k = threadIdx.x / WARP; k < FEEDBACK_ROWS; k += strip_shape<HEAD_DIM>::THREADS / WARP) {
            const int row = panel * FEEDBACK_ROWS + k;
            for (int column = row / WARP * WARP + lane_of_thread(); column < HEAD_DIM; column += WARP)
                __pipeline_memcpy_async(&smem.feedback[panel % FEEDBACK_STAGES][k][column],
                                        &feedback[(size_t)row * HEAD_DIM + column], sizeof(float));
        }
    __pipeline_commit();
}

/* Rounds the channels of one panel, which stand in register I of lanes first_lane onwards. */
template <int HEAD_DIM, int I>
__device__ inline void round_panel(const float (&panel)[FEEDBACK_ROWS][strip_shape<HEAD_DIM>::PADDED_DIM],
                                   int first_lane,
                                   const struct block_step (&steps)[strip_shape<HEAD_DIM>::TOKENS_A_WARP],
                                   warp_heads<HEAD_DIM> &heads)
{
    using heads_type = warp_heads<HEAD_DIM>;
    const int lane = lane_of_thread();
#pragma unroll 8 /* all of them would crowd the instruction cache */
    for (int k = 0; k < FEEDBACK_ROWS; k++)
#pragma unroll
        for (int t = 0; t < heads_type::T; t++) {
            float (&y)[heads_type::N] = heads.y[t];
            const uint32_t bits = mantissa_bits_of(units_of_step(y[I], steps[t].inverse), steps[t].low, steps[t].high);
            /* The product is exact: fused or not, one rounding. */
            const float own_error = __fmaf_rn(-mantissa_of(bits), steps[t].step, y[I]);
            const float error = __shfl_sync(ALL_LANES, own_error, first_lane + k);
            heads.mantissas[t][I] = lane == first_lane + k ? bits : heads.mantissas[t][I];
        /* Channels that are rounded already change as well: nobody looks at them again. */
#pragma unroll
            for (int i = I; i < heads_type::N; i++)
                y[i] = __fsub_rn(y[i], __fmul_rn(error, panel[k][i * WARP + lane]));
        }
}

/* Rounds register I of all heads, panel after panel, then the registers after it. All warps of the block come along;
 * those whose heads are all unwanted only bring their share of the panels. */
template <int HEAD_DIM, int I, class Smem>
__device__ inline void round_registers(const float *feedback, uint32_t mantissa_bits, Smem &smem,
                                       warp_heads<HEAD_DIM> &heads)
{
    if constexpr (I < strip_shape<HEAD_DIM>::REGISTERS) {
        constexpr int FIRST = I * WARP / FEEDBACK_ROWS;
        constexpr int END = ((I + 1) * WARP < HEAD_DIM ? (I + 1) * WARP : HEAD_DIM) / FEEDBACK_ROWS;
        struct block_step steps[strip_shape<HEAD_DIM>::TOKENS_A_WARP];
#pragma unroll
        for (int t = 0; t < strip_shape<HEAD_DIM>::TOKENS_A_WARP; t++)
            steps[t] = block_step_of(heads.exponents[t][I], mantissa_bits);
#pragma unroll 1
        for (int panel = FIRST; panel < END; panel++) {
            __pipeline_wait_prior(FEEDBACK_STAGES - 2);
            __syncthreads(); /* all have panel `panel`, and are done with the one before it, whose place is next */
            request_feedback<HEAD_DIM>(feedback, panel + FEEDBACK_STAGES - 1, smem);
            if (heads.any_wanted)
                round_panel<HEAD_DIM, I>(smem.feedback[panel % FEEDBACK_STAGES], (panel - FIRST) * FEEDBACK_ROWS, steps,
                                         heads);
        }
        round_registers<HEAD_DIM, I + 1>(feedback, mantissa_bits, smem, heads);
    }
}

template <int HEAD_DIM>
__device__ inline void round_without_feedback(uint32_t mantissa_bits, warp_heads<HEAD_DIM> &heads)
{
#pragma unroll
    for (int t = 0; t < warp_heads<HEAD_DIM>::T; t++)
#pragma unroll
        for (int i = 0; i < warp_heads<HEAD_DIM>::N; i++) {
            const struct block_step step = block_step_of(heads.exponents[t][i], mantissa_bits);
            heads.mantissas[t][i] = mantissa_bits_of(units_of_step(heads.y[t][i], step.inverse), step.low, step.high);
        }
}

template <int HEAD_DIM, class Smem>
__device__ inline void stage_heads(const head_layout &layout, const warp_heads<HEAD_DIM> &heads, Smem &smem)
{
#pragma unroll
    for (int t = 0; t < warp_heads<HEAD_DIM>::T; t++)
#pragma unroll
        for (int i = 0; i < warp_heads<HEAD_DIM>::N; i++) {
            const uint32_t s = threadIdx.x / WARP * warp_heads<HEAD_DIM>::T + t, c = i * WARP + lane_of_thread();
            if (!holds_channel<HEAD_DIM>(i))
                continue;
            reinterpret_cast<uint8_t *>(smem.quads[s])[c] = (uint8_t)heads.mantissas[t][i];
            if ((c & (layout.block_size - 1)) == 0) /* a power of two, unknown to the compiler */
                smem.exponents[c >> (__ffs(layout.block_size) - 1)][s] = (uint8_t)heads.exponents[t][i];
        }
}

/* Stores the strip's mantissas and exponents from shared memory; tokens that are not stored keep their bytes. */
template <int HEAD_DIM, class Smem>
__device__ inline void store_strip(const head_layout &layout, const strip_place &strip, const Smem &smem)
{
    for (uint32_t i = threadIdx.x; i < HEAD_DIM / 16 * STRIP_TOKENS; i += strip_shape<HEAD_DIM>::THREADS) {
        const uint32_t unit = i / STRIP_TOKENS, s = i % STRIP_TOKENS;
        const uint32_t *from = smem.quads[s] + 4 * unit;
        const uint32_t quads[4] = {from[0], from[1], from[2], from[3]};
        if (smem.is_stored[s])
            store_quads(layout, strip.tile, strip.first_token + s, unit, quads);
    }
    for (uint32_t i = threadIdx.x; i < layout.n_blocks * STRIP_TOKENS; i += strip_shape<HEAD_DIM>::THREADS) {
        const uint32_t b = i / STRIP_TOKENS, s = i % STRIP_TOKENS;
        if (smem.is_stored[s])
            strip.tile[exponent_offset(&layout, b, strip.first_token + s)] = smem.exponents[b][s];
    }
}

/* Rounds a strip of one head. */
template <int HEAD_DIM>
__device__ inline void pack_transformed(const pack_work &work, const pack_side &side, uint32_t strip_index,
                                        uint8_t *shared)
{
    head_turns<HEAD_DIM> turns;
    transform_entries<HEAD_DIM> entries;
    /* Asked for before it is known whether the strip is new: a single token waits for them. */
    if (side.has_rope)
        load_turns<HEAD_DIM>(work.rope, blockIdx.y, turns);
    load_transform<HEAD_DIM>(side.transform, blockIdx.y, entries);
    strip_place strip;
    if (!find_strip(work, side, strip_index, blockIdx.y, strip))
        return;
    pack_smem<HEAD_DIM> &smem = *reinterpret_cast<pack_smem<HEAD_DIM> *>(shared);
    const head_layout &layout = side.cache.layout;
    const float *feedback = side.transform.feedback;
    if (feedback) {
        feedback += (size_t)strip.kv_head * HEAD_DIM * HEAD_DIM;
        for (int panel = 0; panel < FEEDBACK_STAGES - 1; panel++)
            request_feedback<HEAD_DIM>(feedback, panel, smem);
    }
    warp_heads<HEAD_DIM> heads;
    load_heads<HEAD_DIM>(work, side, strip, turns, entries, smem, heads);
    if (feedback)
        round_registers<HEAD_DIM, 0>(feedback, layout.mantissa_bits, smem, heads);
    else
        round_without_feedback<HEAD_DIM>(layout.mantissa_bits, heads);
    stage_heads<HEAD_DIM>(layout, heads, smem);
    __syncthreads();
    store_strip<HEAD_DIM>(layout, strip, smem);
}

#endif /* KSORT_CUDA_PACK_TRANSFORMED_CUH */
