/* Weighted values of BFP types with AVX-512: values_bfp.h, then
 *
 *   3. accumulators of up to 8 rows x 32 channels (for up to 4 rows: 64 channels), 16 registers, over the tokens:
 *
 *               32 channels
 *             +-------------+     for every token: load 2 registers of mantissas (converted as they come),
 *     8 rows  | 16 registers|     16 scaled weights from memory, 16 multiply-adds
 *             +-------------+
 *
 * Keeping tokens in lanes, as scores do, would save step 1 but add the lanes of 16 sums for every row and column: more
 * work than the products themselves once a few rows share a tile.
 */
#include "x86/float_rows_avx512.h"
#include "x86/quads_avx512.h"

#define ROWS_AT_ONCE 8
#define MAX_REGISTERS 4 /* of one row's channels */

#include "template/values_bfp.h"

/* Rows 0 .. n_rows-1 of the pointers given, channels c .. c+16*n_registers-1. n_rows and n_registers are constants. */
ALWAYS_INLINE void accumulate_rows(const struct tile_span *values, const mantissa_column *columns, uint32_t c,
                                   const int n_rows, const int n_registers, const scaled_weights *scaled,
                                   const float *rescale, float *accumulators, size_t stride)
{
    const struct head_layout *layout = values->layout;
    __mmask16 inside[MAX_REGISTERS];
    const float (*weights[MAX_REGISTERS])[KSORT_TILE_TOKENS];
    __m512 sums[ROWS_AT_ONCE][MAX_REGISTERS];
    for (int i = 0; i < n_registers; i++) {
        inside[i] = lanes_below(layout->head_dim, c + COLUMN * i);
        weights[i] = scaled[min_size((c + COLUMN * i) / layout->block_size, layout->n_blocks - 1)];
    }
    for (int r = 0; r < n_rows; r++)
        for (int i = 0; i < n_registers; i++) {
            __m512 before = _mm512_maskz_loadu_ps(inside[i], accumulators + r * stride + c + COLUMN * i);
            sums[r][i] = _mm512_mul_ps(before, _mm512_set1_ps(rescale[r]));
        }
    for (uint32_t token = values->begin; token < values->end; token++) {
        __m512 mantissas[MAX_REGISTERS];
        for (int i = 0; i < n_registers; i++) {
            __m128i bytes = _mm_loadu_si128((const __m128i *)columns[c / COLUMN + i][token]);
            mantissas[i] = _mm512_cvtepi32_ps(_mm512_maskz_cvtepi8_epi32(inside[i], bytes));
        }
        for (int r = 0; r < n_rows; r++)
            for (int i = 0; i < n_registers; i++)
                sums[r][i] = _mm512_fmadd_ps(_mm512_set1_ps(weights[i][r][token]), mantissas[i], sums[r][i]);
    }
    for (int r = 0; r < n_rows; r++)
        for (int i = 0; i < n_registers; i++)
            _mm512_mask_storeu_ps(accumulators + r * stride + c + COLUMN * i, inside[i], sums[r][i]);
}

/* Up to ROWS_AT_ONCE rows, all channels. */
ALWAYS_INLINE void accumulate_some(const struct tile_span *v, const mantissa_column *m, uint32_t n_rows,
                                   const scaled_weights *w, const float *s, float *a, size_t stride)
{
    const uint32_t step = n_rows > 4 ? 32 : 64;
    for (uint32_t c = 0; c < v->layout->head_dim; c += step) {
        switch (n_rows) {
        case 1: accumulate_rows(v, m, c, 1, 4, w, s, a, stride); break;
        case 2: accumulate_rows(v, m, c, 2, 4, w, s, a, stride); break;
        case 3: accumulate_rows(v, m, c, 3, 4, w, s, a, stride); break;
        case 4: accumulate_rows(v, m, c, 4, 4, w, s, a, stride); break;
        case 5: accumulate_rows(v, m, c, 5, 2, w, s, a, stride); break;
        case 6: accumulate_rows(v, m, c, 6, 2, w, s, a, stride); break;
        case 7: accumulate_rows(v, m, c, 7, 2, w, s, a, stride); break;
        default: accumulate_rows(v, m, c, 8, 2, w, s, a, stride);
        }
    }
}

void ksort_avx512_accumulate_bfp(const struct tile_span *values, uint32_t n_rows,
                                 const float (*weights)[KSORT_TILE_TOKENS], const float *rescale, float *accumulators,
                                 size_t stride)
{
    accumulate_bfp(values, n_rows, weights, rescale, accumulators, stride, accumulate_some);
}
