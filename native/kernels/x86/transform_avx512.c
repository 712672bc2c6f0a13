/* Transforms of one head with AVX-512: transform_channels.h. */
#include "rounding.h"
#include "x86/lanes_avx512.h"

/* Lanes of `upper` become partner - x, the others partner + x: the partner plus x times +-1. That product is exact, so
 * the fused multiply-add rounds once, as FORMAT.md asks. On Zen 4 it has other ports than additions, which the strides
 * between registers need. */
ALWAYS_INLINE __m512 join_pairs(__m512 x, __m512 partner, __mmask16 upper)
{
    return _mm512_fmadd_ps(x, _mm512_mask_blend_ps(upper, _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f)), partner);
}

/* Strides 1, 2, 4 and 8. */
ALWAYS_INLINE __m512 rotate_register(__m512 x)
{
    x = join_pairs(x, _mm512_permute_ps(x, 0xB1), 0xAAAA);
    x = join_pairs(x, _mm512_permute_ps(x, 0x4E), 0xCCCC);
    x = join_pairs(x, _mm512_shuffle_f32x4(x, x, 0xB1), 0xF0F0);
    return join_pairs(x, _mm512_shuffle_f32x4(x, x, 0x4E), 0xFF00);
}

/* n is even. Segments have falling sizes, so those of 2 s channels or more end at n rounded down to a multiple of 2 s:
 * stride s takes part below that. */
ALWAYS_INLINE void rotate_rest(float *y, uint32_t n)
{
    const lanes_mask in_fours = lanes_between(0, n & 12), in_eight = lanes_between(0, n & 8);
    __m512 x = _mm512_load_ps(y);
    x = join_pairs(x, _mm512_permute_ps(x, 0xB1), 0xAAAA);
    x = lanes_select(in_fours, join_pairs(x, _mm512_permute_ps(x, 0x4E), 0xCCCC), x);
    x = lanes_select(in_eight, join_pairs(x, _mm512_shuffle_f32x4(x, x, 0xB1), 0xF0F0), x);
    __m512 factors = lanes_select(in_fours, _mm512_set1_ps(rotation_factor(4)), _mm512_set1_ps(rotation_factor(2)));
    factors = lanes_select(in_eight, _mm512_set1_ps(rotation_factor(8)), factors);
    _mm512_store_ps(y, _mm512_mul_ps(x, factors));
}

#include "template/transform_channels.h"

/* Common head dimensions are constants, so that their loops are unrolled. */
void ksort_avx512_transform_key(const struct head_transform *transform, uint32_t head_dim, float *y)
{
    switch (head_dim) {
    case 64: transform_key_channels(transform, 64, y); break;
    case 128: transform_key_channels(transform, 128, y); break;
    default: transform_key_channels(transform, head_dim, y);
    }
}

void ksort_avx512_transform_query(const struct head_transform *transform, uint32_t head_dim, float *q)
{
    switch (head_dim) {
    case 64: transform_query_channels(transform, 64, q); break;
    case 128: transform_query_channels(transform, 128, q); break;
    default: transform_query_channels(transform, head_dim, q);
    }
}

void ksort_avx512_restore_value(const struct head_transform *transform, const uint16_t *places, uint32_t head_dim,
                                float *out)
{
    switch (head_dim) {
    case 64: restore_value_channels(transform, places, 64, out); break;
    case 128: restore_value_channels(transform, places, 128, out); break;
    default: restore_value_channels(transform, places, head_dim, out);
    }
}
