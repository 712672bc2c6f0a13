/* Weighted values of BFP types with AVX2.
 *
 *   1. once a tile: strips --unpack, transpose--> mantissas by columns of 16 channels, in bytes (up to 16 KB, on the
 *      stack):     columns [head_dim / 16][64 tokens][16 channels]
 *   2. once for up to 4 rows: weights * 2^exponent, so that blocks cost nothing in the loop below:
 *                  scaled [blocks][4 rows][64 tokens]
 *   3. accumulators of up to 4 rows x 16 channels (8 registers) over the tokens of the tile:
 *
 *               16 channels
 *             +------------+     for every token: load 2 registers of mantissas (converted as they come),
 *     4 rows  | 8 registers|     4 scaled weights from memory, 8 multiply-adds
 *             +------------+
 *
 * Tokens outside the span are never multiplied: their bytes may be stale, and their scaled weights infinite or NaN.
 * Bytes moved: the tile once for all rows; columns and scaled weights stay in L1 and L2.
 */
#include "x86/quads_avx2.h"

#define ROWS_AT_ONCE 4
#define COLUMN 16 /* channels; every block size is a multiple of it, so a column lies in one block */

typedef int8_t mantissa_column[KSORT_TILE_TOKENS][COLUMN];
typedef float scaled_weights[ROWS_AT_ONCE][KSORT_TILE_TOKENS];

/* Columns of all half strips that the span touches. A column takes four quads; quads that are not stored are 0. */
static void unpack_columns(const struct tile_span *values, mantissa_column *columns)
{
    const uint32_t n_quads = values->layout->n_quads;
    __m256i quads[MAX_QUADS];
    for (uint32_t q = n_quads / 4 * 4; q < (n_quads + 3) / 4 * 4; q++)
        quads[q] = _mm256_setzero_si256();
    for (uint32_t token = values->begin / HALF_STRIP * HALF_STRIP; token < values->end; token += HALF_STRIP) {
        unpack_quads(values, token, quads);
        for (uint32_t q = 0; q < n_quads; q += 4)
            store_mantissa_rows(&quads[q], &columns[q / 4][token]);
    }
}

/* scaled[block][row][token] = weights[row][token] * 2^(exponent - 127) * 2^-(mantissa_bits - 2). */
ALWAYS_INLINE void scale_weights(const struct tile_span *values, uint32_t n_rows,
                                 const float (*weights)[KSORT_TILE_TOKENS], scaled_weights *scaled)
{
    const struct head_layout *layout = values->layout;
    const __m256 mantissa_unit = _mm256_set1_ps(bits_float((127 - (layout->mantissa_bits - 2)) << 23));
    for (uint32_t b = 0; b < layout->n_blocks; b++)
        for (uint32_t token = 0; token < KSORT_TILE_TOKENS; token += 8) {
            const uint8_t *exponents = values->tile + exponent_offset(layout, b, token);
            __m256i bits = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)exponents));
            __m256 step = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(bits, 23)), mantissa_unit);
            for (uint32_t r = 0; r < n_rows; r++) {
                __m256 weight = _mm256_loadu_ps(&weights[r][token]);
                _mm256_storeu_ps(&scaled[b][r][token], _mm256_mul_ps(weight, step));
            }
        }
}

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
        const int8_t(*m)[COLUMN] = columns[c / COLUMN];
        const float(*w)[KSORT_TILE_TOKENS] = scaled[c / v->layout->block_size];
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
    _Alignas(32) mantissa_column columns[KSORT_MAX_HEAD_DIM / COLUMN];
    _Alignas(32) scaled_weights scaled[MAX_BLOCKS];
    prefetch_share(values, 0, KSORT_TILE_TOKENS);
    unpack_columns(values, columns);
    for (uint32_t row = 0; row < n_rows; row += ROWS_AT_ONCE) {
        uint32_t n = (uint32_t)min_size(n_rows - row, ROWS_AT_ONCE);
        scale_weights(values, n, weights + row, scaled);
        accumulate_some(values, (const mantissa_column *)columns, n, (const scaled_weights *)scaled, rescale + row,
                        accumulators + row * stride, stride);
    }
}
