/* Weights, and weighted values of float types, with AVX2.
 *
 *     accumulators of up to 4 rows x 16 channels (8 registers) over the tokens of the tile:
 *
 *               16 channels
 *             +------------+     for every token: load 2 registers of V (converted as they come),
 *     4 rows  | 8 registers|     4 weights from memory, 8 multiply-adds
 *             +------------+
 *
 * The loop asks for the same column of the next tile: see values_avx512.c. Channels after the last 16 go one by one.
 * Bytes moved: the tile's V rows once for every 4 rows (from L1 or L2 after the first); weights [rows][64] from L1.
 */
#include "half.h"
#include "template/exp_constants.h"
#include "x86/float_rows_avx2.h"

#define ROWS_AT_ONCE 4
#define CHANNELS_AT_ONCE 16

ALWAYS_INLINE __m256 exp_avx2(__m256 x)
{
    __m256 n =
        _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(EXP_LOG2_E)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(EXP_LN2_HIGH), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(EXP_LN2_LOW), r);
    __m256 p = _mm256_fmadd_ps(_mm256_set1_ps(EXP_P4), r, _mm256_set1_ps(EXP_P3));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(EXP_P2));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(EXP_P1));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(EXP_P0));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(p, _mm256_castsi256_ps(power));
}

/* All bits set in lanes of tokens i .. i+7 within begin .. end-1. */
ALWAYS_INLINE __m256 tokens_within(uint32_t begin, uint32_t end, uint32_t i)
{
    __m256i token = _mm256_add_epi32(_mm256_set1_epi32((int)i), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    __m256i before_begin = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)begin), token);
    __m256i before_end = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)end), token);
    return _mm256_castsi256_ps(_mm256_andnot_si256(before_begin, before_end));
}

ALWAYS_INLINE float largest_lane(__m256 x)
{
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

/* One row; returns the factor for what was accumulated before. */
static float softmax_row(float scores[KSORT_TILE_TOKENS], uint32_t begin, uint32_t end, struct softmax_state *state)
{
    const __m256 infinity = _mm256_set1_ps(INFINITY), sign_bit = _mm256_set1_ps(-0.0f);
    __m256 maxima = _mm256_set1_ps(state->max), overflowed = _mm256_setzero_ps();
    for (uint32_t i = 0; i < KSORT_TILE_TOKENS; i += 8) {
        __m256 seen = tokens_within(begin, end, i), score = _mm256_loadu_ps(scores + i);
        maxima = _mm256_max_ps(maxima, _mm256_blendv_ps(_mm256_set1_ps(-INFINITY), score, seen));
        __m256 too_large = _mm256_cmp_ps(_mm256_andnot_ps(sign_bit, score), infinity, _CMP_NLT_UQ);
        overflowed = _mm256_or_ps(overflowed, _mm256_and_ps(seen, too_large));
    }
    float max = largest_lane(maxima);
    float rescale = state->max == max ? 1.0f : expf(state->max - max);
    __m256 sum = _mm256_setzero_ps();
    for (uint32_t i = 0; i < KSORT_TILE_TOKENS; i += 8) {
        __m256 below = _mm256_sub_ps(_mm256_loadu_ps(scores + i), _mm256_set1_ps(max));
        __m256 counts = _mm256_cmp_ps(below, _mm256_set1_ps(EXP_LOWEST), _CMP_GE_OQ);
        counts = _mm256_and_ps(counts, tokens_within(begin, end, i));
        __m256 weights = _mm256_and_ps(exp_avx2(below), counts);
        sum = _mm256_add_ps(sum, weights);
        _mm256_storeu_ps(scores + i, weights);
    }
    state->max = max;
    state->sum = _mm256_movemask_ps(overflowed) ? NAN : state->sum * rescale + sum_of_lanes(sum);
    return rescale;
}

void ksort_avx2_softmax_tile(float (*scores)[KSORT_TILE_TOKENS], uint32_t n_rows, uint32_t begin, uint32_t end,
                             struct softmax_state *states, float *rescale)
{
    for (uint32_t row = 0; row < n_rows; row++)
        rescale[row] = softmax_row(scores[row], begin, end, &states[row]);
}

/* Rows 0 .. n_rows-1 of the pointers given, channels c .. c+15. type and n_rows are constants. */
ALWAYS_INLINE void accumulate_rows(const struct tile_span *values, const uint32_t type, uint32_t c, const int n_rows,
                                   const float (*weights)[KSORT_TILE_TOKENS], const float *rescale, float *accumulators,
                                   size_t stride)
{
    const uint32_t value_bytes = type == KSORT_F32 ? 4 : 2; /* 16 values: a cache line or half of one */
    __m256 sums[ROWS_AT_ONCE][2];
    for (int r = 0; r < n_rows; r++)
        for (int i = 0; i < 2; i++) {
            __m256 before = _mm256_loadu_ps(accumulators + r * stride + c + 8 * i);
            sums[r][i] = _mm256_mul_ps(before, _mm256_set1_ps(rescale[r]));
        }
    for (uint32_t token = values->begin; token < values->end; token++) {
        const void *row = values->tile + row_offset(values->layout, token);
        PREFETCH_NEXT(values->next + row_offset(values->layout, token) + c * value_bytes);
        __m256 low = load_values(row, type, c), high = load_values(row, type, c + 8);
        for (int r = 0; r < n_rows; r++) {
            __m256 weight = _mm256_set1_ps(weights[r][token]);
            sums[r][0] = _mm256_fmadd_ps(weight, low, sums[r][0]);
            sums[r][1] = _mm256_fmadd_ps(weight, high, sums[r][1]);
        }
    }
    for (int r = 0; r < n_rows; r++)
        for (int i = 0; i < 2; i++)
            _mm256_storeu_ps(accumulators + r * stride + c + 8 * i, sums[r][i]);
}

/* One row's channels c .. head_dim-1. */
ALWAYS_INLINE void accumulate_rest(const struct tile_span *values, const uint32_t type, uint32_t c,
                                   const float weights[KSORT_TILE_TOKENS], float rescale, float *accumulator)
{
    for (; c < values->layout->head_dim; c++) {
        float sum = accumulator[c] * rescale;
        for (uint32_t token = values->begin; token < values->end; token++)
            sum += weights[token] * load_value(values->tile + row_offset(values->layout, token), type, c);
        accumulator[c] = sum;
    }
}

ALWAYS_INLINE void accumulate_of_type(const struct tile_span *v, const uint32_t type, uint32_t n_rows,
                                      const float (*weights)[KSORT_TILE_TOKENS], const float *rescale,
                                      float *accumulators, size_t stride)
{
    const uint32_t in_registers = v->layout->head_dim / CHANNELS_AT_ONCE * CHANNELS_AT_ONCE;
    for (uint32_t row = 0; row < n_rows; row += ROWS_AT_ONCE) {
        const float (*w)[KSORT_TILE_TOKENS] = weights + row;
        const float *s = rescale + row;
        float *a = accumulators + row * stride;
        for (uint32_t c = 0; c < in_registers; c += CHANNELS_AT_ONCE) {
            switch (min_size(n_rows - row, ROWS_AT_ONCE)) {
            case 1: accumulate_rows(v, type, c, 1, w, s, a, stride); break;
            case 2: accumulate_rows(v, type, c, 2, w, s, a, stride); break;
            case 3: accumulate_rows(v, type, c, 3, w, s, a, stride); break;
            default: accumulate_rows(v, type, c, 4, w, s, a, stride);
            }
        }
    }
    for (uint32_t row = 0; row < n_rows; row++)
        accumulate_rest(v, type, in_registers, weights[row], rescale[row], accumulators + row * stride);
}

void ksort_avx2_accumulate_float(const struct tile_span *values, uint32_t n_rows,
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
