/* Transforms of one head with AVX2: transform_channels.h. */
#include "rounding.h"
#include "x86/lanes_avx2.h"

/* Where a lane's sign is 1 it becomes partner + x, where it is -1 partner - x. The product with it is exact, so the
 * fused multiply-add rounds once, as FORMAT.md asks. */
ALWAYS_INLINE __m256 join_pairs(__m256 x, __m256 partner, __m256 signs)
{
    return _mm256_fmadd_ps(x, signs, partner);
}

ALWAYS_INLINE __m256 join_stride_1(__m256 x)
{
    return join_pairs(x, _mm256_permute_ps(x, 0xB1), _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1));
}

ALWAYS_INLINE __m256 join_stride_2(__m256 x)
{
    return join_pairs(x, _mm256_permute_ps(x, 0x4E), _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1));
}

/* Strides 1, 2 and 4. */
ALWAYS_INLINE __m256 rotate_register(__m256 x)
{
    x = join_stride_2(join_stride_1(x));
    return join_pairs(x, _mm256_permute2f128_ps(x, x, 0x01), _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1));
}

/* n is 2, 4 or 6: a segment of 4 unless it is 2, and one of 2 unless it is 4. */
ALWAYS_INLINE void rotate_rest(float *y, uint32_t n)
{
    const lanes_mask in_four = lanes_between(0, n & 4);
    __m256 x = join_stride_1(_mm256_load_ps(y));
    x = lanes_select(in_four, join_stride_2(x), x);
    __m256 factors = lanes_select(in_four, _mm256_set1_ps(rotation_factor(4)), _mm256_set1_ps(rotation_factor(2)));
    _mm256_store_ps(y, x * factors);
}

#include "template/transform_channels.h"

/* Common head dimensions are constants, so that their loops are unrolled. */
void ksort_avx2_transform_key(const struct head_transform *transform, uint32_t head_dim, float *y)
{
    switch (head_dim) {
    case 64: transform_key_channels(transform, 64, y); break;
    case 128: transform_key_channels(transform, 128, y); break;
    default: transform_key_channels(transform, head_dim, y);
    }
}

void ksort_avx2_transform_query(const struct head_transform *transform, uint32_t head_dim, float *q)
{
    switch (head_dim) {
    case 64: transform_query_channels(transform, 64, q); break;
    case 128: transform_query_channels(transform, 128, q); break;
    default: transform_query_channels(transform, head_dim, q);
    }
}

void ksort_avx2_restore_value(const struct head_transform *transform, const uint16_t *places, uint32_t head_dim,
                              float *out)
{
    switch (head_dim) {
    case 64: restore_value_channels(transform, places, 64, out); break;
    case 128: restore_value_channels(transform, places, 128, out); break;
    default: restore_value_channels(transform, places, head_dim, out);
    }
}
