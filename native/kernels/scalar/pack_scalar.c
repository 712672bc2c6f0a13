/* Packing, one head of one token a call:
 *
 *     x [head_dim] f32 --rope--> y [head_dim] f32 --round_(s)bfp--> mantissas [head_dim] i8 + exponents [blocks] u8
 *                                              \--store_f16/bf16--> [head_dim] u16
 *
 * Bytes moved: 4 head_dim in, head_dim * bits / 8 + blocks out; the tables of a head stay in L1 over its tokens.
 */
#include <math.h>

#include "half.h"
#include "rounding.h"
#include "scalar/scalar.h"

uint32_t ksort_scalar_max_magnitude(const float *x, size_t n)
{
    uint32_t max = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t magnitude = float_bits(x[i]) & 0x7FFFFFFFu;
        max = magnitude > max ? magnitude : max;
    }
    return max;
}

void ksort_scalar_rope(const struct rope_row *rope, const float *x, uint32_t head_dim, float *y)
{
    for (uint32_t c = 0; c < head_dim; c++) {
        if (rope->sign[c] == 0) {
            y[c] = x[c];
            continue;
        }
        uint32_t frequency = rope->frequency[c];
        float turned = (float)rope->sign[c] * x[rope->partner[c]];
        y[c] = x[c] * rope->cos[frequency] + turned * rope->sin[frequency];
    }
}

void ksort_scalar_round_bfp(const float *x, uint32_t head_dim, uint32_t block_size, uint32_t mantissa_bits,
                            int8_t *mantissas, uint8_t *exponents)
{
    const long limit = (1 << (mantissa_bits - 1)) - 1;
    for (uint32_t begin = 0; begin < head_dim; begin += block_size) {
        uint32_t n = head_dim - begin < block_size ? head_dim - begin : block_size;
        /* The exponent field of the largest magnitude is floor(log2) + 127, and 0 for zero and subnormals. */
        uint32_t exponent = ksort_scalar_max_magnitude(x + begin, n) >> 23;
        *exponents++ = (uint8_t)exponent;
        if (exponent == 0) {
            memset(mantissas + begin, 0, n);
            continue;
        }
        struct step_inverse inverse = step_inverse_of(exponent, mantissa_bits);
        for (uint32_t c = begin; c < begin + n; c++) {
            long rounded = lrintf(x[c] * inverse.first * inverse.second); /* ties to even, the default mode */
            rounded = rounded > limit ? limit : rounded < -limit ? -limit : rounded;
            mantissas[c] = (int8_t)rounded;
        }
    }
}

void ksort_scalar_round_sbfp(const float *x, uint32_t head_dim, uint32_t block_size, uint32_t mantissa_bits,
                             int8_t *mantissas, uint8_t *codes)
{
    const float limit = (float)((1 << (mantissa_bits - 1)) - 1);
    for (uint32_t begin = 0; begin < head_dim; begin += block_size) {
        uint32_t n = head_dim - begin < block_size ? head_dim - begin : block_size;
        float scale = bits_float(ksort_scalar_max_magnitude(x + begin, n)) / limit;
        uint8_t code = scale_of_float(scale);
        *codes++ = code;
        for (uint32_t c = begin; c < begin + n; c++) /* no clamp: units pass the limit by a rounding error at most */
            mantissas[c] = code ? (int8_t)lrintf(x[c] / scale) : 0;
    }
}

void ksort_scalar_store_f16(const float *x, uint32_t n, uint16_t *out)
{
    for (uint32_t i = 0; i < n; i++)
        out[i] = f16_of_float(x[i]);
}

void ksort_scalar_store_bf16(const float *x, uint32_t n, uint16_t *out)
{
    for (uint32_t i = 0; i < n; i++)
        out[i] = bf16_of_float(x[i]);
}
