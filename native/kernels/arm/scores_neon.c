/* Scores of BFP keys with Advanced SIMD: 32-bit lanes are tokens, a strip's 16 in four registers.
 *
 *     word w of 16 tokens (64 bytes) --unpack--> quads [n_quads][4 registers], up to 4 KB, once for all rows
 *     SDOT by element:  dots[4 tokens] += quad q of 4 tokens x quad q of the query, in all lanes
 *                       one load of a query row holds 4 quads, which are a chunk of 16 channels
 *
 *                        quads of a chunk                     rows x registers of tokens at once:  1 x 4, 2 x 4,
 *                      +----+----+----+----+                  3 x 2, 4 x 2, so that dots, scores, a chunk's keys and
 *         row r  ->    | 4 tokens each     |  dots, scores    queries fit 32 registers
 *                      +----+----+----+----+
 *
 * No sum runs across lanes. Bytes moved: the span's strips and exponents once for all rows.
 * Arithmetic instructions for 4 tokens x 4 rows and a block of 32 channels, BFP12: 8 to unpack, 32 SDOT, 12 to scale,
 * so 62% are SDOT; with f32 queries 8 + 64 to unpack, 128 FMLA, 4 to scale, 63%. For one row 42% and 30%.
 */
#include "arm/lanes_neon.h"
#include "arm/quads_neon.h"

#define ROWS_AT_ONCE 4

struct strip {
    const struct head_layout *layout;
    uint32_t first_token;
    strip_quad quads[MAX_QUADS];
    float32x4_t scales[MAX_BLOCKS][STRIP_REGISTERS]; /* times quad_unit, 0 where the block is zero */
};

/* Rows first_row .. +n_rows-1, registers first .. +n_registers-1 of a strip. n_rows and n_registers are constants,
 * their product at most 8. */
typedef void rows_function(const struct strip *strip, const struct query_rows *queries, uint32_t first_row, int n_rows,
                           int first, int n_registers, float (*scores)[KSORT_TILE_TOKENS]);

/* Scales times quad_unit: exact, as that is 2^-5 or more, if subnormal. is_scaled is a constant. */
ALWAYS_INLINE void load_scales(const struct tile_span *keys, const bool is_scaled, struct strip *strip)
{
    const struct head_layout *layout = keys->layout;
    for (uint32_t b = 0; b < layout->n_blocks; b++)
        for (uint32_t i = 0; i < STRIP_REGISTERS; i++) {
            const uint8_t *codes = keys->tile + exponent_offset(layout, b, strip->first_token + 4 * i);
            strip->scales[b][i] = vmulq_n_f32(block_scales(codes, is_scaled), quad_unit(layout));
        }
}

ALWAYS_INLINE void load_strip(const struct tile_span *keys, uint32_t first_token, struct strip *strip)
{
    strip->layout = keys->layout;
    strip->first_token = first_token;
    unpack_quads(keys, first_token, strip->quads);
    if (keys->layout->is_scaled)
        load_scales(keys, true, strip);
    else
        load_scales(keys, false, strip);
}

/* Quads of block b end here; the padding after the last channel belongs to the last block. */
ALWAYS_INLINE uint32_t block_quads_end(const struct head_layout *layout, uint32_t b)
{
    return b + 1 < layout->n_blocks ? (b + 1) * layout->block_size / 4 : padded_quads(layout);
}

ALWAYS_INLINE void rows_by_bfp(const struct strip *strip, const struct query_rows *queries, uint32_t first_row,
                               const int n_rows, const int first, const int n_registers,
                               float (*scores)[KSORT_TILE_TOKENS])
{
    float32x4_t sums[ROWS_AT_ONCE][STRIP_REGISTERS];
    for (int r = 0; r < n_rows; r++)
        for (int i = 0; i < n_registers; i++)
            sums[r][i] = vdupq_n_f32(0.0f);
    for (uint32_t b = 0, quad = 0; b < strip->layout->n_blocks; b++) {
        int32x4_t dots[ROWS_AT_ONCE][STRIP_REGISTERS];
        for (int r = 0; r < n_rows; r++)
            for (int i = 0; i < n_registers; i++)
                dots[r][i] = vdupq_n_s32(0);
        for (uint32_t end = block_quads_end(strip->layout, b); quad < end; quad += CHUNK_QUADS)
            for (int r = 0; r < n_rows; r++) {
                int8x16_t query = vreinterpretq_s8_s32(vld1q_s32(&queries->quads[first_row + r][quad]));
                for (int i = 0; i < n_registers; i++) {
                    const strip_quad *chunk = &strip->quads[quad];
                    const uint8x16_t keys[CHUNK_QUADS] = {chunk[0][first + i], chunk[1][first + i], chunk[2][first + i],
                                                          chunk[3][first + i]};
                    dots[r][i] = add_dots(dots[r][i], keys, query);
                }
            }
        for (int r = 0; r < n_rows; r++)
            for (int i = 0; i < n_registers; i++) {
                float32x4_t factor = vmulq_n_f32(strip->scales[b][first + i], queries->factors[first_row + r][b]);
                sums[r][i] = vfmaq_f32(sums[r][i], vcvtq_f32_s32(dots[r][i]), factor);
            }
    }
    for (int r = 0; r < n_rows; r++)
        for (int i = 0; i < n_registers; i++)
            vst1q_f32(&scores[first_row + r][strip->first_token + 4 * (first + i)], sums[r][i]);
}

/* Byte `byte` of every lane, signed, as float: looked up as the lane's highest, with zeros below it. */
ALWAYS_INLINE float32x4_t byte_as_float(uint8x16_t quad, uint32_t byte)
{
    const uint32x4_t top_bytes = {0x00FFFFFF, 0x04FFFFFF, 0x08FFFFFF, 0x0CFFFFFF};
    uint8x16_t indices = vreinterpretq_u8_u32(vaddq_u32(top_bytes, vdupq_n_u32(byte << 24)));
    return vcvtq_n_f32_s32(vreinterpretq_s32_u8(vqtbl1q_u8(quad, indices)), 24);
}

ALWAYS_INLINE void rows_by_f32(const struct strip *strip, const struct query_rows *queries, uint32_t first_row,
                               const int n_rows, const int first, const int n_registers,
                               float (*scores)[KSORT_TILE_TOKENS])
{
    float32x4_t sums[ROWS_AT_ONCE][STRIP_REGISTERS];
    for (int r = 0; r < n_rows; r++)
        for (int i = 0; i < n_registers; i++)
            sums[r][i] = vdupq_n_f32(0.0f);
    for (uint32_t b = 0, quad = 0; b < strip->layout->n_blocks; b++) {
        float32x4_t dots[ROWS_AT_ONCE][STRIP_REGISTERS];
        for (int r = 0; r < n_rows; r++)
            for (int i = 0; i < n_registers; i++)
                dots[r][i] = vdupq_n_f32(0.0f);
        for (uint32_t end = min_size(block_quads_end(strip->layout, b), strip->layout->n_quads); quad < end; quad++)
            for (int i = 0; i < n_registers; i++) {
                float32x4_t keys[4];
                for (int byte = 0; byte < 4; byte++)
                    keys[byte] = byte_as_float(strip->quads[quad][first + i], byte);
                for (int r = 0; r < n_rows; r++) {
                    float32x4_t query = vld1q_f32(&queries->values[first_row + r][4 * quad]);
                    dots[r][i] = add_products(dots[r][i], keys, query);
                }
            }
        for (int r = 0; r < n_rows; r++)
            for (int i = 0; i < n_registers; i++)
                sums[r][i] = vfmaq_f32(sums[r][i], dots[r][i], strip->scales[b][first + i]);
    }
    for (int r = 0; r < n_rows; r++)
        for (int i = 0; i < n_registers; i++)
            vst1q_f32(&scores[first_row + r][strip->first_token + 4 * (first + i)], sums[r][i]);
}

ALWAYS_INLINE void scores_of_strip(const struct strip *strip, const struct query_rows *queries, rows_function *rows,
                                   float (*scores)[KSORT_TILE_TOKENS])
{
    for (uint32_t row = 0; row < queries->n_rows; row += ROWS_AT_ONCE) {
        switch (min_size(queries->n_rows - row, ROWS_AT_ONCE)) {
        case 1: rows(strip, queries, row, 1, 0, 4, scores); break;
        case 2: rows(strip, queries, row, 2, 0, 4, scores); break;
        case 3:
            rows(strip, queries, row, 3, 0, 2, scores);
            rows(strip, queries, row, 3, 2, 2, scores);
            break;
        default: rows(strip, queries, row, 4, 0, 2, scores); rows(strip, queries, row, 4, 2, 2, scores);
        }
    }
}

ALWAYS_INLINE void scores_of_span(const struct tile_span *keys, const struct query_rows *queries, rows_function *rows,
                                  float (*scores)[KSORT_TILE_TOKENS])
{
    for (uint32_t token = keys->begin / STRIP_TOKENS * STRIP_TOKENS; token < keys->end; token += STRIP_TOKENS) {
        struct strip strip;
        prefetch_share(keys, token, STRIP_TOKENS);
        load_strip(keys, token, &strip);
        scores_of_strip(&strip, queries, rows, scores);
    }
}

void ksort_neon_scores_bfp_by_bfp(const struct tile_span *keys, const struct query_rows *queries,
                                  float (*scores)[KSORT_TILE_TOKENS])
{
    scores_of_span(keys, queries, rows_by_bfp, scores);
}

void ksort_neon_scores_bfp_by_f32(const struct tile_span *keys, const struct query_rows *queries,
                                  float (*scores)[KSORT_TILE_TOKENS])
{
    scores_of_span(keys, queries, rows_by_f32, scores);
}
