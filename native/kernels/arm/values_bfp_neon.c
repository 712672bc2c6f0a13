/* Weighted values of BFP types with Advanced SIMD, in integers: SDOT adds to each lane four products of a byte of a
 * value (a mantissa, times 2^(8 - mantissa_bits)) and one of a weight. The four bytes of a lane are four tokens.
 *
 *   1. once a block: weights * scale of all rows, as integers of three signed digits to base 256, the largest of a
 *      row being LARGEST_WEIGHT:
 *          digits [rows][3][64 tokens], up to 6 KB, on the stack
 *   2. once for 16 channels (a chunk): quads of 64 tokens, 4 x 4 bytes of a register transposed:
 *          chunk [4 strips][4 quads][4 registers], 1 KB; in register i lane c holds channel c of tokens 4 i .. 4 i + 3
 *   3. up to 12 sums in registers over the strips, rows x quads x digits: 1 x 4 x 3, 2 x 2 x 3, 3 x 1 x 3, 4 x 1 x 3
 *
 *                   quad of 4 x 4 tokens
 *                 +----+----+----+----+     SDOT by element: register i of the quad with lane i of the row's digits
 *     digits  ->  | lanes: 4 channels |
 *                 +----+----+----+----+
 *   4. the digits' sums to float, joined, times the row's scale, into the accumulators
 *
 * A weight is off by half a unit, 1.01 * 2^-24 of the largest weighted step in tile and block, and sums are exact (up
 * to 2^20 a digit): no worse than sums of floats. Tokens outside the span have weight 0.
 * Bytes moved: the tile once for all rows; digits and chunks stay in L1.
 * Arithmetic instructions for 64 tokens x 32 channels, BFP12 in one block: 256 to unpack and transpose, 128 for steps,
 * then for every row 120 to weigh, 384 SDOT, 64 to join: 952 for one row, 664 a row for 4. With floats multiply-adds
 * alone take 512 a row, and converting mantissas 1024.
 */
#include "arm/quads_neon.h"

#define ROWS_AT_ONCE 4
#define DIGITS 3
#define LARGEST_WEIGHT 8323072.0f /* 127 * 256^2: rounding errors stay below 127 * 256^2 + 127 * 256 + 127 */
#define SMALLEST_WEIGHT 1e-30f /* of the largest step; where all are less they count as nothing: no scale overflows */
#define TILE_REGISTERS (KSORT_TILE_TOKENS / 4)

typedef int8_t weight_digits[DIGITS][KSORT_TILE_TOKENS]; /* lowest digit first */
typedef strip_quad value_chunk[STRIPS_PER_TILE][CHUNK_QUADS];

/* A block's weights of all rows: value = scales[row] * unit * (digits to base 256). */
struct weighted_rows {
    weight_digits digits[MAX_ROWS];
    float scales[MAX_ROWS];
    float unit; /* mantissa_unit, and of BFP 2^(largest exponent - 127) */
};

/* Scale bytes of a strip's tokens; 0 outside the span, whose bytes may be stale. */
ALWAYS_INLINE uint8x16_t seen_codes(const struct tile_span *span, uint32_t block, uint32_t first_token)
{
    const uint8x16_t lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    uint8x16_t token = vaddq_u8(lane, vdupq_n_u8((uint8_t)first_token));
    uint8x16_t inside =
        vandq_u8(vcgeq_u8(token, vdupq_n_u8((uint8_t)span->begin)), vcltq_u8(token, vdupq_n_u8((uint8_t)span->end)));
    return vandq_u8(vld1q_u8(span->tile + exponent_offset(span->layout, block, first_token)), inside);
}

/* 2^(exponent - largest), 0 for exponent 0. */
ALWAYS_INLINE float32x4_t relative_steps(uint16x4_t exponents, uint8_t largest)
{
    uint32x4_t exponent = vmovl_u16(exponents);
    int32x4_t biased = vaddq_s32(vreinterpretq_s32_u32(exponent), vdupq_n_s32(127 - largest));
    uint32x4_t bits = vreinterpretq_u32_s32(vshlq_n_s32(vmaxq_s32(biased, vdupq_n_s32(0)), 23));
    return vreinterpretq_f32_u32(vandq_u32(bits, vtstq_u32(exponent, exponent)));
}

/* SBFP scales of the tile's tokens. */
ALWAYS_INLINE void load_scales(const struct tile_span *span, uint32_t block, float32x4_t steps[TILE_REGISTERS])
{
    for (int s = 0; s < STRIPS_PER_TILE; s++) {
        uint8x16_t codes = seen_codes(span, block, (uint32_t)s * STRIP_TOKENS);
        float16x8_t low = vreinterpretq_f16_u16(vshll_n_u8(vget_low_u8(codes), 8));
        float16x8_t high = vreinterpretq_f16_u16(vshll_high_n_u8(codes, 8));
        steps[4 * s] = vcvt_f32_f16(vget_low_f16(low));
        steps[4 * s + 1] = vcvt_high_f32_f16(low);
        steps[4 * s + 2] = vcvt_f32_f16(vget_low_f16(high));
        steps[4 * s + 3] = vcvt_high_f32_f16(high);
    }
}

/* Steps of the tile's tokens relative to the largest, which is returned. */
ALWAYS_INLINE float load_steps(const struct tile_span *span, uint32_t block, float32x4_t steps[TILE_REGISTERS])
{
    uint8x16_t exponents[STRIPS_PER_TILE], largest = vdupq_n_u8(0);
    for (uint32_t s = 0; s < STRIPS_PER_TILE; s++) {
        exponents[s] = seen_codes(span, block, s * STRIP_TOKENS);
        largest = vmaxq_u8(largest, exponents[s]);
    }
    uint8_t max = vmaxvq_u8(largest);
    for (int s = 0; s < STRIPS_PER_TILE; s++) {
        uint16x8_t low = vmovl_u8(vget_low_u8(exponents[s])), high = vmovl_high_u8(exponents[s]);
        steps[4 * s] = relative_steps(vget_low_u16(low), max);
        steps[4 * s + 1] = relative_steps(vget_high_u16(low), max);
        steps[4 * s + 2] = relative_steps(vget_low_u16(high), max);
        steps[4 * s + 3] = relative_steps(vget_high_u16(high), max);
    }
    return exponent_scale(max);
}

/* The digits of 16 weights from 0 to about LARGEST_WEIGHT, into columns first .. first+15. Adding 128 to each of the
 * lower two makes them unsigned bytes that carry as they should. */
ALWAYS_INLINE void store_digits(const int32x4_t weights[STRIP_REGISTERS], weight_digits digits, uint32_t first)
{
    const uint8x16_t sign = vdupq_n_u8(0x80);
    uint8x16_t bytes[STRIP_REGISTERS];
    for (int i = 0; i < STRIP_REGISTERS; i++)
        bytes[i] = vreinterpretq_u8_s32(vaddq_s32(weights[i], vdupq_n_s32(0x8080)));
    uint8x16_t even01 = vuzp1q_u8(bytes[0], bytes[1]), even23 = vuzp1q_u8(bytes[2], bytes[3]);
    uint8x16_t odd01 = vuzp2q_u8(bytes[0], bytes[1]), odd23 = vuzp2q_u8(bytes[2], bytes[3]);
    vst1q_s8(&digits[0][first], vreinterpretq_s8_u8(veorq_u8(vuzp1q_u8(even01, even23), sign)));
    vst1q_s8(&digits[1][first], vreinterpretq_s8_u8(veorq_u8(vuzp1q_u8(odd01, odd23), sign)));
    vst1q_s8(&digits[2][first], vreinterpretq_s8_u8(vuzp2q_u8(even01, even23)));
}

/* Digits of one row's weights * steps, which may be negative if is_scaled (a constant). Returns what they are to be
 * multiplied with. */
ALWAYS_INLINE float weigh_row(const float weights[KSORT_TILE_TOKENS], const float32x4_t steps[TILE_REGISTERS],
                              const bool is_scaled, weight_digits digits)
{
    float32x4_t products[TILE_REGISTERS], largest = vdupq_n_f32(0.0f);
    for (int i = 0; i < TILE_REGISTERS; i++) {
        products[i] = vmulq_f32(vld1q_f32(weights + 4 * i), steps[i]);
        largest = vmaxq_f32(largest, is_scaled ? vabsq_f32(products[i]) : products[i]);
    }
    float max = vmaxvq_f32(largest), factor = max > SMALLEST_WEIGHT ? LARGEST_WEIGHT / max : 0.0f;
    for (int s = 0; s < STRIPS_PER_TILE; s++) {
        int32x4_t rounded[STRIP_REGISTERS];
        for (int i = 0; i < STRIP_REGISTERS; i++)
            rounded[i] = vcvtnq_s32_f32(vmulq_n_f32(products[STRIP_REGISTERS * s + i], factor));
        store_digits(rounded, digits, (uint32_t)s * STRIP_TOKENS);
    }
    return max * (1 / LARGEST_WEIGHT);
}

static void weigh_rows(const struct tile_span *span, uint32_t block, uint32_t n_rows,
                       const float (*weights)[KSORT_TILE_TOKENS], struct weighted_rows *rows)
{
    float32x4_t steps[TILE_REGISTERS];
    rows->unit = mantissa_unit(span->layout) * quad_unit(span->layout);
    if (span->layout->is_scaled) {
        load_scales(span, block, steps);
        for (uint32_t r = 0; r < n_rows; r++)
            rows->scales[r] = weigh_row(weights[r], steps, true, rows->digits[r]);
    } else {
        rows->unit *= load_steps(span, block, steps);
        for (uint32_t r = 0; r < n_rows; r++)
            rows->scales[r] = weigh_row(weights[r], steps, false, rows->digits[r]);
    }
}

/* The quads of a chunk, which is half a group of SBFP11: two of its three words. */
ALWAYS_INLINE void unpack_half_group(const uint8_t *group, uint32_t half, strip_quad quads[CHUNK_QUADS])
{
    for (int i = 0; i < STRIP_REGISTERS; i++) {
        uint8x16_t low = vld1q_u8(group + half * WORD_BYTES + 16 * i);
        uint8x16_t high = vld1q_u8(group + 2 * WORD_BYTES + 16 * i);
        if (half)
            unpack_half_sbfp11(low, high, 1, i, quads);
        else
            unpack_half_sbfp11(low, high, 0, i, quads);
    }
}

/* Quads of the strips that the span touches; those of channels that are not stored are 0. */
static void unpack_chunk(const struct tile_span *span, uint32_t index, value_chunk chunk)
{
    const uint8x16_t transposed = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    const uint32_t bits = span->layout->mantissa_bits, chunk_words = bits / 2;
    const uint32_t first_word = bits == 3 ? index / 2 * 3 : index * chunk_words;
    const uint32_t n_words = (uint32_t)min_size(chunk_words, span->layout->n_words - first_word);
    for (uint32_t s = span->begin / STRIP_TOKENS; s * STRIP_TOKENS < span->end; s++) {
        const uint8_t *words = span->tile + word_offset(span->layout, first_word, s * STRIP_TOKENS);
        memset(chunk[s], 0, sizeof chunk[s]);
        if (bits == 3)
            unpack_half_group(words, index % 2, chunk[s]);
        else
            unpack_words(bits, words, n_words, chunk[s]);
        for (int q = 0; q < CHUNK_QUADS; q++)
            for (int i = 0; i < STRIP_REGISTERS; i++)
                chunk[s][q][i] = vqtbl1q_u8(chunk[s][q][i], transposed);
    }
}

/* The digits' sums of four channels as one. */
ALWAYS_INLINE float32x4_t join_digits(const int32x4_t dots[DIGITS])
{
    float32x4_t sum = vfmaq_n_f32(vcvtq_f32_s32(dots[1]), vcvtq_f32_s32(dots[2]), 256.0f);
    return vfmaq_n_f32(vcvtq_f32_s32(dots[0]), sum, 256.0f);
}

/* Rows first_row .. +n_rows-1, quads first .. +n_quads-1 of a chunk. n_rows and n_quads are constants, their product at
 * most 4. accumulators: those of row 0 and the chunk's first channel. */
ALWAYS_INLINE void accumulate_quads(const struct tile_span *span, const value_chunk chunk, uint32_t first,
                                    const int n_quads, const struct weighted_rows *rows, uint32_t first_row,
                                    const int n_rows, const float *rescale, float *accumulators, size_t stride)
{
    int32x4_t dots[ROWS_AT_ONCE][CHUNK_QUADS][DIGITS];
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; r++)
#pragma GCC unroll 4
        for (int q = 0; q < n_quads; q++)
            dots[r][q][0] = dots[r][q][1] = dots[r][q][2] = vdupq_n_s32(0);
    for (uint32_t s = span->begin / STRIP_TOKENS; s * STRIP_TOKENS < span->end; s++)
#pragma GCC unroll 4
        for (int r = 0; r < n_rows; r++)
#pragma GCC unroll 3
            for (int d = 0; d < DIGITS; d++) {
                int8x16_t digits = vld1q_s8(&rows->digits[first_row + r][d][s * STRIP_TOKENS]);
#pragma GCC unroll 4
                for (int q = 0; q < n_quads; q++)
                    dots[r][q][d] = add_dots(dots[r][q][d], chunk[s][first + q], digits);
            }
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; r++)
#pragma GCC unroll 4
        for (int q = 0; q < n_quads; q++) {
            float *out = accumulators + (first_row + r) * stride + 4 * (first + q);
            float32x4_t sum = vmulq_n_f32(join_digits(dots[r][q]), rows->scales[first_row + r]);
            float32x4_t before = vmulq_n_f32(vld1q_f32(out), rescale[first_row + r]);
            vst1q_f32(out, vfmaq_n_f32(before, sum, rows->unit));
        }
}

/* All rows, one chunk. The accumulators have room for whole chunks. */
static void accumulate_chunk(const struct tile_span *span, const value_chunk chunk, const struct weighted_rows *rows,
                             uint32_t n_rows, const float *rescale, float *accumulators, size_t stride)
{
    for (uint32_t row = 0; row < n_rows; row += ROWS_AT_ONCE) {
        switch (min_size(n_rows - row, ROWS_AT_ONCE)) {
        case 1: accumulate_quads(span, chunk, 0, 4, rows, row, 1, rescale, accumulators, stride); break;
        case 2:
            for (uint32_t q = 0; q < CHUNK_QUADS; q += 2)
                accumulate_quads(span, chunk, q, 2, rows, row, 2, rescale, accumulators, stride);
            break;
        case 3:
            for (uint32_t q = 0; q < CHUNK_QUADS; q++)
                accumulate_quads(span, chunk, q, 1, rows, row, 3, rescale, accumulators, stride);
            break;
        default:
            for (uint32_t q = 0; q < CHUNK_QUADS; q++)
                accumulate_quads(span, chunk, q, 1, rows, row, 4, rescale, accumulators, stride);
        }
    }
}

void ksort_neon_accumulate_bfp(const struct tile_span *values, uint32_t n_rows,
                               const float (*weights)[KSORT_TILE_TOKENS], const float *rescale, float *accumulators,
                               size_t stride)
{
    const struct head_layout *layout = values->layout;
    struct weighted_rows rows;
    value_chunk chunk;
    prefetch_share(values, 0, KSORT_TILE_TOKENS);
    for (uint32_t b = 0; b < layout->n_blocks; b++) {
        uint32_t end = (uint32_t)min_size((b + 1) * layout->block_size, layout->head_dim);
        weigh_rows(values, b, n_rows, weights, &rows);
        for (uint32_t c = b * layout->block_size; c < end; c += 4 * CHUNK_QUADS) {
            unpack_chunk(values, c / (4 * CHUNK_QUADS), chunk);
            accumulate_chunk(values, chunk, &rows, n_rows, rescale, accumulators + c, stride);
        }
    }
}
