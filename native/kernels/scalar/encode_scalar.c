/* The encoder of transformed heads, one head of one token after another:
 *
 *     y [head_dim] f32 --transform_key--> y [head_dim] f32 --largest, squared errors a block--> exponents [blocks] u8
 *     channel c: y[c] --round--> mantissa i8, error --times feedback[c][c+1 ..]--> taken from y[c+1 ..]
 *
 * Bytes moved: 4 head_dim in, head_dim + blocks out; of the feedback matrix the half above its diagonal,
 * 2 head_dim^2 bytes, which stay in L1 or L2 over the tokens of a head.
 */
#include <math.h>

#include "rounding.h"
#include "scalar/scalar.h"

static float nearest_mantissa(float y, const struct block_step *step)
{
    float u = y * step->inverse.first * step->inverse.second;
    u = u < step->high ? u : step->high; /* NaN becomes `high` here, as the minimum of x86 has it */
    u = u > step->low ? u : step->low;
    return (float)lrintf(u); /* ties to even, the default mode */
}

static float sum_in_halves(float sums[16])
{
    for (uint32_t half = 8; half > 0; half /= 2)
        for (uint32_t i = 0; i < half; i++)
            sums[i] = sums[i] + sums[i + half];
    return sums[0];
}

/* Of the block's natural exponent and one less, that which leaves the smaller squared error. */
static uint32_t least_error_exponent(const float *x, uint32_t n, uint32_t mantissa_bits)
{
    uint32_t exponent = ksort_scalar_max_magnitude(x, n) >> 23;
    if (exponent <= 1)
        return exponent;
    struct block_step unit = unit_step(mantissa_bits);
    struct step_inverse inverse = step_inverse_of(exponent, mantissa_bits);
    float own[16] = {0}, halved[16] = {0};
    for (uint32_t c = 0; c < n; c++) {
        float u = x[c] * inverse.first * inverse.second, twice = 2.0f * u;
        float error = u - nearest_mantissa(u, &unit), error_of_twice = twice - nearest_mantissa(twice, &unit);
        own[c % 16] += error * error;
        halved[c % 16] += error_of_twice * error_of_twice;
    }
    return sum_in_halves(halved) < 4.0f * sum_in_halves(own) ? exponent - 1 : exponent;
}

static void encode_head(const struct head_transform *transform, const struct head_layout *layout, float *y,
                        struct encoded_head *encoded)
{
    uint32_t head_dim = layout->head_dim, block_size = layout->block_size;
    ksort_scalar_transform_key(transform, head_dim, y);
    for (uint32_t b = 0; b < layout->n_blocks; b++) {
        uint32_t begin = b * block_size, n = (uint32_t)min_size(block_size, head_dim - begin);
        encoded->exponents[b] = (uint8_t)least_error_exponent(y + begin, n, layout->mantissa_bits);
    }
    struct block_step step = {.step = 0};
    for (uint32_t c = 0; c < head_dim; c++) {
        if (c % block_size == 0)
            step = block_step_of(encoded->exponents[c / block_size], layout->mantissa_bits);
        float mantissa = nearest_mantissa(y[c], &step);
        encoded->mantissas.channels[c] = (int8_t)mantissa;
        if (!transform->feedback)
            continue;
        const float *feedback = transform->feedback + (size_t)c * head_dim;
        float error = y[c] - mantissa * step.step;
        for (uint32_t j = c + 1; j < head_dim; j++)
            y[j] = y[j] - error * feedback[j];
    }
}

void ksort_scalar_encode_transformed(const struct head_transform *transform, const struct head_layout *layout,
                                     uint32_t n_tokens, float (*heads)[KSORT_MAX_HEAD_DIM],
                                     struct encoded_head *encoded)
{
    for (uint32_t token = 0; token < n_tokens; token++)
        encode_head(transform, layout, heads[token], &encoded[token]);
}
