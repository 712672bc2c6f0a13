/* Weighted values of BFP types with AVX-512.
 *
 *   1. once a tile: strips --unpack, transpose--> mantissas by columns of 16 channels, in bytes (up to 16 KB, on the
 *      stack):     columns [head_dim / 16][64 tokens][16 channels]
 *   2. once for up to 8 rows: weights * 2^exponent, so that blocks cost nothing in the loop below:
 *                  scaled [blocks][8 rows][64 tokens]
 *   3. accumulators of up to 8 rows x 32 channels (for up to 4 rows: 64 channels), 16 registers, over the tokens:
 *
 *               32 channels
 *             +-------------+     for every token: load 2 registers of mantissas (converted as they come),
 *     8 rows  | 16 registers|     16 scaled weights from memory, 16 multiply-adds
 *             +-------------+
 *
 * Keeping tokens in lanes, as scores do, would save step 1 but add the lanes of 16 sums for every row and column: more
 * work than the products themselves once a few rows share a tile.
 * Tokens outside the span are never multiplied: their bytes may be stale, and their scaled weights infinite or NaN.
 * Bytes moved: the tile once for all rows; columns and scaled weights stay in L1 and L2.
 */
#include "x86/float_rows_avx512.h"
#include "x86/quads_avx512.h"

#define ROWS_AT_ONCE 8
#define MAX_REGISTERS 4 /* of one row's channels */
#define COLUMN 16       /* channels; every block size is a multiple of it, so a column lies in one block */

typedef int8_t mantissa_column[KSORT_TILE_TOKENS][COLUMN];
typedef float scaled_weights[ROWS_AT_ONCE][KSORT_TILE_TOKENS];

/* Columns of all strips that the span touches. A column takes four quads; quads that are not stored are 0. */
static void unpack_columns(const struct tile_span *values, mantissa_column *columns)
{
    const struct head_layout *layout = values->layout;
    __m512i quads[MAX_QUADS];
    for (uint32_t q = layout->n_quads / 4 * 4; q < (layout->n_quads + 3) / 4 * 4; q++)
        quads[q] = _mm512_setzero_si512();
    for (uint32_t token = values->begin / STRIP_TOKENS * STRIP_TOKENS; token < values->end; token += STRIP_TOKENS) {
        unpack_quads(layout, values->tile + word_offset(layout, 0, token), true, quads);
        for (uint32_t q = 0; q < layout->n_quads; q += 4)
            store_mantissa_rows(&quads[q], &columns[q / 4][token]);
    }
}

/* scaled[block][row][token] = weights[row][token] * 2^(exponent - 127) * 2^-(mantissa_bits - 2). */
ALWAYS_INLINE void scale_weights(const struct tile_span *values, uint32_t n_rows,
                                 const float (*weights)[KSORT_TILE_TOKENS], scaled_weights *scaled)
{
    const struct head_layout *layout = values->layout;
    const __m512 mantissa_unit = _mm512_set1_ps(bits_float((127 - (layout->mantissa_bits - 2)) << 23));
    for (uint32_t b = 0; b < layout->n_blocks; b++)
        for (uint32_t token = 0; token < KSORT_TILE_TOKENS; token += 16) {
            const uint8_t *exponents = values->tile + exponent_offset(layout, b, token);
            __m512i bits = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)exponents));
            __m512 step = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(bits, 23)), mantissa_unit);
            for (uint32_t r = 0; r < n_rows; r++) {
                __m512 weight = _mm512_loadu_ps(&weights[r][token]);
                _mm512_storeu_ps(&scaled[b][r][token], _mm512_mul_ps(weight, step));
            }
        }
}

/* Rows 0 .. n_rows-1 of the pointers given, channels c .. c+16*n_registers-1. n_rows and n_registers are constants. */
ALWAYS_INLINE void accumulate_rows(const struct tile_span *values, const mantissa_column *columns, uint32_t c,
                                   const int n_rows, const int n_registers, const scaled_weights *scaled,
                                   const float *rescale, float *accumulators, size_t stride)
{
    const struct head_layout *layout = values->layout;
    __mmask16 lanes[MAX_REGISTERS];
    const float(*weights[MAX_REGISTERS])[KSORT_TILE_TOKENS];
    __m512 sums[ROWS_AT_ONCE][MAX_REGISTERS];
    for (int i = 0; i < n_registers; i++) {
        lanes[i] = lanes_below(layout->head_dim, c + COLUMN * i);
        weights[i] = scaled[min_size((c + COLUMN * i) / layout->block_size, layout->n_blocks - 1)];
    }
    for (int r = 0; r < n_rows; r++)
        for (int i = 0; i < n_registers; i++) {
            __m512 before = _mm512_maskz_loadu_ps(lanes[i], accumulators + r * stride + c + COLUMN * i);
            sums[r][i] = _mm512_mul_ps(before, _mm512_set1_ps(rescale[r]));
        }
    for (uint32_t token = values->begin; token < values->end; token++) {
        __m512 mantissas[MAX_REGISTERS];
        for (int i = 0; i < n_registers; i++) {
            __m128i bytes = _mm_loadu_si128((const __m128i *)columns[c / COLUMN + i][token]);
            mantissas[i] = _mm512_cvtepi32_ps(_mm512_maskz_cvtepi8_epi32(lanes[i], bytes));
        }
        for (int r = 0; r < n_rows; r++)
            for (int i = 0; i < n_registers; i++)
                sums[r][i] = _mm512_fmadd_ps(_mm512_set1_ps(weights[i][r][token]), mantissas[i], sums[r][i]);
    }
    for (int r = 0; r < n_rows; r++)
        for (int i = 0; i < n_registers; i++)
            _mm512_mask_storeu_ps(accumulators + r * stride + c + COLUMN * i, lanes[i], sums[r][i]);
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
                                 const float (*weights)[KSORT_TILE_TOKENS], const float *rescale,
                                 float *accumulators, size_t stride)
{
    _Alignas(64) mantissa_column columns[KSORT_MAX_HEAD_DIM / COLUMN];
    _Alignas(64) scaled_weights scaled[MAX_BLOCKS];
    prefetch_share(values, 0, KSORT_TILE_TOKENS);
    unpack_columns(values, columns);
    for (uint32_t row = 0; row < n_rows; row += ROWS_AT_ONCE) {
        uint32_t n = (uint32_t)min_size(n_rows - row, ROWS_AT_ONCE);
        scale_weights(values, n, weights + row, scaled);
        accumulate_some(values, (const mantissa_column *)columns, n, (const scaled_weights *)scaled, rescale + row,
                        accumulators + row * stride, stride);
    }
}
