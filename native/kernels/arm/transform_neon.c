/* Transforms of one head with Advanced SIMD: transform_channels.h. */
#include "arm/lanes_neon.h"
#include "rounding.h"

/* Each lane becomes partner + sign * x. The product with +-1 is exact, so the fused multiply-add rounds once, as
 * FORMAT.md asks. */
ALWAYS_INLINE lanes join_pairs(lanes x, lanes partner, lanes signs)
{
    return vfmaq_f32(partner, x, signs);
}

/* Strides 1 and 2. */
ALWAYS_INLINE lanes rotate_register(lanes x)
{
    x = join_pairs(x, vrev64q_f32(x), (lanes){1.0f, -1.0f, 1.0f, -1.0f});
    return join_pairs(x, vextq_f32(x, x, 2), (lanes){1.0f, 1.0f, -1.0f, -1.0f});
}

/* n is 2: head dimensions are even. */
ALWAYS_INLINE void rotate_rest(float *y, uint32_t n)
{
    float32x2_t x = vld1_f32(y);
    x = vfma_f32(vrev64_f32(x), x, (float32x2_t){1.0f, -1.0f});
    vst1_f32(y, vmul_n_f32(x, rotation_factor(n)));
}

#include "template/transform_channels.h"

/* Common head dimensions are constants, so that their loops are unrolled. */
void ksort_neon_transform_key(const struct head_transform *transform, uint32_t head_dim, float *y)
{
    switch (head_dim) {
    case 64: transform_key_channels(transform, 64, y); break;
    case 128: transform_key_channels(transform, 128, y); break;
    default: transform_key_channels(transform, head_dim, y);
    }
}

void ksort_neon_transform_query(const struct head_transform *transform, uint32_t head_dim, float *q)
{
    switch (head_dim) {
    case 64: transform_query_channels(transform, 64, q); break;
    case 128: transform_query_channels(transform, 128, q); break;
    default: transform_query_channels(transform, head_dim, q);
    }
}

void ksort_neon_restore_value(const struct head_transform *transform, const uint16_t *places, uint32_t head_dim,
                              float *out)
{
    switch (head_dim) {
    case 64: restore_value_channels(transform, places, 64, out); break;
    case 128: restore_value_channels(transform, places, 128, out); break;
    default: restore_value_channels(transform, places, head_dim, out);
    }
}
