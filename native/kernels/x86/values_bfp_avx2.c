/* Weighted values of BFP types with AVX2: values_bfp.h, then
 *
 *   3. accumulators of up to 4 rows x 16 channels (8 registers) over the tokens of the tile:
 *
 *               16 channels
 *             +------------+     for every token: load 2 registers of mantissas (converted as they come),
 *     4 rows  | 8 registers|     4 scaled weights from memory, 8 multiply-adds
 *             +------------+
 */
#include "x86/quads_avx2.h"

#define ROWS_AT_ONCE 4

#include "template/values_bfp.h"

ALWAYS_INLINE __m256 mantissas_as_float(const int8_t *eight)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)eight)));
}

/* Rows 0 .. n_rows-1 of the pointers given, one column. The accumulators have room for whole columns. n_rows is a
 * constant. */
ALWAYS_INLINE void accumulate_column(const struct tile_span *values, const int8_t (*column)[COLUMN], const int n_rows,
                                     const float (*weights)[KSORT_TILE_TOKENS], const float *rescale,
                                     float *accumulators, size_t stride)
{
    __m256 sums[ROWS_AT_ONCE][2];
    for (int r = 0; r < n_rows; r++)
        for (int i = 0; i < 2; i++) {
            __m256 before = _mm256_loadu_ps(accumulators + r * stride + 8 * i);
            sums[r][i] = _mm256_mul_ps(before, _mm256_set1_ps(rescale[r]));
        }
    for (uint32_t token = values->begin; token < values->end; token++) {
        __m256 low = mantissas_as_float(column[token]), high = mantissas_as_float(column[token] + 8);
        for (int r = 0; r < n_rows; r++) {
            __m256 weight = _mm256_set1_ps(weights[r][token]);
            sums[r][0] = _mm256_fmadd_ps(weight, low, sums[r][0]);
            sums[r][1] = _mm256_fmadd_ps(weight, high, sums[r][1]);
        }
    }
    for (int r = 0; r < n_rows; r++)
        for (int i = 0; i < 2; i++)
            _mm256_storeu_ps(accumulators + r * stride + 8 * i, sums[r][i]);
}

/* Up to ROWS_AT_ONCE rows, all channels. */
ALWAYS_INLINE void accumulate_some(const struct tile_span *v, const mantissa_column *columns, uint32_t n_rows,
                                   const scaled_weights *scaled, const float *s, float *accumulators, size_t stride)
{
    for (uint32_t c = 0; c < v->layout->head_dim; c += COLUMN) {
        const int8_t (*m)[COLUMN] = columns[c / COLUMN];
        const float (*w)[KSORT_TILE_TOKENS] = scaled[c / v->layout->block_size];
        float *a = accumulators + c;
        switch (n_rows) {
        case 1: accumulate_column(v, m, 1, w, s, a, stride); break;
        case 2: accumulate_column(v, m, 2, w, s, a, stride); break;
        case 3: accumulate_column(v, m, 3, w, s, a, stride); break;
        default: accumulate_column(v, m, 4, w, s, a, stride);
        }
    }
}

void ksort_avx2_accumulate_bfp(const struct tile_span *values, uint32_t n_rows,
                               const float (*weights)[KSORT_TILE_TOKENS], const float *rescale, float *accumulators,
                               size_t stride)
{
    accumulate_bfp(values, n_rows, weights, rescale, accumulators, stride, accumulate_some);
}
