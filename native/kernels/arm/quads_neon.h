/* A strip's stored words as quads in Advanced SIMD registers: register i of a quad holds tokens 4 i .. 4 i + 3, a token
 * a 32-bit lane. Mantissas stand in the high bits of their bytes, times 2^(8 - mantissa_bits): that takes one shift or
 * mask where sign extension takes two. */
#ifndef KSORT_QUADS_NEON_H
#define KSORT_QUADS_NEON_H

#include <arm_neon.h>

#include "arm/arm.h"

#define STRIP_REGISTERS 4
#define CHUNK_QUADS 4 /* 16 channels: blocks are whole chunks, but for the last */
#define WORD_BYTES (4 * STRIP_TOKENS)

typedef uint8x16_t strip_quad[STRIP_REGISTERS];

/* Quads up to a whole chunk. */
ALWAYS_INLINE uint32_t padded_quads(const struct head_layout *layout)
{
    return (layout->n_quads + CHUNK_QUADS - 1) / CHUNK_QUADS * CHUNK_QUADS;
}

/* What quads are to be multiplied with to be mantissas. */
ALWAYS_INLINE float quad_unit(const struct head_layout *layout)
{
    return 1.0f / (float)(1 << (8 - layout->mantissa_bits));
}

/* Of each word, register i; the words of BFP14 come in threes: layout.h. */
ALWAYS_INLINE void unpack_bfp14(const uint8_t *words, int i, strip_quad quads[4])
{
    const uint8x16_t low_nibble_at_2 = vdupq_n_u8(0x3C);
    uint8x16_t low01 = vld1q_u8(words + 16 * i), low23 = vld1q_u8(words + WORD_BYTES + 16 * i);
    uint8x16_t high = vld1q_u8(words + 2 * WORD_BYTES + 16 * i);
    quads[0][i] = vsliq_n_u8(vshlq_n_u8(low01, 2), high, 6);
    quads[1][i] = vsliq_n_u8(vandq_u8(vshrq_n_u8(low01, 2), low_nibble_at_2), vshrq_n_u8(high, 2), 6);
    quads[2][i] = vsliq_n_u8(vshlq_n_u8(low23, 2), vshrq_n_u8(high, 4), 6);
    quads[3][i] = vsliq_n_u8(vandq_u8(vshrq_n_u8(low23, 2), low_nibble_at_2), vshrq_n_u8(high, 6), 6);
}

/* Of SBFP11, register i of quads 4 half .. 4 half + 3 of a group: bits 2 j, 2 j + 1 of `low` and bit 4 half + j of `high`
 * become bits 5, 6 and 7 of quad j. half is a constant. */
ALWAYS_INLINE void unpack_half_sbfp11(uint8x16_t low, uint8x16_t high, const int half, int i, strip_quad quads[4])
{
    const uint8x16_t low_bits = vdupq_n_u8(0x60);
    high = half ? vshrq_n_u8(high, 4) : high;
    quads[0][i] = vsliq_n_u8(vandq_u8(vshlq_n_u8(low, 5), low_bits), high, 7);
    quads[1][i] = vsliq_n_u8(vandq_u8(vshlq_n_u8(low, 3), low_bits), vshrq_n_u8(high, 1), 7);
    quads[2][i] = vsliq_n_u8(vandq_u8(vshlq_n_u8(low, 1), low_bits), vshrq_n_u8(high, 2), 7);
    quads[3][i] = vsliq_n_u8(vandq_u8(vshrq_n_u8(low, 1), low_bits), vshrq_n_u8(high, 3), 7);
}

/* Quads of the words of one strip, n_words of them: whole groups of FORMAT.md. */
ALWAYS_INLINE void unpack_words(uint32_t mantissa_bits, const uint8_t *words, uint32_t n_words, strip_quad *quads)
{
    if (mantissa_bits == 4) {
        for (uint32_t w = 0; w < n_words; w++, words += WORD_BYTES, quads += 2)
            for (int i = 0; i < STRIP_REGISTERS; i++) {
                uint8x16_t word = vld1q_u8(words + 16 * i);
                quads[0][i] = vshlq_n_u8(word, 4);
                quads[1][i] = vandq_u8(word, vdupq_n_u8(0xF0));
            }
    } else if (mantissa_bits == 6) {
        for (uint32_t w = 0; w < n_words; w += 3, words += 3 * WORD_BYTES, quads += 4)
            for (int i = 0; i < STRIP_REGISTERS; i++)
                unpack_bfp14(words, i, quads);
    } else if (mantissa_bits == 3) {
        for (uint32_t w = 0; w < n_words; w += 3, words += 3 * WORD_BYTES, quads += 8)
            for (int i = 0; i < STRIP_REGISTERS; i++) {
                uint8x16_t high = vld1q_u8(words + 2 * WORD_BYTES + 16 * i);
                unpack_half_sbfp11(vld1q_u8(words + 16 * i), high, 0, i, quads);
                unpack_half_sbfp11(vld1q_u8(words + WORD_BYTES + 16 * i), high, 1, i, quads + 4);
            }
    } else {
        for (uint32_t w = 0; w < n_words; w++, words += WORD_BYTES, quads++)
            for (int i = 0; i < STRIP_REGISTERS; i++)
                quads[0][i] = vld1q_u8(words + 16 * i);
    }
}

/* The scales of a block of four tokens: 2^(exponent - 127), or SBFP's own, the upper bytes of f16. is_scaled is a
 * constant. */
ALWAYS_INLINE float32x4_t block_scales(const uint8_t *codes, const bool is_scaled)
{
    uint32_t four;
    memcpy(&four, codes, sizeof four);
    uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(four));
    if (is_scaled)
        return vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(vshll_n_u8(bytes, 8))));
    return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vget_low_u16(vmovl_u8(bytes))), 23));
}

/* All quads of the strip that begins at first_token, and zeros up to a whole chunk. quads [padded_quads] */
ALWAYS_INLINE void unpack_quads(const struct tile_span *span, uint32_t first_token, strip_quad *quads)
{
    const struct head_layout *layout = span->layout;
    unpack_words(layout->mantissa_bits, span->tile + word_offset(layout, 0, first_token), layout->n_words, quads);
    for (uint32_t q = layout->n_quads; q < padded_quads(layout); q++)
        for (int i = 0; i < STRIP_REGISTERS; i++)
            quads[q][i] = vdupq_n_u8(0);
}

/* sum + the dot products of four signed bytes in each lane of values[i] with those in lane i of x. */
ALWAYS_INLINE int32x4_t add_dots(int32x4_t sum, const uint8x16_t values[4], int8x16_t x)
{
    sum = vdotq_laneq_s32(sum, vreinterpretq_s8_u8(values[0]), x, 0);
    sum = vdotq_laneq_s32(sum, vreinterpretq_s8_u8(values[1]), x, 1);
    sum = vdotq_laneq_s32(sum, vreinterpretq_s8_u8(values[2]), x, 2);
    return vdotq_laneq_s32(sum, vreinterpretq_s8_u8(values[3]), x, 3);
}

#endif /* KSORT_QUADS_NEON_H */
