/* Weighted BFP12 values in integers: vpdpbusd adds four products of an unsigned byte (a digit of a weight) and a signed
 * one (16 times a mantissa) to each lane. Four tokens stand in a lane's bytes: values are never converted to float.
 *
 *   1. once a tile, for 4 rows: weight / the row's largest, as integers of 16 bits
 *   2. for every block: shifted right by what the token's exponent is below the block's largest, as two digits of 8
 *      bits; four tokens' digits are a quad:
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
#include "x86/reduce_avx512.h"
#include "x86/x86.h"

#define ROWS_AT_ONCE 4
#define WORDS_AT_ONCE 4
#define PARTS 4 /* of 128 bits, in a register */
#define FOURS_PER_TILE (KSORT_TILE_TOKENS / 4)
#define LARGEST_WEIGHT 65535.0f /* two digits of 8 bits */
#define SMALLEST_WEIGHT 1e-30f  /* less counts as nothing, so that what scales it up stays finite */

/* Low and high digits of a row's weights in a block: a byte a token, four tokens in a word. Word 4p + s has tokens
 * 4p .. 4p+3 of strip s. */
typedef uint32_t row_digits[2][FOURS_PER_TILE];

/* Weights of a tile in units of largest / LARGEST_WEIGHT, 16 bits each. Register 0 has strips 0 and 1, register 1
 * strips 2 and 3: in part p tokens 4p .. 4p+3 of the one, then of the other. */
struct integer_rows {
    __m512i weights[ROWS_AT_ONCE][2];
    float largest[ROWS_AT_ONCE];
};

struct block_weights {
    /* A token's step is the largest * 2^-shift. Tokens are as in integer_rows. */
    __m512i shifts[2]; /* by one less, as the last place is rounded away; 0 for no shift */
    __m512i whole[2];  /* all ones for no shift */
    float unit;        /* value of a mantissa's unit times that of a digit's where the row's largest weight is 1 */
    float units[ROWS_AT_ONCE]; /* the same for the rows' largest weights */
    _Alignas(64) row_digits digits[ROWS_AT_ONCE];
};

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

/* n_rows is a constant. */
ALWAYS_INLINE void round_rows(const float (*weights)[KSORT_TILE_TOKENS], const int n_rows, struct integer_rows *rows)
{
    __m512 largest[4];
    for (int r = 0; r < n_rows; r++) {
        __m512 w[STRIPS_PER_TILE];
        for (int s = 0; s < STRIPS_PER_TILE; s++)
            w[s] = _mm512_loadu_ps(&weights[r][STRIP_TOKENS * s]);
        largest[r] = _mm512_max_ps(_mm512_max_ps(w[0], w[1]), _mm512_max_ps(w[2], w[3]));
    }
    for (int r = n_rows; r < 4; r++)
        largest[r] = largest[0];
    __m128 maxima = maxima_of_four(largest);
    _mm_storeu_ps(rows->largest, maxima);
    __mmask8 counts = _mm_cmp_ps_mask(maxima, _mm_set1_ps(SMALLEST_WEIGHT), _CMP_GT_OQ);
    __m512 scales = _mm512_castps128_ps512(_mm_maskz_div_ps(counts, _mm_set1_ps(LARGEST_WEIGHT), maxima));
    for (int r = 0; r < n_rows; r++) {
        const __m512 scale = _mm512_permutexvar_ps(_mm512_set1_epi32(r), scales);
        __m512i w[STRIPS_PER_TILE];
        for (int s = 0; s < STRIPS_PER_TILE; s++)
            w[s] = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(&weights[r][STRIP_TOKENS * s]), scale));
        rows->weights[r][0] = _mm512_packus_epi32(w[0], w[1]);
        rows->weights[r][1] = _mm512_packus_epi32(w[2], w[3]);
    }
}

/* Bytes of all ones for the span's tokens. */
ALWAYS_INLINE __m512i tokens_inside(const struct tile_span *values)
{
    return _mm512_movm_epi8(UINT64_MAX >> (KSORT_TILE_TOKENS - values->end) & UINT64_MAX << values->begin);
}

/* Sets all of a block but its digits. Zero blocks, and tokens outside the span, whose bytes may be stale, are shifted
 * out. */
ALWAYS_INLINE void compare_exponents(const struct tile_span *values, uint32_t b, __m512i inside,
                                     struct block_weights *block)
{
    const __m512i one = _mm512_set1_epi16(1), byte_one = _mm512_set1_epi8(1);
    const __m512i in_parts = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    __m512i exponents = _mm512_loadu_si512(values->tile + exponent_offset(values->layout, b, 0));
    exponents = _mm512_and_si512(exponents, inside);
    __m256i half = _mm256_max_epu8(_mm512_castsi512_si256(exponents), _mm512_extracti64x4_epi64(exponents, 1));
    __m128i bytes = _mm_max_epu8(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    bytes = _mm_max_epu8(bytes, _mm_srli_epi16(bytes, 8));
    /* there is an instruction for the minimum of 8 lanes: that of 255 - exponent */
    __m128i complement = _mm_minpos_epu16(_mm_andnot_si128(bytes, _mm_set1_epi16(0xFF)));
    __m512i largest = _mm512_xor_si512(_mm512_broadcastb_epi8(complement), _mm512_set1_epi8(-1));
    __m512i is_zero = _mm512_sub_epi8(_mm512_min_epu8(exponents, byte_one), byte_one); /* all ones if so */
    __m512i below = _mm512_or_si512(_mm512_sub_epi8(largest, exponents), is_zero);
    below = _mm512_permutexvar_epi32(in_parts, below);
    for (int i = 0; i < 2; i++) {
        __m512i shift = _mm512_cvtepu8_epi16(i ? _mm512_extracti64x4_epi64(below, 1) : _mm512_castsi512_si256(below));
        block->shifts[i] = _mm512_subs_epu16(shift, one);
        block->whole[i] = _mm512_sub_epi16(_mm512_min_epu16(shift, one), one);
    }
    uint32_t exponent = 0xFF - (uint32_t)_mm_cvtsi128_si32(complement);
    /* 2^-2 is BFP12's mantissa unit, and mantissas are multiplied 16 times too large */
    block->unit = exponent_scale((uint8_t)exponent) * (1 / (64 * LARGEST_WEIGHT));
}

/* Digits of a row's weights times the block's steps. */
ALWAYS_INLINE void weigh_row(const __m512i weights[2], const struct block_weights *block, row_digits digits)
{
    const __m512i low_byte = _mm512_set1_epi16(0xFF);
    __m512i w[2];
    for (int i = 0; i < 2; i++) { /* the average of x and 0 is x / 2, rounded; that of x and x is x */
        __m512i x = _mm512_srlv_epi16(weights[i], block->shifts[i]);
        w[i] = _mm512_avg_epu16(x, _mm512_and_si512(x, block->whole[i]));
    }
    /* packing works within parts: part p holds, strip after strip, tokens 4p .. 4p+3 */
    __m512i low = _mm512_packus_epi16(_mm512_and_si512(w[0], low_byte), _mm512_and_si512(w[1], low_byte));
    __m512i high = _mm512_packus_epi16(_mm512_srli_epi16(w[0], 8), _mm512_srli_epi16(w[1], 8));
    _mm512_store_si512(digits[0], low);
    _mm512_store_si512(digits[1], high);
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

/* Adds n_words words (up to WORDS_AT_ONCE) of the block to the accumulators of their first channel, and makes the
 * digits of the next block, if that is not NULL. n_rows is a constant. */
ALWAYS_INLINE void accumulate_words(const struct tile_span *values, uint32_t word, uint32_t n_words,
                                    const struct integer_rows *rows, const struct block_weights *block,
                                    struct block_weights *next_block, const int n_rows, float *accumulators,
                                    size_t stride)
{
    const __m512i high_nibble = _mm512_set1_epi8((char)0xF0);
    const size_t offset = word_offset(values->layout, word, 0), strip_stride = strip_bytes(values->layout);
    const uint8_t *words = values->tile + offset, *next_words = values->next + offset;
    uint32_t offsets[WORDS_AT_ONCE]; /* words that are missing repeat the last, into channels that are not added */
    for (uint32_t i = 0; i < WORDS_AT_ONCE; i++)
        offsets[i] = 64 * (uint32_t)min_size(i, n_words - 1);
    __m512i dots[2][ROWS_AT_ONCE][2]; /* [nibble][row][digit] */
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; r++)
        for (int digit = 0; digit < 2; digit++)
            dots[0][r][digit] = dots[1][r][digit] = _mm512_setzero_si512();
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
                weigh_row(rows->weights[s], next_block, next_block->digits[s]);
            __m512i low = _mm512_and_si512(_mm512_slli_epi32(strip.fours[p], 4), high_nibble);
            __m512i high = _mm512_and_si512(strip.fours[p], high_nibble);
#pragma GCC unroll 4
            for (int r = 0; r < n_rows; r++)
#pragma GCC unroll 2
                for (int digit = 0; digit < 2; digit++) {
                    __m512i weights = _mm512_set1_epi32((int32_t)block->digits[r][digit][4 * p + s]);
                    dots[0][r][digit] = _mm512_dpbusd_epi32(dots[0][r][digit], weights, low);
                    dots[1][r][digit] = _mm512_dpbusd_epi32(dots[1][r][digit], weights, high);
                }
        }
        if (s + 1 < STRIPS_PER_TILE)
            strip = next_strip;
    }
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; r++)
        add_channels(join_digits(dots[0][r]), join_digits(dots[1][r]), n_words, &block->units[r],
                     accumulators + r * stride);
}

/* Rows 0 .. n_rows-1 of the pointers given. n_rows is a constant up to ROWS_AT_ONCE. */
ALWAYS_INLINE void accumulate_rows(const struct tile_span *values, const int n_rows,
                                   const float (*weights)[KSORT_TILE_TOKENS], const float *rescale, float *accumulators,
                                   size_t stride)
{
    const struct head_layout *layout = values->layout;
    const __m512i inside = tokens_inside(values);
    struct integer_rows rows;
    struct block_weights blocks[2]; /* block b is in place b % 2 */
    compare_exponents(values, 0, inside, &blocks[0]);
    rescale_rows((uint32_t)n_rows, layout->head_dim, rescale, accumulators, stride);
    round_rows(weights, n_rows, &rows);
    for (int r = 0; r < n_rows; r++)
        weigh_row(rows.weights[r], &blocks[0], blocks[0].digits[r]);
    for (uint32_t b = 0, word = 0; b < layout->n_blocks; b++) {
        struct block_weights *next_block = NULL;
        uint32_t end = layout->n_words;
        if (b + 1 < layout->n_blocks) {
            end = word + layout->block_size / 8;
            next_block = &blocks[(b + 1) % 2];
            compare_exponents(values, b + 1, inside, next_block);
        }
        __m128 unit = _mm_set1_ps(blocks[b % 2].unit);
        _mm_storeu_ps(blocks[b % 2].units, _mm_mul_ps(_mm_loadu_ps(rows.largest), unit));
        for (; word < end; word += WORDS_AT_ONCE, next_block = NULL)
            accumulate_words(values, word, (uint32_t)min_size(end - word, WORDS_AT_ONCE), &rows, &blocks[b % 2],
                             next_block, n_rows, accumulators + 8 * word, stride);
        word = end;
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
    for (uint32_t b = 0; b < values->layout->n_blocks; b++) /* words are asked for beside the products */
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
