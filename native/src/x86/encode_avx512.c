/* The encoder of transformed heads with AVX-512: encode_tokens.h and encode_channels.h. */
#include "x86/lanes_avx512.h"

/* Columns of 16 rows that lie row_stride floats apart, 64-byte aligned: out[c] lane r = rows[r][c]. Pairs of rows, then
 * fours within 128-bit parts, then the parts of four registers. */
ALWAYS_INLINE void transpose_lanes(const float *rows, size_t row_stride, lanes out[LANES])
{
    __m512d pairs[16];
    lanes fours[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        lanes a = _mm512_load_ps(rows + i * row_stride), b = _mm512_load_ps(rows + (i + 1) * row_stride);
        pairs[i] = _mm512_castps_pd(_mm512_unpacklo_ps(a, b));
        pairs[i + 1] = _mm512_castps_pd(_mm512_unpackhi_ps(a, b));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) /* fours[i + k]: rows i .. i + 3 of columns k, 4 + k, 8 + k, 12 + k */
#pragma GCC unroll 2
        for (int k = 0; k < 2; k++) {
            fours[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs[i + k], pairs[i + 2 + k]));
            fours[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs[i + k], pairs[i + 2 + k]));
        }
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
        lanes upper_even = _mm512_shuffle_f32x4(fours[k], fours[4 + k], 0x88); /* columns k and 8 + k of rows 0 .. 7 */
        lanes upper_odd = _mm512_shuffle_f32x4(fours[k], fours[4 + k], 0xDD);  /* columns 4 + k and 12 + k */
        lanes lower_even = _mm512_shuffle_f32x4(fours[8 + k], fours[12 + k], 0x88);
        lanes lower_odd = _mm512_shuffle_f32x4(fours[8 + k], fours[12 + k], 0xDD);
        out[k] = _mm512_shuffle_f32x4(upper_even, lower_even, 0x88);
        out[4 + k] = _mm512_shuffle_f32x4(upper_odd, lower_odd, 0x88);
        out[8 + k] = _mm512_shuffle_f32x4(upper_even, lower_even, 0xDD);
        out[12 + k] = _mm512_shuffle_f32x4(upper_odd, lower_odd, 0xDD);
    }
}

/* s[i] + s[i + 8], then 4, 2, 1. */
ALWAYS_INLINE float sum_in_halves(const lanes *sums)
{
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(*sums), _mm512_extractf32x8_ps(*sums, 1));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

ALWAYS_INLINE uint32_t max_magnitude(const float *x, size_t n)
{
    return ksort_avx512_max_magnitude(x, n);
}

ALWAYS_INLINE void transform_key(const struct head_transform *transform, uint32_t head_dim, float *y)
{
    ksort_avx512_transform_key(transform, head_dim, y);
}

#define FEWEST_GROUPED 4 /* tokens from which a group of 16 takes less time than one by one */

#include "x86/encode_tokens.h"

#include "x86/encode_channels.h"

void ksort_avx512_encode_transformed(const struct head_transform *transform, const struct head_layout *layout,
                                     uint32_t n_tokens, float (*heads)[KSORT_MAX_HEAD_DIM],
                                     struct encoded_head *encoded)
{
    encode_heads(transform, layout, n_tokens, heads, encoded);
}
