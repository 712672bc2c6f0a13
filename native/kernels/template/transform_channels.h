/* Transforms of one head, LANES channels a register, in an aligned copy of it:
 *
 *     x --load, shift, scale--> y [head_dim] --rotate--> y --permutation (lookups)--> x
 *
 *     rotating 64 channels, 16 lanes:  strides 1, 2, 4, 8 within each register   y[0] | y[1] | y[2] | y[3]
 *                                      strides 16, 32 between registers           '------'      '------'
 *
 * Bytes moved: 4 head_dim in and out; 10 head_dim of tables, which stay in L1 over the tokens of a head.
 *
 * The including file includes a level's lanes_*.h, and defines rotate_register (all strides within one) and
 * rotate_rest (the last channels of a head, fewer than LANES).
 */
#ifndef KSORT_TRANSFORM_CHANNELS_H
#define KSORT_TRANSFORM_CHANNELS_H

#include "rounding.h"

/* One segment of n channels, n a constant and at least LANES. */
ALWAYS_INLINE void rotate_segment(float *y, const uint32_t n)
{
    lanes registers[KSORT_MAX_HEAD_DIM / LANES];
#pragma GCC unroll 32
    for (uint32_t i = 0; i < n / LANES; i++)
        registers[i] = rotate_register(*(const lanes *)(y + LANES * i));
#pragma GCC unroll 5
    for (uint32_t stride = 1; stride < n / LANES; stride *= 2)
#pragma GCC unroll 32
        for (uint32_t i = 0; i < n / LANES; i++)
            if (!(i & stride)) {
                lanes a = registers[i], b = registers[i + stride];
                registers[i] = a + b;
                registers[i + stride] = a - b;
            }
    const float factor = rotation_factor(n);
#pragma GCC unroll 32
    for (uint32_t i = 0; i < n / LANES; i++)
        *(lanes *)(y + LANES * i) = registers[i] * factor;
}

/* y [head_dim] is aligned, with room up to a multiple of LANES. */
ALWAYS_INLINE void rotate(float *y, uint32_t head_dim)
{
    uint32_t begin = 0;
    for (uint32_t n; head_dim - begin >= LANES; begin += n) {
        n = largest_power_of_two(head_dim - begin);
        switch (n) {
        case 256: rotate_segment(y + begin, 256); break;
        case 128: rotate_segment(y + begin, 128); break;
        case 64: rotate_segment(y + begin, 64); break;
        case 32: rotate_segment(y + begin, 32); break;
        case 16: rotate_segment(y + begin, 16); break;
        case 8: rotate_segment(y + begin, 8); break;
        default: rotate_segment(y + begin, LANES);
        }
    }
    if (begin < head_dim)
        rotate_rest(y + begin, head_dim - begin);
}

/* out[i] = y[from[i]], or y[i] without `from`. y is aligned, with room up to a multiple of 32. */
ALWAYS_INLINE void store_permuted(const float *y, const uint16_t *from, uint32_t head_dim, float *out)
{
    for (uint32_t c = 0; c < head_dim; c += LANES)
        store_below(out, head_dim, c, from ? look_up(y, head_dim, from, head_dim, c) : *(const lanes *)(y + c));
}

ALWAYS_INLINE void transform_key_channels(const struct head_transform *transform, const uint32_t head_dim, float *key)
{
    _Alignas(64) float y[KSORT_MAX_HEAD_DIM];
    for (uint32_t c = 0; c < head_dim; c += LANES) {
        lanes x = load_below(key, head_dim, c);
        if (transform->shift)
            x = x - load_below(transform->shift, head_dim, c);
        if (transform->scale)
            x = x * load_below(transform->scale, head_dim, c);
        *(lanes *)(y + c) = x;
    }
    if (transform->rotate)
        rotate(y, head_dim);
    store_permuted(y, transform->permutation, head_dim, key);
}

ALWAYS_INLINE void transform_query_channels(const struct head_transform *transform, const uint32_t head_dim, float *q)
{
    _Alignas(64) float y[KSORT_MAX_HEAD_DIM];
    for (uint32_t c = 0; c < head_dim; c += LANES) {
        lanes x = load_below(q, head_dim, c);
        if (transform->scale)
            x = x / load_below(transform->scale, head_dim, c);
        *(lanes *)(y + c) = x;
    }
    if (transform->rotate)
        rotate(y, head_dim);
    store_permuted(y, transform->permutation, head_dim, q);
}

ALWAYS_INLINE void restore_value_channels(const struct head_transform *transform, const uint16_t *places,
                                          const uint32_t head_dim, float *out)
{
    _Alignas(64) float transformed[KSORT_MAX_HEAD_DIM], y[KSORT_MAX_HEAD_DIM];
    for (uint32_t c = 0; c < head_dim; c += LANES)
        *(lanes *)(transformed + c) = load_below(out, head_dim, c);
    store_permuted(transformed, places, head_dim, y);
    if (transform->rotate)
        rotate(y, head_dim);
    for (uint32_t c = 0; c < head_dim; c += LANES) {
        lanes x = *(const lanes *)(y + c);
        if (transform->scale)
            x = x / load_below(transform->scale, head_dim, c);
        if (transform->shift)
            x = x + load_below(transform->shift, head_dim, c);
        store_below(out, head_dim, c, x);
    }
}

#endif /* KSORT_TRANSFORM_CHANNELS_H */
