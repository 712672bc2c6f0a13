/* The encoder of transformed heads with AVX-512: encode_tokens.h and encode_channels.h. */
#include "x86/lanes_avx512.h"

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

#include "template/encode_tokens.h"

#include "template/encode_channels.h"

void ksort_avx512_encode_transformed(const struct head_transform *transform, const struct head_layout *layout,
                                     uint32_t n_tokens, const float *heads, size_t stride,
                                     struct encoded_tokens *encoded)
{
    encode_heads(transform, layout, n_tokens, heads, stride, encoded);
}
