/* The encoder of transformed heads with AVX2: encode_tokens.h and encode_channels.h. */
#include "x86/lanes_avx2.h"

/* Columns of 8 rows that lie row_stride floats apart, 32-byte aligned: out[c] lane r = rows[r][c]. Pairs of rows, then
 * fours within 128-bit halves, then the halves of two registers. */
ALWAYS_INLINE void transpose_lanes(const float *rows, size_t row_stride, lanes out[LANES])
{
    lanes pairs[8], fours[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        lanes a = _mm256_load_ps(rows + i * row_stride), b = _mm256_load_ps(rows + (i + 1) * row_stride);
        pairs[i] = _mm256_unpacklo_ps(a, b);
        pairs[i + 1] = _mm256_unpackhi_ps(a, b);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) /* fours[i + k]: rows i .. i + 3 of columns k and 4 + k */
#pragma GCC unroll 2
        for (int k = 0; k < 2; k++) {
            fours[i + 2 * k] = _mm256_shuffle_ps(pairs[i + k], pairs[i + 2 + k], 0x44);
            fours[i + 2 * k + 1] = _mm256_shuffle_ps(pairs[i + k], pairs[i + 2 + k], 0xEE);
        }
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
        out[k] = _mm256_permute2f128_ps(fours[k], fours[4 + k], 0x20);
        out[4 + k] = _mm256_permute2f128_ps(fours[k], fours[4 + k], 0x31);
    }
}

/* sums[0]: partial sums 0 to 7, sums[1]: 8 to 15. s[i] + s[i + 8], then 4, 2, 1. */
ALWAYS_INLINE float sum_in_halves(const lanes sums[2])
{
    __m256 eight = sums[0] + sums[1];
    __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
    __m128 two = four + _mm_movehl_ps(four, four);
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

ALWAYS_INLINE uint32_t max_magnitude(const float *x, size_t n)
{
    return ksort_avx2_max_magnitude(x, n);
}

ALWAYS_INLINE void transform_key(const struct head_transform *transform, uint32_t head_dim, float *y)
{
    ksort_avx2_transform_key(transform, head_dim, y);
}

#define FEWEST_GROUPED 3 /* tokens from which a group of 8 takes less time than one by one */

#include "x86/encode_tokens.h"

#include "x86/encode_channels.h"

void ksort_avx2_encode_transformed(const struct head_transform *transform, const struct head_layout *layout,
                                   uint32_t n_tokens, float (*heads)[KSORT_MAX_HEAD_DIM],
                                   struct encoded_head *encoded)
{
    encode_heads(transform, layout, n_tokens, heads, encoded);
}
