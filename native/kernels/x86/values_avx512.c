/* Weights, and weighted values of float types, with AVX-512.
 *
 * Weights: 4 rows of the same tokens at once, whose maxima and sums are found side by side.
 *
 * Values: accumulators of up to 8 rows x 32 channels (16 registers) over the tokens of the tile:
 *
 *               32 channels
 *             +-------------+     for every token: load 2 registers of V (converted as they come),
 *     8 rows  | 16 registers|     8 weights from memory, 16 multiply-adds
 *             +-------------+
 *
 * For up to 4 rows: 64 channels instead. A column of a tile touches one or two cache lines of each row, an order that
 * hardware prefetching does not follow: the loop asks for the same column of the next tile.
 * Bytes moved: the tile's V rows once for every 8 rows (from L1 or L2 after the first); weights [rows][64] from L1.
 */
#include "template/exp_constants.h"
#include "x86/float_rows_avx512.h"
#include "x86/reduce_avx512.h"

#define SOFTMAX_ROWS 4
#define ROWS_AT_ONCE 8
#define MAX_REGISTERS 4 /* of one row's channels */

/* Adding this to a float below 2^22 in magnitude rounds it: the sum's lowest bits are the whole number. */
#define ROUNDING 0x1.8p23f

#define EXP_Q0 0x1.00021ep-1f
#define EXP_Q1 0x1.55559ap-3f

/* 2^(i/16), less what i << 19 adds to it. */
static const _Alignas(64) uint32_t POWERS[16] = {
    0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
    0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d,
};

/* exp of lanes of four registers, x <= 0, within 1 ulp; 0 outside `lanes`. Where x is below EXP_LOWEST or NaN, that of
 * EXP_LOWEST.
 *
 * x = n ln(2) / 16 + r with n whole and |r| <= ln(2) / 32, so exp(x) = 2^(n/16) * (1 + r + r^2 (Q0 + Q1 r)), with the
 * minimax polynomial for the relative error, 1.6e-9, and the power from a table of 16: two multiply-adds less than
 * template/exp_constants.h takes. No comparisons, as they would share units with multiply-adds. Step by step over the
 * registers, as each step waits for the one before. */
ALWAYS_INLINE void exp_of_four(const __mmask16 lanes[4], __m512 x[4])
{
    const __m512i powers = _mm512_load_si512(POWERS);
    __m512 r[4], p[4], power[4];
    __m512i n[4];
    for (int i = 0; i < 4; i++) {
        x[i] = _mm512_max_ps(x[i], _mm512_set1_ps(EXP_LOWEST));
        __m512 rounded = _mm512_fmadd_ps(x[i], _mm512_set1_ps(16 * EXP_LOG2_E), _mm512_set1_ps(ROUNDING));
        n[i] = _mm512_castps_si512(rounded);
        r[i] = _mm512_sub_ps(rounded, _mm512_set1_ps(ROUNDING));
    }
    for (int i = 0; i < 4; i++)
        x[i] = _mm512_fnmadd_ps(r[i], _mm512_set1_ps(EXP_LN2_HIGH / 16), x[i]);
    for (int i = 0; i < 4; i++)
        r[i] = _mm512_fnmadd_ps(r[i], _mm512_set1_ps(EXP_LN2_LOW / 16), x[i]);
    for (int i = 0; i < 4; i++) { /* n's lowest four bits choose a power, the others go to its exponent */
        __m512i bits = _mm512_permutexvar_epi32(n[i], powers);
        power[i] = _mm512_castsi512_ps(_mm512_add_epi32(bits, _mm512_slli_epi32(n[i], 19)));
    }
    for (int i = 0; i < 4; i++)
        p[i] = _mm512_fmadd_ps(_mm512_set1_ps(EXP_Q1), r[i], _mm512_set1_ps(EXP_Q0));
    for (int i = 0; i < 4; i++)
        p[i] = _mm512_fmadd_ps(p[i], r[i], _mm512_set1_ps(1.0f));
    for (int i = 0; i < 4; i++)
        p[i] = _mm512_mul_ps(p[i], r[i]);
    for (int i = 0; i < 4; i++)
        x[i] = _mm512_maskz_fmadd_ps(lanes[i], power[i], p[i], power[i]);
}

/* Lane r, a constant, in all lanes. */
ALWAYS_INLINE __m512 lane_in_all(__m128 x, const int r)
{
    return _mm512_permutexvar_ps(_mm512_set1_epi32(r), _mm512_castps128_ps512(x));
}

/* Lanes of tokens i .. i+15 within begin .. end-1. */
ALWAYS_INLINE __mmask16 tokens_within(uint32_t begin, uint32_t end, uint32_t i)
{
    return lanes_below(end, i) & (__mmask16)~lanes_below(begin, i);
}

/* exp(before - now) of SOFTMAX_ROWS rows, 1 where both are the same (both may be -inf). */
static __m128 rescale_factors(__m128 before, __m128 now)
{
    _Alignas(16) float factors[SOFTMAX_ROWS];
    _mm_store_ps(factors, _mm_sub_ps(before, now));
    for (int r = 0; r < SOFTMAX_ROWS; r++)
        factors[r] = expf(factors[r]);
    return _mm_mask_mov_ps(_mm_load_ps(factors), _mm_cmp_ps_mask(before, now, _CMP_EQ_OQ), _mm_set1_ps(1.0f));
}

/* Rows 0 .. n_rows-1 of the pointers given, which see the tokens of `lanes`. n_rows is a constant up to SOFTMAX_ROWS.
 * Few tiles have a new maximum: where none does, weights do not wait for the largest score to be found. */
ALWAYS_INLINE void softmax_rows(float (*scores)[KSORT_TILE_TOKENS], const int n_rows,
                                const __mmask16 lanes[STRIPS_PER_TILE], struct softmax_state *states, float *rescale)
{
    const __mmask8 fields = (__mmask8)((1u << 2 * n_rows) - 1), rows = (__mmask8)((1u << n_rows) - 1);
    __m256 state = _mm256_maskz_loadu_ps(fields, states);
    state = _mm256_permutevar8x32_ps(state, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7)); /* maxima, then sums */
    __m128 before = _mm256_castps256_ps128(state), now = before, factors = _mm_set1_ps(1.0f);
    __m512 largest[SOFTMAX_ROWS], sums[SOFTMAX_ROWS];
    __mmask16 rises = 0;
    __mmask8 overflows = 0;
    for (int r = 0; r < n_rows; r++) {
        __m512i magnitudes = _mm512_setzero_si512(); /* twice the bits */
        largest[r] = _mm512_set1_ps(-INFINITY);
        for (int i = 0; i < STRIPS_PER_TILE; i++) {
            __m512 score = _mm512_loadu_ps(&scores[r][STRIP_TOKENS * i]);
            largest[r] = _mm512_mask_max_ps(largest[r], lanes[i], largest[r], score);
            __m512i bits = _mm512_slli_epi32(_mm512_castps_si512(score), 1);
            magnitudes = _mm512_mask_max_epu32(magnitudes, lanes[i], magnitudes, bits);
        }
        const __m512i infinity = _mm512_set1_epi32((int32_t)(2u * FLOAT_MAGNITUDE_INF));
        __mmask16 not_finite = _mm512_cmpge_epu32_mask(magnitudes, infinity);
        overflows |= (__mmask8)((not_finite != 0) << r);
        rises |= _mm512_cmp_ps_mask(largest[r], lane_in_all(before, r), _CMP_GT_OQ);
    }
    for (int r = n_rows; r < SOFTMAX_ROWS; r++)
        largest[r] = largest[0];
    if (rises) {
        now = _mm_max_ps(before, maxima_of_four(largest));
        factors = rescale_factors(before, now);
    }
    for (int r = 0; r < n_rows; r++) {
        __m512 x[STRIPS_PER_TILE];
        for (int i = 0; i < STRIPS_PER_TILE; i++)
            x[i] = _mm512_sub_ps(_mm512_loadu_ps(&scores[r][STRIP_TOKENS * i]), lane_in_all(now, r));
        exp_of_four(lanes, x);
        for (int i = 0; i < STRIPS_PER_TILE; i++)
            _mm512_storeu_ps(&scores[r][STRIP_TOKENS * i], x[i]);
        sums[r] = _mm512_add_ps(_mm512_add_ps(x[0], x[1]), _mm512_add_ps(x[2], x[3]));
    }
    for (int r = n_rows; r < SOFTMAX_ROWS; r++)
        sums[r] = sums[0];
    __m128 sum = _mm_add_ps(_mm_mul_ps(_mm256_extractf128_ps(state, 1), factors), sums_of_four(sums));
    sum = _mm_mask_mov_ps(sum, overflows, _mm_set1_ps(NAN));
    _mm256_mask_storeu_ps(states, fields, _mm256_set_m128(_mm_unpackhi_ps(now, sum), _mm_unpacklo_ps(now, sum)));
    _mm_mask_storeu_ps(rescale, rows, factors);
}

void ksort_avx512_softmax_tile(float (*scores)[KSORT_TILE_TOKENS], uint32_t n_rows, uint32_t begin, uint32_t end,
                               struct softmax_state *states, float *rescale)
{
    __mmask16 lanes[4];
    for (int i = 0; i < 4; i++)
        lanes[i] = tokens_within(begin, end, 16 * i);
    for (; n_rows >= 4; n_rows -= 4, scores += 4, states += 4, rescale += 4)
        softmax_rows(scores, 4, lanes, states, rescale);
    switch (n_rows) {
    case 1: softmax_rows(scores, 1, lanes, states, rescale); break;
    case 2: softmax_rows(scores, 2, lanes, states, rescale); break;
    case 3: softmax_rows(scores, 3, lanes, states, rescale); break;
    }
}

/* Rows 0 .. n_rows-1 of the pointers given, channels c .. c+16*n_registers-1. type, n_rows and n_registers are
 * constants. */
ALWAYS_INLINE void accumulate_rows(const struct tile_span *values, const uint32_t type, uint32_t c, const int n_rows,
                                   const int n_registers, const float (*weights)[KSORT_TILE_TOKENS],
                                   const float *rescale, float *accumulators, size_t stride)
{
    const uint32_t value_bytes = type == KSORT_F32 ? 4 : 2, column_bytes = n_registers * 16 * value_bytes;
    __mmask16 lanes[MAX_REGISTERS];
    __m512 sums[ROWS_AT_ONCE][MAX_REGISTERS];
    for (int i = 0; i < n_registers; i++)
        lanes[i] = lanes_below(values->layout->head_dim, c + 16 * i);
    for (int r = 0; r < n_rows; r++)
        for (int i = 0; i < n_registers; i++) {
            __m512 before = _mm512_maskz_loadu_ps(lanes[i], accumulators + r * stride + c + 16 * i);
            sums[r][i] = _mm512_mul_ps(before, _mm512_set1_ps(rescale[r]));
        }
    for (uint32_t token = values->begin; token < values->end; token++) {
        const void *row = values->tile + row_offset(values->layout, token);
        for (uint32_t i = 0; i < column_bytes; i += CACHE_LINE)
            PREFETCH_NEXT(values->next + row_offset(values->layout, token) + c * value_bytes + i);
        __m512 value[MAX_REGISTERS];
        for (int i = 0; i < n_registers; i++)
            value[i] = load_values(row, type, c + 16 * i, lanes[i]);
        for (int r = 0; r < n_rows; r++) {
            __m512 weight = _mm512_set1_ps(weights[r][token]);
            for (int i = 0; i < n_registers; i++)
                sums[r][i] = _mm512_fmadd_ps(weight, value[i], sums[r][i]);
        }
    }
    for (int r = 0; r < n_rows; r++)
        for (int i = 0; i < n_registers; i++)
            _mm512_mask_storeu_ps(accumulators + r * stride + c + 16 * i, lanes[i], sums[r][i]);
}

/* Up to ROWS_AT_ONCE rows, all channels. type is a constant. */
ALWAYS_INLINE void accumulate_some(const struct tile_span *v, const uint32_t type, uint32_t n_rows,
                                   const float (*w)[KSORT_TILE_TOKENS], const float *s, float *a, size_t stride)
{
    const uint32_t step = n_rows > 4 ? 32 : 64;
    for (uint32_t c = 0; c < v->layout->head_dim; c += step) {
        switch (n_rows) {
        case 1: accumulate_rows(v, type, c, 1, 4, w, s, a, stride); break;
        case 2: accumulate_rows(v, type, c, 2, 4, w, s, a, stride); break;
        case 3: accumulate_rows(v, type, c, 3, 4, w, s, a, stride); break;
        case 4: accumulate_rows(v, type, c, 4, 4, w, s, a, stride); break;
        case 5: accumulate_rows(v, type, c, 5, 2, w, s, a, stride); break;
        case 6: accumulate_rows(v, type, c, 6, 2, w, s, a, stride); break;
        case 7: accumulate_rows(v, type, c, 7, 2, w, s, a, stride); break;
        default: accumulate_rows(v, type, c, 8, 2, w, s, a, stride);
        }
    }
}

ALWAYS_INLINE void accumulate_of_type(const struct tile_span *v, const uint32_t type, uint32_t n_rows,
                                      const float (*weights)[KSORT_TILE_TOKENS], const float *rescale,
                                      float *accumulators, size_t stride)
{
    for (uint32_t row = 0; row < n_rows; row += ROWS_AT_ONCE)
        accumulate_some(v, type, (uint32_t)min_size(n_rows - row, ROWS_AT_ONCE), weights + row, rescale + row,
                        accumulators + row * stride, stride);
}

void ksort_avx512_accumulate_float(const struct tile_span *values, uint32_t n_rows,
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
