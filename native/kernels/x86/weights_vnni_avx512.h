/* The weights of values_vnni_avx512.c: a tile's, times a block's steps, in digits of 8 bits.
 *
 *   BFP12:  integers of 16 bits, shifted right by what the token's exponent is below the block's largest. Two unsigned
 *           digits; the products' other side is 16 times a mantissa.
 *   SBFP12: scales are signed: weight * scale is made a signed integer of 16 bits, in two signed digits. The other side is
 *           a mantissa plus 8, whose surplus the sums start below.
 */
#ifndef KSORT_WEIGHTS_VNNI_AVX512_H
#define KSORT_WEIGHTS_VNNI_AVX512_H

#include "x86/reduce_avx512.h"
#include "x86/x86.h"

#define ROWS_AT_ONCE 4
#define FOURS_PER_TILE (KSORT_TILE_TOKENS / 4)
#define LARGEST_WEIGHT 65535.0f        /* two unsigned digits of 8 bits */
#define LARGEST_SIGNED_WEIGHT 32639.0f /* two signed ones: 127 * 256 + 127 */
#define SMALLEST_WEIGHT 1e-30f         /* less counts as nothing, so that what scales it up stays finite */

/* Low and high digits of a row's weights in a block: a byte a token, four tokens in a word. Word 4p + s has tokens
 * 4p .. 4p+3 of strip s. */
typedef uint32_t row_digits[2][FOURS_PER_TILE];

/* Weights of a tile, in shares of the row's largest. */
struct tile_weights {
    /* BFP: in units of 1 / LARGEST_WEIGHT, 16 bits each. Register 0 has strips 0 and 1, register 1 strips 2 and 3: in
     * part p tokens 4p .. 4p+3 of the one, then of the other. */
    __m512i integers[ROWS_AT_ONCE][2];
    __m512 shares[ROWS_AT_ONCE][STRIPS_PER_TILE]; /* SBFP */
    float largest[ROWS_AT_ONCE];
};

struct block_weights {
    /* BFP: a token's step is the largest * 2^-shift. Tokens are as in `integers`. */
    __m512i shifts[2];              /* by one less, as the last place is rounded away; 0 for no shift */
    __m512i whole[2];               /* all ones for no shift */
    __m512 scales[STRIPS_PER_TILE]; /* SBFP: in units of 1 / LARGEST_SIGNED_WEIGHT of the largest */
    float unit; /* value of a mantissa's unit times that of a digit's where the row's largest weight is 1 */
    float units[ROWS_AT_ONCE];      /* the same for the rows' largest weights */
    uint32_t surplus[ROWS_AT_ONCE]; /* SBFP: 8 * the weights' sum */
    _Alignas(64) row_digits digits[ROWS_AT_ONCE];
};

/* n_rows and is_scaled are constants. */
ALWAYS_INLINE void share_weights(const float (*weights)[KSORT_TILE_TOKENS], const int n_rows, const bool is_scaled,
                                 struct tile_weights *rows)
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
    __m128 maxima = maxima_of_four(largest), whole = _mm_set1_ps(is_scaled ? 1.0f : LARGEST_WEIGHT);
    _mm_storeu_ps(rows->largest, maxima);
    __mmask8 counts = _mm_cmp_ps_mask(maxima, _mm_set1_ps(SMALLEST_WEIGHT), _CMP_GT_OQ);
    __m512 scales = _mm512_castps128_ps512(_mm_maskz_div_ps(counts, whole, maxima));
    for (int r = 0; r < n_rows; r++) {
        const __m512 scale = _mm512_permutexvar_ps(_mm512_set1_epi32(r), scales);
        __m512 shares[STRIPS_PER_TILE];
        for (int s = 0; s < STRIPS_PER_TILE; s++)
            shares[s] = _mm512_mul_ps(_mm512_loadu_ps(&weights[r][STRIP_TOKENS * s]), scale);
        if (is_scaled) {
            memcpy(rows->shares[r], shares, sizeof shares);
            continue;
        }
        __m512i w[STRIPS_PER_TILE];
        for (int s = 0; s < STRIPS_PER_TILE; s++)
            w[s] = _mm512_cvtps_epi32(shares[s]);
        rows->integers[r][0] = _mm512_packus_epi32(w[0], w[1]);
        rows->integers[r][1] = _mm512_packus_epi32(w[2], w[3]);
    }
}

/* Bytes of all ones for the span's tokens. */
ALWAYS_INLINE __m512i tokens_inside(const struct tile_span *values)
{
    return _mm512_movm_epi8(UINT64_MAX >> (KSORT_TILE_TOKENS - values->end) & UINT64_MAX << values->begin);
}

/* 255 - the largest of 64 bytes, in the lowest 16 bits. */
ALWAYS_INLINE __m128i complement_of_largest(__m512i x)
{
    __m256i half = _mm256_max_epu8(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
    __m128i bytes = _mm_max_epu8(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    bytes = _mm_max_epu8(bytes, _mm_srli_epi16(bytes, 8));
    /* there is an instruction for the minimum of 8 lanes: that of 255 - byte */
    return _mm_minpos_epu16(_mm_andnot_si128(bytes, _mm_set1_epi16(0xFF)));
}

/* Sets all of a BFP block but its digits. Zero blocks, and tokens outside the span, whose bytes may be stale, are
 * shifted out. */
ALWAYS_INLINE void compare_exponents(__m512i exponents, struct block_weights *block)
{
    const __m512i one = _mm512_set1_epi16(1), byte_one = _mm512_set1_epi8(1);
    const __m512i in_parts = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    __m128i complement = complement_of_largest(exponents);
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

/* The same of SBFP. Codes of tokens outside the span are 0, as are their scales. */
ALWAYS_INLINE void compare_scales(__m512i codes, struct block_weights *block)
{
    __m128i complement = complement_of_largest(_mm512_and_si512(codes, _mm512_set1_epi8(0x7F)));
    __m128i largest_code = _mm_slli_epi16(_mm_xor_si128(complement, _mm_set1_epi16(0xFF)), 8);
    float largest = _mm512_cvtss_f32(_mm512_cvtph_ps(_mm256_castsi128_si256(largest_code)));
    const __m512 factor = _mm512_set1_ps(largest != 0.0f ? LARGEST_SIGNED_WEIGHT / largest : 0.0f);
    for (int i = 0; i < 2; i++) {
        __m256i two_strips = i ? _mm512_extracti64x4_epi64(codes, 1) : _mm512_castsi512_si256(codes);
        __m512i halves = _mm512_slli_epi16(_mm512_cvtepu8_epi16(two_strips), 8);
        block->scales[2 * i] = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(halves)), factor);
        block->scales[2 * i + 1] = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1)), factor);
    }
    block->unit = largest * (1 / (16 * LARGEST_SIGNED_WEIGHT)); /* sums are made 16 times too large */
}

/* is_scaled is a constant. */
ALWAYS_INLINE void prepare_block(const struct tile_span *values, uint32_t b, __m512i inside, const bool is_scaled,
                                 struct block_weights *block)
{
    __m512i codes = _mm512_loadu_si512(values->tile + exponent_offset(values->layout, b, 0));
    codes = _mm512_and_si512(codes, inside);
    if (is_scaled)
        compare_scales(codes, block);
    else
        compare_exponents(codes, block);
}

/* Digits of a row's weights times a BFP block's steps. */
ALWAYS_INLINE void shift_row(const __m512i weights[2], const struct block_weights *block, row_digits digits)
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

/* Digits of a row's weights times an SBFP block's scales. Returns 8 * their sum.
 * Floats from 2^23 to 2^24 are whole: 1.5 * 2^23 plus the product is rounded to the product's integer in the lowest bits.
 * 128 more, and byte 1 is the high digit, byte 0 the low one plus 128. */
ALWAYS_INLINE uint32_t scale_row(const __m512 shares[STRIPS_PER_TILE], const struct block_weights *block,
                                 row_digits digits)
{
    const float whole = 0x1.8p23f + 128.0f;
    const __m512i by_digits =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, -1, -1, -1, -1, -1, -1, -1, -1));
    __m512i w[STRIPS_PER_TILE], sum = _mm512_set1_epi32((int32_t)(0u - STRIPS_PER_TILE * float_bits(whole)));
    for (int s = 0; s < STRIPS_PER_TILE; s++) {
        __m512i bits = _mm512_castps_si512(_mm512_fmadd_ps(shares[s], block->scales[s], _mm512_set1_ps(whole)));
        sum = _mm512_add_epi32(sum, bits);
        w[s] = _mm512_shuffle_epi8(bits, by_digits); /* in each part: 4 tokens' low digits, then their high ones */
    }
    __m512i first = _mm512_unpacklo_epi32(w[0], w[1]), last = _mm512_unpacklo_epi32(w[2], w[3]);
    __m512i low = _mm512_xor_si512(_mm512_unpacklo_epi64(first, last), _mm512_set1_epi8((char)0x80));
    _mm512_store_si512(digits[0], low);
    _mm512_store_si512(digits[1], _mm512_unpackhi_epi64(first, last));
    return 8 * (uint32_t)_mm512_reduce_add_epi32(sum);
}

/* The digits of row r. is_scaled is a constant. */
ALWAYS_INLINE void weigh_row(const struct tile_weights *rows, int r, const bool is_scaled, struct block_weights *block)
{
    if (is_scaled)
        block->surplus[r] = scale_row(rows->shares[r], block, block->digits[r]);
    else
        shift_row(rows->integers[r], block, block->digits[r]);
}

#endif /* KSORT_WEIGHTS_VNNI_AVX512_H */
