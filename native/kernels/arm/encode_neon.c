/* The encoder of transformed heads with Advanced SIMD: encode_tokens.h and encode_channels.h. */
#include "arm/lanes_neon.h"

/* sums: partial sums 0 to 3, 4 to 7, 8 to 11, 12 to 15. s[i] + s[i + 8], then 4, 2, 1. */
ALWAYS_INLINE float sum_in_halves(const lanes sums[4])
{
    lanes four = (sums[0] + sums[2]) + (sums[1] + sums[3]);
    float32x2_t two = vget_low_f32(four) + vget_high_f32(four);
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

ALWAYS_INLINE uint32_t max_magnitude(const float *x, size_t n)
{
    return ksort_neon_max_magnitude(x, n);
}

ALWAYS_INLINE void transform_key(const struct head_transform *transform, uint32_t head_dim, float *y)
{
    ksort_neon_transform_key(transform, head_dim, y);
}

#define FEWEST_GROUPED 2 /* tokens: a group walks the chain of dependent instructions once, not once a token */

#include "template/encode_tokens.h"

#include "template/encode_channels.h"

void ksort_neon_encode_transformed(const struct head_transform *transform, const struct head_layout *layout,
                                   uint32_t n_tokens, const float *heads, size_t stride, struct encoded_tokens *encoded)
{
    encode_heads(transform, layout, n_tokens, heads, stride, encoded);
}
