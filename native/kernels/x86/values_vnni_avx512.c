/* Weighted BFP12 and SBFP12 values in integers: vpdpbusd adds four products of an unsigned byte (a digit of a weight;
 * SBFP12: a mantissa plus 8) and a signed one (16 times a mantissa; SBFP12: a digit) to each lane. Four tokens stand in a
 * lane's bytes: values are never converted to float.
 *
 *   1. once a tile, for 4 rows: weight / the row's largest (weights_vnni_avx512.h)
 *   2. for every block: times the token's step / the block's largest, as two digits of 8 bits; four tokens' digits are
 *      a quad:
 *          digits [4 rows][2][4 parts][4 strips]
 *   3. for every group of up to 4 words (32 channels) of the block, strip after strip:
 *
 *          4 words of 16 tokens --transpose 128-bit parts, then 4 x 4 bytes in each-->
 *          4 registers: tokens 4p .. 4p+3; part w, lane c: byte c of word w
 *            low nibbles:  channels 8w + c      x 4 rows x 2 digits \  16 sums in registers, each product
 *            high nibbles: channels 8w + 4 + c  x 4 rows x 2 digits /  with a quad of digits in all lanes
 *
 *      and between the products, whose one multiplier a cycle leaves the other units idle, the next strip is
 *      transposed, and a row's step 2 of the next block taken
 *   4. 256 * high digits + low digits, to float, times the largest weight and step, into the accumulators
 *
 * A product of weight and step is off by at most 2^-16 of the tile's largest weight times the block's largest step.
 * Bytes moved: the tile once for every 4 rows (from L1 after the first). Products: for 4 rows one of 64 bytes for every
 * 8 channels of a token.
 */
#include "x86/weights_vnni_avx512.h"

#define WORDS_AT_ONCE 4
#define PARTS 4 /* of 128 bits, in a register */

/* Rows whose largest score was surpassed; most tiles have none. */
static void rescale_rows(uint32_t n_rows, uint32_t head_dim, const float *rescale, float *accumulators, size_t stride)
{
    for (uint32_t r = 0; r < n_rows; r++) {
        if (rescale[r] == 1.0f)
            continue;
        float *row = accumulators + r * stride;
        for (uint32_t c = 0; c < head_dim; c += 16)
            _mm512_storeu_ps(row + c, _mm512_mul_ps(_mm512_loadu_ps(row + c), _mm512_set1_ps(rescale[r])));
    }
}

/* 4 words of a strip's 16 tokens being transposed: fours[p] gets tokens 4p .. 4p+3 in the bytes of lanes, byte c of word
 * w in lane c of part w. (Masked loads in place of offsets that repeat took a quarter more time for the whole.) */
struct transposed_words {
    __m512i front[2], back[2]; /* parts 0 and 1, parts 2 and 3 of two words each */
    __m512i fours[PARTS];
};

/* Steps 0 .. PARTS-1, one after another: other work stands between them. step is a constant. */
ALWAYS_INLINE void transpose_step(const uint8_t *words, const uint32_t offsets[WORDS_AT_ONCE], const uint32_t step,
                                  struct transposed_words *strip)
{
    const __m128i columns = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i in_lanes = _mm512_broadcast_i32x4(columns);
    if (step < 2) {
        __m512i even = _mm512_loadu_si512(words + offsets[2 * step]);
        __m512i odd = _mm512_loadu_si512(words + offsets[2 * step + 1]);
        strip->front[step] = _mm512_shuffle_i32x4(even, odd, 0x44);
        strip->back[step] = _mm512_shuffle_i32x4(even, odd, 0xEE);
    } else {
        const __m512i *halves = step == 2 ? strip->front : strip->back;
        __m512i *fours = &strip->fours[2 * (step - 2)];
        fours[0] = _mm512_shuffle_epi8(_mm512_shuffle_i32x4(halves[0], halves[1], 0x88), in_lanes);
        fours[1] = _mm512_shuffle_epi8(_mm512_shuffle_i32x4(halves[0], halves[1], 0xDD), in_lanes);
    }
}

/* out[c] += sums * *unit, for 8 * n_words channels (rounded up to 16), of low and of high nibbles. */
ALWAYS_INLINE void add_channels(__m512i low, __m512i high, uint32_t n_words, const float *unit, float *out)
{
    const __m512i first_words = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i last_words = _mm512_add_epi32(first_words, _mm512_set1_epi32(8));
    for (uint32_t half = 0; 2 * half < n_words; half++) {
        __m512i channels = _mm512_permutex2var_epi32(low, half ? last_words : first_words, high);
        __m512 before = _mm512_loadu_ps(out + 16 * half);
        _mm512_storeu_ps(out + 16 * half, _mm512_fmadd_ps(_mm512_cvtepi32_ps(channels), _mm512_set1_ps(*unit), before));
    }
}

ALWAYS_INLINE __m512i join_digits(const __m512i sums[2])
{
    return _mm512_add_epi32(_mm512_slli_epi32(sums[1], 8), sums[0]);
}

/* 16 times the mantissas of low, of high nibbles; of SBFP12 mantissas plus 8, of high ones 16 times that. is_scaled is a
 * constant; so below. */
ALWAYS_INLINE __m512i low_nibbles(__m512i fours, const bool is_scaled)
{
    const __m512i sign_bits = _mm512_set1_epi8(0x08), nibble = _mm512_set1_epi8(0x0F);
    if (is_scaled)
        return _mm512_ternarylogic_epi32(fours, sign_bits, nibble, 0x28); /* (fours ^ sign_bits) & nibble */
    return _mm512_and_si512(_mm512_slli_epi32(fours, 4), _mm512_set1_epi8((char)0xF0));
}

ALWAYS_INLINE __m512i high_nibbles(__m512i fours, const bool is_scaled)
{
    const __m512i sign_bits = _mm512_set1_epi8((char)0x80), nibble = _mm512_set1_epi8((char)0xF0);
    if (is_scaled)
        return _mm512_ternarylogic_epi32(fours, sign_bits, nibble, 0x28);
    return _mm512_and_si512(fours, nibble);
}

ALWAYS_INLINE __m512i add_products(__m512i sum, __m512i digits, __m512i mantissas, const bool is_scaled)
{
    return is_scaled ? _mm512_dpbusd_epi32(sum, mantissas, digits) : _mm512_dpbusd_epi32(sum, digits, mantissas);
}

/* Adds n_words words (up to WORDS_AT_ONCE) of the block to the accumulators of their first channel, and makes the
 * digits of the next block, if that is not NULL. n_rows and is_scaled are constants. */
ALWAYS_INLINE void accumulate_words(const struct tile_span *values, uint32_t word, uint32_t n_words,
                                    const struct tile_weights *rows, const struct block_weights *block,
                                    struct block_weights *next_block, const int n_rows, const bool is_scaled,
                                    float *accumulators, size_t stride)
{
    const size_t offset = word_offset(values->layout, word, 0), strip_stride = strip_bytes(values->layout);
    const uint8_t *words = values->tile + offset, *next_words = values->next + offset;
    uint32_t offsets[WORDS_AT_ONCE]; /* words that are missing repeat the last, into channels that are not added */
    for (uint32_t i = 0; i < WORDS_AT_ONCE; i++)
        offsets[i] = 64 * (uint32_t)min_size(i, n_words - 1);
    __m512i dots[2][ROWS_AT_ONCE][2]; /* [nibble][row][digit] */
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; r++) {
        dots[0][r][0] = dots[0][r][1] = dots[1][r][0] = dots[1][r][1] = _mm512_setzero_si512();
        if (is_scaled) { /* high nibbles are multiplied 16 times too large */
            dots[0][r][0] = _mm512_set1_epi32((int32_t)(0 - block->surplus[r]));
            dots[1][r][0] = _mm512_set1_epi32((int32_t)(0 - 16 * block->surplus[r]));
        }
    }
    struct transposed_words strip, next_strip;
#pragma GCC unroll 4
    for (uint32_t step = 0; step < PARTS; step++)
        transpose_step(words, offsets, step, &strip);
    /* All strips as one run of instructions: a strip's loads are then on their way before the prefetches of the one
     * before it, which wait where many lines are asked for (a loop took up to a quarter more time from memory). */
#pragma GCC unroll 4
    for (uint32_t s = 0; s < STRIPS_PER_TILE; s++) {
#pragma GCC unroll 4
        for (uint32_t p = 0; p < PARTS; p++) {
            PREFETCH_NEXT(next_words + 64 * s + p * strip_stride);
            if (s + 1 < STRIPS_PER_TILE)
                transpose_step(words + (s + 1) * strip_stride, offsets, p, &next_strip);
            if (next_block && p == 2 && s < (uint32_t)n_rows)
                weigh_row(rows, (int)s, is_scaled, next_block);
            __m512i low = low_nibbles(strip.fours[p], is_scaled), high = high_nibbles(strip.fours[p], is_scaled);
#pragma GCC unroll 4
            for (int r = 0; r < n_rows; r++)
#pragma GCC unroll 2
                for (int digit = 0; digit < 2; digit++) {
                    __m512i weights = _mm512_set1_epi32((int32_t)block->digits[r][digit][4 * p + s]);
                    dots[0][r][digit] = add_products(dots[0][r][digit], weights, low, is_scaled);
                    dots[1][r][digit] = add_products(dots[1][r][digit], weights, high, is_scaled);
                }
        }
        if (s + 1 < STRIPS_PER_TILE)
            strip = next_strip;
    }
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; r++)
        add_channels(is_scaled ? _mm512_slli_epi32(join_digits(dots[0][r]), 4) : join_digits(dots[0][r]),
                     join_digits(dots[1][r]), n_words, &block->units[r], accumulators + r * stride);
}

/* Rows 0 .. n_rows-1 of the pointers given. n_rows (up to ROWS_AT_ONCE) and is_scaled are constants. */
ALWAYS_INLINE void accumulate_rows(const struct tile_span *values, const int n_rows, const bool is_scaled,
                                   const float (*weights)[KSORT_TILE_TOKENS], const float *rescale, float *accumulators,
                                   size_t stride)
{
    const struct head_layout *layout = values->layout;
    const __m512i inside = tokens_inside(values);
    struct tile_weights rows;
    struct block_weights blocks[2]; /* block b is in place b % 2 */
    prepare_block(values, 0, inside, is_scaled, &blocks[0]);
    rescale_rows((uint32_t)n_rows, layout->head_dim, rescale, accumulators, stride);
    share_weights(weights, n_rows, is_scaled, &rows);
    for (int r = 0; r < n_rows; r++)
        weigh_row(&rows, r, is_scaled, &blocks[0]);
    for (uint32_t b = 0, word = 0; b < layout->n_blocks; b++) {
        struct block_weights *next_block = NULL;
        uint32_t end = layout->n_words;
        if (b + 1 < layout->n_blocks) {
            end = word + layout->block_size / 8;
            next_block = &blocks[(b + 1) % 2];
            prepare_block(values, b + 1, inside, is_scaled, next_block);
        }
        __m128 unit = _mm_set1_ps(blocks[b % 2].unit);
        _mm_storeu_ps(blocks[b % 2].units, _mm_mul_ps(_mm_loadu_ps(rows.largest), unit));
        for (; word < end; word += WORDS_AT_ONCE, next_block = NULL)
            accumulate_words(values, word, (uint32_t)min_size(end - word, WORDS_AT_ONCE), &rows, &blocks[b % 2],
                             next_block, n_rows, is_scaled, accumulators + 8 * word, stride);
        word = end;
    }
}

ALWAYS_INLINE void accumulate_all(const struct tile_span *values, uint32_t n_rows, const bool is_scaled,
                                  const float (*weights)[KSORT_TILE_TOKENS], const float *rescale, float *accumulators,
                                  size_t stride)
{
    for (uint32_t row = 0; row < n_rows; row += ROWS_AT_ONCE) {
        float *out = accumulators + row * stride;
        switch (min_size(n_rows - row, ROWS_AT_ONCE)) {
        case 1: accumulate_rows(values, 1, is_scaled, weights + row, rescale + row, out, stride); break;
        case 2: accumulate_rows(values, 2, is_scaled, weights + row, rescale + row, out, stride); break;
        case 3: accumulate_rows(values, 3, is_scaled, weights + row, rescale + row, out, stride); break;
        default: accumulate_rows(values, 4, is_scaled, weights + row, rescale + row, out, stride);
        }
    }
}

void ksort_avx512vnni_accumulate_bfp(const struct tile_span *values, uint32_t n_rows,
                                     const float (*weights)[KSORT_TILE_TOKENS], const float *rescale,
                                     float *accumulators, size_t stride)
{
    const struct head_layout *layout = values->layout;
    if (layout->mantissa_bits != 4) {
        ksort_avx512_accumulate_bfp(values, n_rows, weights, rescale, accumulators, stride);
        return;
    }
    for (uint32_t b = 0; b < layout->n_blocks; b++) /* words are asked for beside the products */
        PREFETCH_NEXT(values->next + exponent_offset(layout, b, 0));
    if (layout->is_scaled)
        accumulate_all(values, n_rows, true, weights, rescale, accumulators, stride);
    else
        accumulate_all(values, n_rows, false, weights, rescale, accumulators, stride);
}
