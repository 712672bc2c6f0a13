/* Weights, and weighted values of float types, with AVX-512.
 *
 *     accumulators of up to 8 rows x 32 channels (16 registers) over the tokens of the tile:
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
#include "vector/exp_constants.h"
#include "x86/float_rows_avx512.h"

#define ROWS_AT_ONCE 8
#define MAX_REGISTERS 4 /* of one row's channels */

ALWAYS_INLINE __m512 exp_avx512(__m512 x)
{
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(EXP_LOG2_E)), _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(EXP_LN2_HIGH), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(EXP_LN2_LOW), r);
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(EXP_P4), r, _mm512_set1_ps(EXP_P3));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(EXP_P2));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(EXP_P1));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(EXP_P0));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

/* Lanes of tokens i .. i+15 within begin .. end-1. */
ALWAYS_INLINE __mmask16 tokens_within(uint32_t begin, uint32_t end, uint32_t i)
{
    return lanes_below(end, i) & (__mmask16)~lanes_below(begin, i);
}

float ksort_avx512_softmax_tile(float scores[KSORT_TILE_TOKENS], uint32_t begin, uint32_t end,
                                struct softmax_state *state)
{
    const __m512 infinity = _mm512_set1_ps(INFINITY);
    __m512 maxima = _mm512_set1_ps(state->max), score[4];
    __mmask16 lanes[4], overflowed = 0;
    for (int i = 0; i < 4; i++) {
        lanes[i] = tokens_within(begin, end, 16 * i);
        score[i] = _mm512_loadu_ps(scores + 16 * i);
        maxima = _mm512_mask_max_ps(maxima, lanes[i], maxima, score[i]);
        overflowed |= _mm512_mask_cmp_ps_mask(lanes[i], _mm512_abs_ps(score[i]), infinity, _CMP_NLT_UQ);
    }
    float max = _mm512_reduce_max_ps(maxima);
    float rescale = state->max == max ? 1.0f : expf(state->max - max);
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < 4; i++) {
        __m512 below = _mm512_sub_ps(score[i], _mm512_set1_ps(max));
        lanes[i] = _mm512_mask_cmp_ps_mask(lanes[i], below, _mm512_set1_ps(EXP_LOWEST), _CMP_GE_OQ);
        __m512 weights = _mm512_maskz_mov_ps(lanes[i], exp_avx512(below));
        sum = _mm512_add_ps(sum, weights);
        _mm512_storeu_ps(scores + 16 * i, weights);
    }
    state->max = max;
    state->sum = overflowed ? NAN : state->sum * rescale + _mm512_reduce_add_ps(sum);
    return rescale;
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
                                   const float (*weights)[KSORT_TILE_TOKENS], const float *rescale,
                                   float *accumulators, size_t stride)
{
    if (values->layout->type == KSORT_F32)
        accumulate_of_type(values, KSORT_F32, n_rows, weights, rescale, accumulators, stride);
    else if (values->layout->type == KSORT_F16)
        accumulate_of_type(values, KSORT_F16, n_rows, weights, rescale, accumulators, stride);
    else
        accumulate_of_type(values, KSORT_BF16, n_rows, weights, rescale, accumulators, stride);
}
