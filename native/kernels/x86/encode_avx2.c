/* The encoder of transformed heads with AVX2: encode_tokens.h and encode_channels.h. */
#include "x86/lanes_avx2.h"

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

#include "template/encode_tokens.h"

#include "template/encode_channels.h"

void ksort_avx2_encode_transformed(const struct head_transform *transform, const struct head_layout *layout,
                                   uint32_t n_tokens, const float *heads, size_t stride, struct encoded_tokens *encoded)
{
    encode_heads(transform, layout, n_tokens, heads, stride, encoded);
}
