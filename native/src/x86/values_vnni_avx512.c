/* Weighted BFP12 values in integers: vpdpbusd adds four products of an unsigned byte (a digit of a weight) and a signed
 * one (16 times a mantissa) to each lane. Four tokens stand in a lane's bytes: values are never converted to float.
 *
 *   1. for every block and 4 rows: weight / the row's largest * 2^(exponent - the block's largest), as integers below
 *      2^16, which are two digits of 8 bits; four tokens' digits are a quad:
 *          digits [4 rows][2][4 parts][4 strips]
 *   2. for every group of up to 4 words (32 channels) of the block, over its 4 strips:
 *
 *          4 words of 16 tokens --transpose 128-bit parts, then 4 x 4 bytes in each-->
 *          4 registers: tokens 4p .. 4p+3; part w, lane c: byte c of word w
 *            low nibbles:  channels 8w + c      x 4 rows x 2 digits \  16 sums in registers, each product
 *            high nibbles: channels 8w + 4 + c  x 4 rows x 2 digits /  with a quad of digits in all lanes
 *
 *   3. 256 * high digits + low digits, to float, times the largest weight and step, into the accumulators
 *
 * A product of weight and step is off by at most 2^-17 of the tile's largest weight times the block's largest step.
 * Bytes moved: the tile once for every 4 rows (from L1 after the first).
 */
#include <immintrin.h>

#include "x86/x86.h"

#define ROWS_AT_ONCE 4
#define WORDS_AT_ONCE 4
#define FOURS_PER_TILE (KSORT_TILE_TOKENS / 4)
#define LARGEST_WEIGHT 65535.0f /* two digits of 8 bits */
#define SMALLEST_WEIGHT 1e-30f /* less counts as nothing, so that what scales it up stays finite */

/* Low and high digits of a block's weights: a byte a token, four tokens in a word. Word 4p + s has tokens 4p .. 4p+3 of
 * strip s. */
typedef uint32_t row_digits[2][FOURS_PER_TILE];

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

/* Digits of the rows' weights times the block's steps. Returns the value of a mantissa's unit in the block times that of
 * a digit's. n_rows is a constant. */
ALWAYS_INLINE float weigh_block(const struct tile_span *values, uint32_t block, const struct scaled_rows *rows,
                                   const int n_rows, row_digits *digits)
{
    const __m512i low_byte = _mm512_set1_epi16(0xFF);
    __m512 steps[STRIPS_PER_TILE];
    uint32_t exponent = relative_steps(values, block, steps);
    for (int r = 0; r < n_rows; r++) {
        __m512i weights[STRIPS_PER_TILE];
        for (int s = 0; s < STRIPS_PER_TILE; s++)
            weights[s] = _mm512_cvtps_epi32(_mm512_mul_ps(rows->weights[r][s], steps[s]));
        /* packing works within parts: part p holds, strip after strip, tokens 4p .. 4p+3 */
        __m512i front = _mm512_packus_epi32(weights[0], weights[1]), back = _mm512_packus_epi32(weights[2], weights[3]);
        _mm512_store_si512(digits[r][0], _mm512_packus_epi16(_mm512_and_si512(front, low_byte),
                                                             _mm512_and_si512(back, low_byte)));
        _mm512_store_si512(digits[r][1],
                           _mm512_packus_epi16(_mm512_srli_epi16(front, 8), _mm512_srli_epi16(back, 8)));
    }
    /* 2^-2 is BFP12's mantissa unit, and mantissas are multiplied 16 times too large */
    return exponent_scale(exponent) * (1 / (64 * LARGEST_WEIGHT));
}

/* Up to 4 words of strip s's 16 tokens, transposed: fours[4p] has tokens 4p .. 4p+3 of the strip in the bytes of lanes,
 * byte c of word w in lane c of part w. Words from n_words on count as zeros and are not read. */
ALWAYS_INLINE void load_words(const uint8_t *words, uint32_t n_words, __m512i *fours)
{
    const __m128i columns = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i transposed = _mm512_broadcast_i32x4(columns);
    __m512i w[WORDS_AT_ONCE];
    for (uint32_t i = 0; i < WORDS_AT_ONCE; i++)
        w[i] = _mm512_maskz_loadu_epi32(i < n_words ? 0xFFFF : 0, words + 64 * i);
    __m512i front[2] = {_mm512_shuffle_i32x4(w[0], w[1], 0x44), _mm512_shuffle_i32x4(w[2], w[3], 0x44)};
    __m512i back[2] = {_mm512_shuffle_i32x4(w[0], w[1], 0xEE), _mm512_shuffle_i32x4(w[2], w[3], 0xEE)};
    fours[0] = _mm512_shuffle_epi8(_mm512_shuffle_i32x4(front[0], front[1], 0x88), transposed);
    fours[4] = _mm512_shuffle_epi8(_mm512_shuffle_i32x4(front[0], front[1], 0xDD), transposed);
    fours[8] = _mm512_shuffle_epi8(_mm512_shuffle_i32x4(back[0], back[1], 0x88), transposed);
    fours[12] = _mm512_shuffle_epi8(_mm512_shuffle_i32x4(back[0], back[1], 0xDD), transposed);
}

/* sums[r][0] and [1]: for the group's words, channels of low and of high nibbles. n_rows is a constant. */
ALWAYS_INLINE void multiply_words(const struct tile_span *values, uint32_t word, uint32_t n_words,
                                  const row_digits *digits, const int n_rows, __m512i sums[ROWS_AT_ONCE][2])
{
    const __m512i high_nibble = _mm512_set1_epi8((char)0xF0);
    __m512i fours[FOURS_PER_TILE], dots[2][ROWS_AT_ONCE][2];
    for (uint32_t s = 0; s < STRIPS_PER_TILE; s++)
        load_words(values->tile + word_offset(values->layout, word, STRIP_TOKENS * s), n_words, fours + s);
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; r++)
        for (int digit = 0; digit < 2; digit++)
            dots[0][r][digit] = dots[1][r][digit] = _mm512_setzero_si512();
#pragma GCC unroll 1
    for (uint32_t four = 0; four < FOURS_PER_TILE; four++) {
        PREFETCH_NEXT(values->next + word_offset(values->layout, word + four / 4, four % 4 * STRIP_TOKENS));
        __m512i low = _mm512_and_si512(_mm512_slli_epi32(fours[four], 4), high_nibble);
        __m512i high = _mm512_and_si512(fours[four], high_nibble);
#pragma GCC unroll 4
        for (int r = 0; r < n_rows; r++)
#pragma GCC unroll 2
            for (int digit = 0; digit < 2; digit++) {
                __m512i weights = _mm512_set1_epi32((int32_t)digits[r][digit][four]);
                dots[0][r][digit] = _mm512_dpbusd_epi32(dots[0][r][digit], weights, low);
                dots[1][r][digit] = _mm512_dpbusd_epi32(dots[1][r][digit], weights, high);
            }
    }
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; r++)
        for (int nibble = 0; nibble < 2; nibble++)
            sums[r][nibble] = _mm512_add_epi32(_mm512_slli_epi32(dots[nibble][r][1], 8), dots[nibble][r][0]);
}

/* out[c] = out[c] * before + sums * scale, for 8 * n_words channels (rounded up to 16). */
ALWAYS_INLINE void add_channels(const __m512i sums[2], uint32_t n_words, float scale, float before, float *out)
{
    const __m512i first_words = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i last_words = _mm512_add_epi32(first_words, _mm512_set1_epi32(8));
    for (uint32_t half = 0; 2 * half < n_words; half++) {
        __m512i channels = _mm512_permutex2var_epi32(sums[0], half ? last_words : first_words, sums[1]);
        __m512 rescaled = _mm512_mul_ps(_mm512_loadu_ps(out + 16 * half), _mm512_set1_ps(before));
        __m512 sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(channels), _mm512_set1_ps(scale), rescaled);
        _mm512_storeu_ps(out + 16 * half, sum);
    }
}

/* Rows 0 .. n_rows-1 of the pointers given. n_rows is a constant up to ROWS_AT_ONCE. */
ALWAYS_INLINE void accumulate_rows(const struct tile_span *values, const int n_rows,
                                   const float (*weights)[KSORT_TILE_TOKENS], const float *rescale,
                                   float *accumulators, size_t stride)
{
    const struct head_layout *layout = values->layout;
    struct scaled_rows rows;
    _Alignas(64) row_digits digits[MAX_BLOCKS][ROWS_AT_ONCE];
    float units[MAX_BLOCKS];
    __m512i sums[ROWS_AT_ONCE][2];
    scale_rows(weights, n_rows, &rows);
    for (uint32_t b = 0; b < layout->n_blocks; b++)
        units[b] = weigh_block(values, b, &rows, n_rows, digits[b]);
    for (uint32_t b = 0, word = 0; b < layout->n_blocks; b++)
        for (uint32_t end = b + 1 < layout->n_blocks ? word + layout->block_size / 8 : layout->n_words; word < end;) {
            uint32_t n_words = (uint32_t)min_size(end - word, WORDS_AT_ONCE);
            multiply_words(values, word, n_words, (const row_digits *)digits[b], n_rows, sums);
            for (int r = 0; r < n_rows; r++)
                add_channels(sums[r], n_words, rows.largest[r] * units[b], rescale[r],
                             accumulators + r * stride + 8 * word);
            word += n_words;
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
    for (uint32_t b = 0; b < values->layout->n_blocks; b++) /* words are asked for beside each load */
        PREFETCH_NEXT(values->next + exponent_offset(values->layout, b, 0));
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
