/* Scores with AVX2.
 *
 *   BFP keys:   32-bit lanes are tokens, 8 of a strip's 16 at a time ("half strip"):
 *                   word w of 8 tokens (32 bytes) --unpack--> quads: register q holds channels 4q .. 4q+3 of 8 tokens
 *                   for up to 4 rows at once: dots of every block += quad x (query quad, the same in all lanes)
 *               No sum runs across lanes. Quads of a half strip (up to 2 KB, on the stack) are unpacked once for all
 *               rows; 4 rows keep 4 dots and 4 scores in registers.
 *               Bytes moved: the span's strips and exponents once for all rows.
 *   float keys: lanes are channels. 2 tokens x 4 rows at once: 8 sums in registers.
 *               Bytes moved: the K rows of the span once for every 4 rows (from L1 after the first).
 */
#include "half.h"
#include "x86/float_rows_avx2.h"
#include "x86/quads_avx2.h"

#define ROWS_AT_ONCE 4

struct half_strip {
    const struct head_layout *layout;
    __m256i quads[MAX_QUADS];  /* mantissas, sign-extended to bytes */
    __m256 scales[MAX_BLOCKS]; /* 2^(exponent - 127) of the 8 tokens, 0 where the block is zero */
};

ALWAYS_INLINE void load_half_strip(const struct tile_span *keys, uint32_t first_token, struct half_strip *strip)
{
    strip->layout = keys->layout;
    unpack_quads(keys, first_token, strip->quads);
    for (uint32_t b = 0; b < keys->layout->n_blocks; b++) {
        const uint8_t *exponents = keys->tile + exponent_offset(keys->layout, b, first_token);
        __m256i bits = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)exponents));
        strip->scales[b] = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23));
    }
}

/* Quads of block b end here; the padding after the last channel belongs to the last block. */
ALWAYS_INLINE uint32_t block_quads_end(const struct head_layout *layout, uint32_t b)
{
    return b + 1 < layout->n_blocks ? (b + 1) * layout->block_size / 4 : layout->n_quads;
}

/* |key| * (query with the key's sign), in pairs: at most 2 * 128 * 127 = 32512, so 16 bits hold it. */
ALWAYS_INLINE __m256i dot_quad(__m256i sum, __m256i key, int32_t query)
{
    __m256i queries = _mm256_sign_epi8(_mm256_set1_epi32(query), key);
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(key), queries);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

/* n_rows is a constant up to ROWS_AT_ONCE. */
ALWAYS_INLINE void rows_by_bfp(const struct half_strip *strip, const struct query_rows *queries, uint32_t first_row,
                               const int n_rows, uint32_t first_token, float (*scores)[KSORT_TILE_TOKENS])
{
    __m256 sums[ROWS_AT_ONCE];
    for (int r = 0; r < n_rows; r++)
        sums[r] = _mm256_setzero_ps();
    for (uint32_t b = 0, quad = 0; b < strip->layout->n_blocks; b++) {
        __m256i dots[ROWS_AT_ONCE];
        for (int r = 0; r < n_rows; r++)
            dots[r] = _mm256_setzero_si256();
        for (uint32_t end = block_quads_end(strip->layout, b); quad < end; quad++)
            for (int r = 0; r < n_rows; r++)
                dots[r] = dot_quad(dots[r], strip->quads[quad], queries->quads[first_row + r][quad]);
        for (int r = 0; r < n_rows; r++) {
            __m256 factor = _mm256_mul_ps(strip->scales[b], _mm256_set1_ps(queries->factors[first_row + r][b]));
            sums[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[r]), factor, sums[r]);
        }
    }
    for (int r = 0; r < n_rows; r++)
        _mm256_storeu_ps(&scores[first_row + r][first_token], sums[r]);
}

void ksort_avx2_scores_bfp_by_bfp(const struct tile_span *keys, const struct query_rows *queries,
                                  float (*scores)[KSORT_TILE_TOKENS])
{
    for (uint32_t token = keys->begin / HALF_STRIP * HALF_STRIP; token < keys->end; token += HALF_STRIP) {
        struct half_strip strip;
        prefetch_share(keys, token, HALF_STRIP);
        load_half_strip(keys, token, &strip);
        for (uint32_t row = 0; row < queries->n_rows; row += ROWS_AT_ONCE) {
            switch (min_size(queries->n_rows - row, ROWS_AT_ONCE)) {
            case 1: rows_by_bfp(&strip, queries, row, 1, token, scores); break;
            case 2: rows_by_bfp(&strip, queries, row, 2, token, scores); break;
            case 3: rows_by_bfp(&strip, queries, row, 3, token, scores); break;
            default: rows_by_bfp(&strip, queries, row, 4, token, scores);
            }
        }
    }
}

/* Byte `byte` of every lane, sign-extended, as float. `byte` is a constant. */
ALWAYS_INLINE __m256 byte_as_float(__m256i quad, const int byte)
{
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(quad, 24 - 8 * byte), 24));
}

/* n_rows is a constant up to ROWS_AT_ONCE. */
ALWAYS_INLINE void rows_by_f32(const struct half_strip *strip, const struct query_rows *queries, uint32_t first_row,
                               const int n_rows, uint32_t first_token, float (*scores)[KSORT_TILE_TOKENS])
{
    __m256 sums[ROWS_AT_ONCE];
    for (int r = 0; r < n_rows; r++)
        sums[r] = _mm256_setzero_ps();
    for (uint32_t b = 0, quad = 0; b < strip->layout->n_blocks; b++) {
        __m256 dots[ROWS_AT_ONCE];
        for (int r = 0; r < n_rows; r++)
            dots[r] = _mm256_setzero_ps();
        for (uint32_t end = block_quads_end(strip->layout, b); quad < end; quad++)
            for (int byte = 0; byte < 4; byte++) {
                __m256 key = byte_as_float(strip->quads[quad], byte);
                for (int r = 0; r < n_rows; r++) {
                    __m256 query = _mm256_set1_ps(queries->values[first_row + r][4 * quad + byte]);
                    dots[r] = _mm256_fmadd_ps(key, query, dots[r]);
                }
            }
        for (int r = 0; r < n_rows; r++)
            sums[r] = _mm256_fmadd_ps(dots[r], strip->scales[b], sums[r]);
    }
    for (int r = 0; r < n_rows; r++)
        _mm256_storeu_ps(&scores[first_row + r][first_token], sums[r]);
}

void ksort_avx2_scores_bfp_by_f32(const struct tile_span *keys, const struct query_rows *queries,
                                  float (*scores)[KSORT_TILE_TOKENS])
{
    for (uint32_t token = keys->begin / HALF_STRIP * HALF_STRIP; token < keys->end; token += HALF_STRIP) {
        struct half_strip strip;
        prefetch_share(keys, token, HALF_STRIP);
        load_half_strip(keys, token, &strip);
        for (uint32_t row = 0; row < queries->n_rows; row += ROWS_AT_ONCE) {
            switch (min_size(queries->n_rows - row, ROWS_AT_ONCE)) {
            case 1: rows_by_f32(&strip, queries, row, 1, token, scores); break;
            case 2: rows_by_f32(&strip, queries, row, 2, token, scores); break;
            case 3: rows_by_f32(&strip, queries, row, 3, token, scores); break;
            default: rows_by_f32(&strip, queries, row, 4, token, scores);
            }
        }
    }
}

/* Tokens first_token and +1, rows first_row .. +n_rows-1. type and n_rows (up to 4) are constants. */
ALWAYS_INLINE void scores_of_two_tokens(const struct tile_span *keys, const uint32_t type,
                                        const struct query_rows *queries, uint32_t first_row, const int n_rows,
                                        uint32_t first_token, float (*scores)[KSORT_TILE_TOKENS])
{
    const uint32_t head_dim = keys->layout->head_dim, in_registers = head_dim / 8 * 8;
    const uint8_t *key[2] = {keys->tile + row_offset(keys->layout, first_token),
                             keys->tile + row_offset(keys->layout, first_token + 1)};
    __m256 sums[4][2]; /* [row][token] */
    for (int r = 0; r < n_rows; r++)
        sums[r][0] = sums[r][1] = _mm256_setzero_ps();
    for (uint32_t c = 0; c < in_registers; c += 8) {
        __m256 first = load_values(key[0], type, c), second = load_values(key[1], type, c);
        for (int r = 0; r < n_rows; r++) {
            __m256 query = _mm256_loadu_ps(&queries->values[first_row + r][c]);
            sums[r][0] = _mm256_fmadd_ps(query, first, sums[r][0]);
            sums[r][1] = _mm256_fmadd_ps(query, second, sums[r][1]);
        }
    }
    for (int r = 0; r < n_rows; r++)
        for (int t = 0; t < 2; t++) {
            float sum = sum_of_lanes(sums[r][t]);
            for (uint32_t c = in_registers; c < head_dim; c++)
                sum += queries->values[first_row + r][c] * load_value(key[t], type, c);
            scores[first_row + r][first_token + t] = sum;
        }
}

ALWAYS_INLINE void scores_float_of_type(const struct tile_span *keys, const uint32_t type,
                                        const struct query_rows *queries, float (*scores)[KSORT_TILE_TOKENS])
{
    for (uint32_t token = keys->begin / 2 * 2; token < keys->end; token += 2) {
        prefetch_share(keys, token, 2);
        for (uint32_t row = 0; row < queries->n_rows; row += ROWS_AT_ONCE) {
            switch (min_size(queries->n_rows - row, ROWS_AT_ONCE)) {
            case 1: scores_of_two_tokens(keys, type, queries, row, 1, token, scores); break;
            case 2: scores_of_two_tokens(keys, type, queries, row, 2, token, scores); break;
            case 3: scores_of_two_tokens(keys, type, queries, row, 3, token, scores); break;
            default: scores_of_two_tokens(keys, type, queries, row, 4, token, scores);
            }
        }
    }
}

void ksort_avx2_scores_float(const struct tile_span *keys, const struct query_rows *queries,
                             float (*scores)[KSORT_TILE_TOKENS])
{
    if (keys->layout->type == KSORT_F32)
        scores_float_of_type(keys, KSORT_F32, queries, scores);
    else if (keys->layout->type == KSORT_F16)
        scores_float_of_type(keys, KSORT_F16, queries, scores);
    else
        scores_float_of_type(keys, KSORT_BF16, queries, scores);
}
