/* The encoder of transformed heads, one head of one token after another:
 *
 *     y [head_dim] f32 --transform_key--> y [head_dim] f32 --largest, squared errors a block--> scale bytes [blocks]
 *     channel c: y[c] --round--> mantissa i8, error --times feedback[c][c+1 ..]--> taken from y[c+1 ..]
 *
 * Bytes moved: 4 head_dim in, head_dim + blocks out; of the feedback matrix the half above its diagonal,
 * 2 head_dim^2 bytes, which stay in L1 or L2 over the tokens of a head.
 */
#include <math.h>

#include "rounding.h"
#include "scalar/scalar.h"

static float units_of_step(float y, const struct block_step *step)
{
    return y * step->inverse.first * step->inverse.second;
}

static float nearest_mantissa(float u, const struct block_step *step)
{
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

/* The sum of squared errors of x [n] in units of the step. */
static float squared_error(const float *x, uint32_t n, const struct block_step *step)
{
    float sums[16] = {0};
    for (uint32_t c = 0; c < n; c++) {
        float u = units_of_step(x[c], step), error = u - nearest_mantissa(u, step);
        sums[c % 16] = fmaf(error, error, sums[c % 16]);
    }
    return sum_in_halves(sums);
}

/* Of the block's natural exponent and one less, that which leaves the smaller squared error. */
static uint32_t least_error_exponent(const float *x, uint32_t n, uint32_t mantissa_bits)
{
    uint32_t exponent = ksort_scalar_max_magnitude(x, n) >> 23;
    if (exponent <= 1)
        return exponent;
    struct block_step own = block_step_of(exponent, mantissa_bits), halved = block_step_of(exponent - 1, mantissa_bits);
    return squared_error(x, n, &halved) < 4.0f * squared_error(x, n, &own) ? exponent - 1 : exponent;
}

/* The scale that gives the largest value the lowest mantissa, or the one below. */
static uint32_t least_error_scale(const float *x, uint32_t n, uint32_t mantissa_bits)
{
    float largest = x[0];
    for (uint32_t c = 1; c < n; c++)
        largest = fabsf(x[c]) > fabsf(largest) ? x[c] : largest;
    uint32_t magnitude = scale_code_above(fabsf(largest) / (float)(1 << (mantissa_bits - 1)));
    uint32_t code = magnitude | (largest > 0.0f && magnitude > 0 ? 0x80 : 0);
    if (magnitude <= 1)
        return code;
    struct block_step above = scaled_block_step_of(code, mantissa_bits);
    struct block_step below = scaled_block_step_of(code - 1, mantissa_bits);
    float error_above = squared_error(x, n, &above) * (above.step * above.step);
    float error_below = squared_error(x, n, &below) * (below.step * below.step);
    return error_below < error_above ? code - 1 : code;
}

static void encode_head(const struct head_transform *transform, const struct head_layout *layout, float *y,
                        union token_mantissas *mantissas, uint8_t *codes)
{
    uint32_t head_dim = layout->head_dim, block_size = layout->block_size, mantissa_bits = layout->mantissa_bits;
    ksort_scalar_transform_key(transform, head_dim, y);
    for (uint32_t b = 0; b < layout->n_blocks; b++) {
        uint32_t begin = b * block_size, n = (uint32_t)min_size(block_size, head_dim - begin);
        codes[b] = (uint8_t)(layout->is_scaled ? least_error_scale(y + begin, n, mantissa_bits)
                                               : least_error_exponent(y + begin, n, mantissa_bits));
    }
    struct block_step step = {.step = 0};
    for (uint32_t c = 0; c < head_dim; c++) {
        uint32_t code = codes[c / block_size];
        if (c % block_size == 0)
            step = layout->is_scaled ? scaled_block_step_of(code, mantissa_bits) : block_step_of(code, mantissa_bits);
        float mantissa = nearest_mantissa(units_of_step(y[c], &step), &step);
        mantissas->channels[c] = (int8_t)mantissa;
        if (!transform->feedback)
            continue;
        const float *feedback = transform->feedback + (size_t)c * head_dim;
        float error = fmaf(-mantissa, step.step, y[c]);
        for (uint32_t j = c + 1; j < head_dim; j++)
            y[j] = fmaf(-error, feedback[j], y[j]);
    }
}

void ksort_scalar_encode_transformed(const struct head_transform *transform, const struct head_layout *layout,
                                     uint32_t n_tokens, const float *heads, size_t stride,
                                     struct encoded_tokens *encoded)
{
    uint32_t head_dim = layout->head_dim;
    for (uint32_t token = 0; token < n_tokens; token++) {
        float y[KSORT_MAX_HEAD_DIM];
        union token_mantissas mantissas = {.quads = {0}};
        uint8_t codes[MAX_BLOCKS];
        memcpy(y, heads + token * stride, head_dim * sizeof *y);
        encode_head(transform, layout, y, &mantissas, codes);
        for (uint32_t quad = 0; quad < (head_dim + 3) / 4; quad++)
            encoded->quads[quad][token] = mantissas.quads[quad];
        for (uint32_t b = 0; b < layout->n_blocks; b++)
            encoded->exponents[b][token] = codes[b];
    }
}
