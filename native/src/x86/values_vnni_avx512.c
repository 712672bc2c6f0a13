/* Weighted BFP12 values in integers: vpdpbusd adds four products of an unsigned byte (a digit of a weight) and a signed
 * one (16 times a mantissa) to each lane. Four tokens stand in a lane's bytes: values are never converted to float.
 *
 *   1. for every block and 4 rows: weight / the row's largest * 2^(exponent - the block's largest), as integers below
 *      2^16, which are two digits of 8 bits:
 *          digits [4 strips][4 rows][2]: the digits of 16 tokens, each four in all lanes of a 128-bit part
 *   2. for every word (8 channels) of the block, over its 4 strips:
 *
 *          word of 16 tokens --transpose 4 x 4 bytes in 128-bit parts--> lane c of part p: channel c, tokens 4p .. 4p+3
 *            low nibbles:  channels 0 .. 3   x 4 rows x 2 digits \  16 sums in registers, each a product
 *            high nibbles: channels 4 .. 7   x 4 rows x 2 digits /  of a word and digits from L1
 *
 *      256 * high digits + low digits --> sums [4 rows][quads][4 parts][4 channels]
 *   3. the 4 parts added, to float, times the largest weight and step, into the accumulators
 *
 * A product of weight and step is off by at most 2^-17 of the tile's largest weight times the block's largest step.
 * Bytes moved: the tile once for every 4 rows (from L1 after the first); digits of a block, 2 KB, from L1.
 */
#include <immintrin.h>

#include "x86/x86.h"

#define ROWS_AT_ONCE 4
#define LARGEST_WEIGHT 65535.0f /* two digits of 8 bits */
#define SMALLEST_WEIGHT 1e-30f /* less counts as nothing, so that what scales it up stays finite */

typedef __m512i row_digits[ROWS_AT_ONCE][2]; /* of one strip: low, high */

struct scaled_rows {
    __m512 weights[ROWS_AT_ONCE][STRIPS_PER_TILE]; /* up to LARGEST_WEIGHT; 0 outside the span */
    float largest[ROWS_AT_ONCE];                   /* what they were, before */
};

/* Exponents of 16 tokens; 0 outside the span, whose bytes may be stale. */
ALWAYS_INLINE __m512i exponents_of(const struct tile_span *values, uint32_t block, uint32_t token)
{
    const uint8_t *exponents = values->tile + exponent_offset(values->layout, block, token);
    const __m512i tokens = _mm512_add_epi32(_mm512_set1_epi32((int32_t)token),
                                            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    __mmask16 is_inside = _mm512_cmplt_epu32_mask(tokens, _mm512_set1_epi32((int32_t)values->end)) &
                          _mm512_cmpge_epu32_mask(tokens, _mm512_set1_epi32((int32_t)values->begin));
    return _mm512_maskz_cvtepu8_epi32(is_inside, _mm_loadu_si128((const __m128i *)exponents));
}

/* steps[s] = 2^(exponent - largest) of the tokens of strip s, 0 for exponent 0. Returns the largest exponent. */
ALWAYS_INLINE uint32_t relative_steps(const struct tile_span *values, uint32_t block, __m512 steps[STRIPS_PER_TILE])
{
    __m512i exponents[STRIPS_PER_TILE], largest = _mm512_setzero_si512();
    for (int s = 0; s < STRIPS_PER_TILE; s++) {
        exponents[s] = exponents_of(values, block, STRIP_TOKENS * s);
        largest = _mm512_max_epi32(largest, exponents[s]);
    }
    int32_t max = _mm512_reduce_max_epi32(largest);
    for (int s = 0; s < STRIPS_PER_TILE; s++) {
        __m512i below = _mm512_sub_epi32(exponents[s], _mm512_set1_epi32(max));
        __m512i bits = _mm512_add_epi32(_mm512_max_epi32(below, _mm512_set1_epi32(-127)), _mm512_set1_epi32(127));
        __mmask16 is_stored = _mm512_test_epi32_mask(exponents[s], exponents[s]);
        steps[s] = _mm512_castsi512_ps(_mm512_maskz_slli_epi32(is_stored, bits, 23));
    }
    return (uint32_t)max;
}

/* n_rows is a constant. */
ALWAYS_INLINE void scale_rows(const float (*weights)[KSORT_TILE_TOKENS], const int n_rows, struct scaled_rows *rows)
{
    for (int r = 0; r < n_rows; r++) {
        __m512 largest = _mm512_setzero_ps();
        for (int s = 0; s < STRIPS_PER_TILE; s++)
            largest = _mm512_max_ps(largest, _mm512_loadu_ps(&weights[r][STRIP_TOKENS * s]));
        rows->largest[r] = _mm512_reduce_max_ps(largest);
        bool counts = rows->largest[r] > SMALLEST_WEIGHT;
        const __m512 scale = _mm512_set1_ps(counts ? LARGEST_WEIGHT / rows->largest[r] : 0.0f);
        for (int s = 0; s < STRIPS_PER_TILE; s++)
            rows->weights[r][s] = _mm512_mul_ps(_mm512_loadu_ps(&weights[r][STRIP_TOKENS * s]), scale);
    }
}

/* Digits of the rows' weights times the block's steps. Returns its largest exponent. n_rows is a constant. */
ALWAYS_INLINE uint32_t weigh_block(const struct tile_span *values, uint32_t block, const struct scaled_rows *rows,
                                   const int n_rows, row_digits digits[STRIPS_PER_TILE])
{
    /* of every lane's four tokens the low bytes, or the next: tokens 4p .. 4p+3 of part p, in all its lanes */
    const __m512i low_bytes = _mm512_set1_epi32(0x0C080400), high_bytes = _mm512_set1_epi32(0x0D090501);
    __m512 steps[STRIPS_PER_TILE];
    uint32_t exponent = relative_steps(values, block, steps);
    for (int r = 0; r < n_rows; r++)
        for (int s = 0; s < STRIPS_PER_TILE; s++) {
            __m512i weight = _mm512_cvtps_epi32(_mm512_mul_ps(rows->weights[r][s], steps[s]));
            digits[s][r][0] = _mm512_shuffle_epi8(weight, low_bytes);
            digits[s][r][1] = _mm512_shuffle_epi8(weight, high_bytes);
        }
    return exponent;
}

/* The two quads of a word: sums[row][quad], parts side by side. n_rows is a constant. */
ALWAYS_INLINE void multiply_word(const struct head_layout *layout, const uint8_t *tile, uint32_t word,
                                 const row_digits strips[STRIPS_PER_TILE], const int n_rows, __m512i (*sums)[MAX_QUADS])
{
    const __m128i columns = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i transposed = _mm512_broadcast_i32x4(columns);
    const __m512i high_nibble = _mm512_set1_epi8((char)0xF0);
    __m512i dots[2][ROWS_AT_ONCE][2];
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; r++)
        for (int digit = 0; digit < 2; digit++)
            dots[0][r][digit] = dots[1][r][digit] = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int s = 0; s < STRIPS_PER_TILE; s++) {
        __m512i stored = _mm512_loadu_si512(tile + word_offset(layout, word, STRIP_TOKENS * s));
        __m512i bytes = _mm512_shuffle_epi8(stored, transposed);
        __m512i quads[2] = {_mm512_and_si512(_mm512_slli_epi32(bytes, 4), high_nibble),
                            _mm512_and_si512(bytes, high_nibble)};
#pragma GCC unroll 4
        for (int r = 0; r < n_rows; r++)
#pragma GCC unroll 2
            for (int digit = 0; digit < 2; digit++) {
                __m512i digits = strips[s][r][digit];
                dots[0][r][digit] = _mm512_dpbusd_epi32(dots[0][r][digit], digits, quads[0]);
                dots[1][r][digit] = _mm512_dpbusd_epi32(dots[1][r][digit], digits, quads[1]);
            }
    }
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; r++)
        for (int q = 0; q < 2; q++)
            sums[r][2 * word + q] = _mm512_add_epi32(_mm512_slli_epi32(dots[q][r][1], 8), dots[q][r][0]);
}

/* 16 channels of four quads: the parts of each added. */
ALWAYS_INLINE __m512 add_parts(const __m512i quads[4])
{
    __m512i pairs[2];
    for (int i = 0; i < 2; i++) {
        __m512i even = _mm512_shuffle_i32x4(quads[2 * i], quads[2 * i + 1], 0x88);
        __m512i odd = _mm512_shuffle_i32x4(quads[2 * i], quads[2 * i + 1], 0xDD);
        pairs[i] = _mm512_add_epi32(even, odd);
    }
    __m512i even = _mm512_shuffle_i32x4(pairs[0], pairs[1], 0x88), odd = _mm512_shuffle_i32x4(pairs[0], pairs[1], 0xDD);
    return _mm512_cvtepi32_ps(_mm512_add_epi32(even, odd));
}

/* Rows 0 .. n_rows-1 of the pointers given. n_rows is a constant up to ROWS_AT_ONCE. */
ALWAYS_INLINE void accumulate_rows(const struct tile_span *values, const int n_rows,
                                   const float (*weights)[KSORT_TILE_TOKENS], const float *rescale,
                                   float *accumulators, size_t stride)
{
    const struct head_layout *layout = values->layout;
    struct scaled_rows rows;
    row_digits digits[STRIPS_PER_TILE];
    __m512i sums[ROWS_AT_ONCE][MAX_QUADS];
    const uint32_t words = layout->block_size / 8;
    scale_rows(weights, n_rows, &rows);
    for (uint32_t b = 0, first = 0; b < layout->n_blocks; b++) {
        uint32_t end = b + 1 < layout->n_blocks ? first + words : layout->n_words;
        /* 2^-2 is BFP12's mantissa unit, and mantissas are multiplied 16 times too large */
        const float unit = exponent_scale(weigh_block(values, b, &rows, n_rows, digits)) * (1 / (64 * LARGEST_WEIGHT));
        for (uint32_t word = first; word < end; word++)
            multiply_word(layout, values->tile, word, (const row_digits *)digits, n_rows, sums);
        for (int r = 0; r < n_rows; r++) {
            for (uint32_t q = 2 * end; q % 4; q++) /* padding */
                sums[r][q] = _mm512_setzero_si512();
            const __m512 scale = _mm512_set1_ps(rows.largest[r] * unit), before = _mm512_set1_ps(rescale[r]);
            for (uint32_t q = 2 * first; q < 2 * end; q += 4) {
                float *out = accumulators + r * stride + 4 * q;
                __m512 sum = add_parts(&sums[r][q]);
                _mm512_storeu_ps(out, _mm512_fmadd_ps(sum, scale, _mm512_mul_ps(_mm512_loadu_ps(out), before)));
            }
        }
        first = end;
    }
}

void ksort_avx512vnni_accumulate_bfp(const struct tile_span *values, uint32_t n_rows,
                                     const float (*weights)[KSORT_TILE_TOKENS], const float *rescale,
                                     float *accumulators, size_t stride)
{
    if (values->layout->mantissa_bits != 4) {
        ksort_avx512_accumulate_bfp(values, n_rows, weights, rescale, accumulators, stride);
        return;
    }
    for (size_t i = 0; i < values->layout->tile_bytes; i += CACHE_LINE)
        PREFETCH_NEXT(values->next + i);
    for (uint32_t row = 0; row < n_rows; row += ROWS_AT_ONCE) {
        float *out = accumulators + row * stride;
        switch (min_size(n_rows - row, ROWS_AT_ONCE)) {
        case 1: accumulate_rows(values, 1, weights + row, rescale + row, out, stride); break;
        case 2: accumulate_rows(values, 2, weights + row, rescale + row, out, stride); break;
        case 3: accumulate_rows(values, 3, weights + row, rescale + row, out, stride); break;
        default: accumulate_rows(values, 4, weights + row, rescale + row, out, stride);
        }
    }
}
