/* Weights, and weighted values of float types, with Advanced SIMD.
 *
 *     accumulators of up to 4 rows x 16 channels (16 registers) over the tokens of the tile; one row: 32 channels, as
 *     4 sums alone would wait for each other
 *
 *               16 channels
 *             +------------+     for every token: load 4 registers of V (converted as they come),
 *     4 rows  |16 registers|     4 weights, 16 multiply-adds by element
 *             +------------+
 *
 * The loop asks for the same column of the next tile (see values_avx512.c). Channels after the last 16 go by fours, the
 * last two alone.
 * Bytes moved: the tile's V rows once for every 4 rows (from L1 or L2 after the first); weights [rows][64] from L1.
 * Arithmetic instructions for 4 rows: 16 FMLA for every 4 conversions (none for f32), so 80%; one row: 50%.
 */
#include "arm/float_rows_neon.h"
#include "template/exp_constants.h"

#define ROWS_AT_ONCE 4
#define MOST_REGISTERS 8 /* of channels */

ALWAYS_INLINE float32x4_t exp_neon(float32x4_t x)
{
    float32x4_t n = vrndnq_f32(vmulq_n_f32(x, EXP_LOG2_E));
    float32x4_t r = vfmsq_f32(x, n, vdupq_n_f32(EXP_LN2_HIGH));
    r = vfmsq_f32(r, n, vdupq_n_f32(EXP_LN2_LOW));
    float32x4_t p = vfmaq_f32(vdupq_n_f32(EXP_P3), vdupq_n_f32(EXP_P4), r);
    p = vfmaq_f32(vdupq_n_f32(EXP_P2), p, r);
    p = vfmaq_f32(vdupq_n_f32(EXP_P1), p, r);
    p = vfmaq_f32(vdupq_n_f32(EXP_P0), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.0f), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.0f), p, r);
    int32x4_t power = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23);
    return vmulq_f32(p, vreinterpretq_f32_s32(power));
}

/* All bits set in lanes of tokens i .. i+3 within begin .. end-1. */
ALWAYS_INLINE uint32x4_t tokens_within(uint32_t begin, uint32_t end, uint32_t i)
{
    uint32x4_t token = vaddq_u32(vdupq_n_u32(i), (uint32x4_t){0, 1, 2, 3});
    return vandq_u32(vcgeq_u32(token, vdupq_n_u32(begin)), vcltq_u32(token, vdupq_n_u32(end)));
}

/* One row; returns the factor for what was accumulated before. */
static float softmax_row(float scores[KSORT_TILE_TOKENS], uint32_t begin, uint32_t end, struct softmax_state *state)
{
    const float32x4_t infinity = vdupq_n_f32(INFINITY);
    float32x4_t maxima = vdupq_n_f32(state->max);
    uint32x4_t in_range = vdupq_n_u32(UINT32_MAX);
    for (uint32_t i = 0; i < KSORT_TILE_TOKENS; i += 4) {
        uint32x4_t seen = tokens_within(begin, end, i);
        float32x4_t score = vbslq_f32(seen, vld1q_f32(scores + i), vdupq_n_f32(-INFINITY));
        maxima = vmaxnmq_f32(maxima, score);
        in_range = vandq_u32(in_range, vornq_u32(vcaltq_f32(score, infinity), seen)); /* NaN is not below either */
    }
    float max = vmaxnmvq_f32(maxima);
    float rescale = state->max == max ? 1.0f : expf(state->max - max);
    float32x4_t sums[2] = {vdupq_n_f32(0.0f), vdupq_n_f32(0.0f)};
    for (uint32_t i = 0; i < KSORT_TILE_TOKENS; i += 4) {
        float32x4_t below = vsubq_f32(vld1q_f32(scores + i), vdupq_n_f32(max));
        uint32x4_t counts = vandq_u32(vcgeq_f32(below, vdupq_n_f32(EXP_LOWEST)), tokens_within(begin, end, i));
        float32x4_t weights = vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(exp_neon(below)), counts));
        sums[i / 4 % 2] = vaddq_f32(sums[i / 4 % 2], weights);
        vst1q_f32(scores + i, weights);
    }
    state->max = max;
    bool overflowed = vminvq_u32(in_range) == 0;
    state->sum = overflowed ? NAN : state->sum * rescale + vaddvq_f32(vaddq_f32(sums[0], sums[1]));
    return rescale;
}

void ksort_neon_softmax_tile(float (*scores)[KSORT_TILE_TOKENS], uint32_t n_rows, uint32_t begin, uint32_t end,
                             struct softmax_state *states, float *rescale)
{
    for (uint32_t row = 0; row < n_rows; row++)
        rescale[row] = softmax_row(scores[row], begin, end, &states[row]);
}

/* Rows 0 .. n_rows-1 of the pointers given, n_registers * 4 channels from c on, or the two from c on if `is_pair`.
 * type, n_rows, n_registers and is_pair are constants. */
ALWAYS_INLINE void accumulate_rows(const struct tile_span *values, const uint32_t type, uint32_t c, const int n_rows,
                                   const int n_registers, const bool is_pair, const float (*weights)[KSORT_TILE_TOKENS],
                                   const float *rescale, float *accumulators, size_t stride)
{
    const uint32_t value_bytes = type == KSORT_F32 ? 4 : 2;
    float32x4_t sums[ROWS_AT_ONCE][MOST_REGISTERS];
    for (int r = 0; r < n_rows; r++)
        for (int i = 0; i < n_registers; i++)
            sums[r][i] = vmulq_n_f32(vld1q_f32(accumulators + r * stride + c + 4 * i), rescale[r]);
    for (uint32_t token = values->begin; token < values->end; token++) {
        const void *row = values->tile + row_offset(values->layout, token);
        PREFETCH_NEXT(values->next + row_offset(values->layout, token) + c * value_bytes);
        float32x4_t value[MOST_REGISTERS];
        for (int i = 0; i < n_registers; i++)
            value[i] = is_pair ? load_two_values(row, type, c) : load_values(row, type, c + 4 * i);
        for (int r = 0; r < n_rows; r++)
            for (int i = 0; i < n_registers; i++)
                sums[r][i] = vfmaq_n_f32(sums[r][i], value[i], weights[r][token]);
    }
    for (int r = 0; r < n_rows; r++)
        for (int i = 0; i < n_registers; i++)
            vst1q_f32(accumulators + r * stride + c + 4 * i, sums[r][i]);
}

/* All channels of n_rows rows. The accumulators have room for whole registers. type and n_rows are constants. */
ALWAYS_INLINE void accumulate_channels(const struct tile_span *v, const uint32_t type, const int n_rows,
                                       const float (*w)[KSORT_TILE_TOKENS], const float *s, float *a, size_t stride)
{
    const uint32_t head_dim = v->layout->head_dim;
    uint32_t c = 0;
    for (; n_rows == 1 && head_dim - c >= 32; c += 32)
        accumulate_rows(v, type, c, n_rows, 8, false, w, s, a, stride);
    for (; head_dim - c >= 16; c += 16)
        accumulate_rows(v, type, c, n_rows, 4, false, w, s, a, stride);
    for (; head_dim - c >= 4; c += 4)
        accumulate_rows(v, type, c, n_rows, 1, false, w, s, a, stride);
    if (c < head_dim)
        accumulate_rows(v, type, c, n_rows, 1, true, w, s, a, stride);
}

ALWAYS_INLINE void accumulate_of_type(const struct tile_span *v, const uint32_t type, uint32_t n_rows,
                                      const float (*weights)[KSORT_TILE_TOKENS], const float *rescale,
                                      float *accumulators, size_t stride)
{
    for (uint32_t row = 0; row < n_rows; row += ROWS_AT_ONCE) {
        const float (*w)[KSORT_TILE_TOKENS] = weights + row;
        const float *s = rescale + row;
        float *a = accumulators + row * stride;
        switch (min_size(n_rows - row, ROWS_AT_ONCE)) {
        case 1: accumulate_channels(v, type, 1, w, s, a, stride); break;
        case 2: accumulate_channels(v, type, 2, w, s, a, stride); break;
        case 3: accumulate_channels(v, type, 3, w, s, a, stride); break;
        default: accumulate_channels(v, type, 4, w, s, a, stride);
        }
    }
}

void ksort_neon_accumulate_float(const struct tile_span *values, uint32_t n_rows,
                                 const float (*weights)[KSORT_TILE_TOKENS], const float *rescale, float *accumulators,
                                 size_t stride)
{
    if (values->layout->type == KSORT_F32)
        accumulate_of_type(values, KSORT_F32, n_rows, weights, rescale, accumulators, stride);
    else if (values->layout->type == KSORT_F16)
        accumulate_of_type(values, KSORT_F16, n_rows, weights, rescale, accumulators, stride);
    else
        accumulate_of_type(values, KSORT_BF16, n_rows, weights, rescale, accumulators, stride);
}
