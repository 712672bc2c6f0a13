/* The encoder of transformed heads for one token, LANES channels a register; and the choice between this and
 * encode_tokens.h.
 *
 *     y [head_dim] f32 --least error--> scale byte of each block; the 16 partial sums of squares are lanes
 *     CHAIN channels one by one, as scalars: y[i] --round--> mantissa, error; the error is taken from y[i + 1 ..]
 *     then every later register takes the shares of all CHAIN errors, in their order
 *
 * Bytes moved: 4 head_dim in, head_dim + blocks out; half of the feedback matrix, 2 head_dim^2 bytes, from L1 or L2.
 * One token is bound by the chain of 6 dependent instructions a channel (some 16 cycles), not by bytes.
 *
 * The including file includes encode_tokens.h, and defines FEWEST_GROUPED, sum_in_halves and, as those of kernels.h,
 * max_magnitude and transform_key.
 */
#ifndef KSORT_ENCODE_CHANNELS_H
#define KSORT_ENCODE_CHANNELS_H

#include <math.h>

#include "template/encode_step.h"

#define SUM_REGISTERS (16 / LANES)
#define CHAIN 8 /* channels: within a block of any size */

/* The first of the values of largest magnitude. */
static inline float largest_value(const float *y, uint32_t n)
{
    uint32_t largest = max_magnitude(y, n), c = 0;
    while ((float_bits(y[c]) & 0x7FFFFFFF) != largest)
        c++;
    return y[c];
}

/* The scale byte of y [n], zero up to the next multiple of LANES. */
ALWAYS_INLINE uint32_t choose_code(const float *y, uint32_t n, int32_t mantissa_bits, const bool is_scaled)
{
    float largest = is_scaled ? largest_value(y, n) : bits_float(max_magnitude(y, n));
    lanes_int codes = lanes_larger_code(lanes_set(largest), mantissa_bits, is_scaled);
    uint32_t code = (uint32_t)codes[0];
    if ((is_scaled ? code & 0x7F : code) <= 1)
        return code;
    struct lanes_step larger = lanes_step_of(codes, mantissa_bits, is_scaled);
    struct lanes_step smaller = lanes_step_of(codes - 1, mantissa_bits, is_scaled);
    lanes sums[SUM_REGISTERS] = {{0}}, sums_of_smaller[SUM_REGISTERS] = {{0}};
    for (uint32_t c = 0; c < n; c += LANES) {
        lanes x = *(const lanes *)(y + c);
        uint32_t i = c / LANES % SUM_REGISTERS;
        sums[i] = lanes_add_square(sums[i], x, &larger, is_scaled);
        sums_of_smaller[i] = lanes_add_square(sums_of_smaller[i], x, &smaller, is_scaled);
    }
    float weight = is_scaled ? larger.step[0] * larger.step[0] : 4.0f;
    float weight_of_smaller = is_scaled ? smaller.step[0] * smaller.step[0] : 1.0f;
    return sum_in_halves(sums_of_smaller) * weight_of_smaller < sum_in_halves(sums) * weight ? code - 1 : code;
}

/* Channels 0 .. n-1 of y, n a constant up to CHAIN; errors [CHAIN], mantissas [n]. feedback: row and column of the first of them. */
ALWAYS_INLINE void round_chain(const float *y, uint32_t n, const float *feedback, size_t head_dim,
                               const struct block_step *step, float *errors, float *mantissas, const bool is_scaled)
{
    float x[CHAIN];
#pragma GCC unroll 8
    for (uint32_t i = 0; i < n; i++)
        x[i] = y[i];
#pragma GCC unroll 8
    for (uint32_t i = 0; i < n; i++) {
        float u = x[i] * step->inverse.first;
        if (!is_scaled)
            u *= step->inverse.second;
        u = u < step->high ? u : step->high; /* NaN becomes `high` */
        u = u > step->low ? u : step->low;
        mantissas[i] = rintf(u);
        errors[i] = fmaf(-mantissas[i], step->step, x[i]);
#pragma GCC unroll 8
        for (uint32_t j = i + 1; j < n; j++)
            x[j] = fmaf(-errors[i], feedback[i * head_dim + j], x[j]);
    }
}

/* Takes the shares of CHAIN errors from the channels begin .. head_dim-1 of y. feedback: the errors' first row. */
ALWAYS_INLINE void feed_later(float *y, const float *feedback, uint32_t head_dim, uint32_t begin, const float *errors)
{
    lanes all[CHAIN];
    for (uint32_t i = 0; i < CHAIN; i++)
        all[i] = lanes_set(errors[i]);
    for (uint32_t c = begin; c < head_dim; c += LANES) {
        lanes later = load_below(y, head_dim, c);
        for (uint32_t i = 0; i < CHAIN; i++)
            later = lanes_minus_product(later, all[i], load_below(feedback + (size_t)i * head_dim, head_dim, c));
        store_below(y, head_dim, c, later);
    }
}

/* Mantissas [head_dim], as floats, of y with feedback; y becomes anything. */
ALWAYS_INLINE void round_with_feedback(const struct head_layout *layout, const float *feedback, const uint8_t *codes,
                                       float *y, float *mantissas, const bool is_scaled)
{
    uint32_t head_dim = layout->head_dim;
    float errors[CHAIN];
    for (uint32_t c = 0; c < head_dim; c += CHAIN) {
        uint32_t code = codes[c / layout->block_size];
        struct block_step step =
            is_scaled ? scaled_block_step_of(code, layout->mantissa_bits) : block_step_of(code, layout->mantissa_bits);
        const float *rows = feedback + (size_t)c * head_dim;
        switch (head_dim - c) {
        case 2: round_chain(y + c, 2, rows + c, head_dim, &step, errors, mantissas + c, is_scaled); break;
        case 4: round_chain(y + c, 4, rows + c, head_dim, &step, errors, mantissas + c, is_scaled); break;
        case 6: round_chain(y + c, 6, rows + c, head_dim, &step, errors, mantissas + c, is_scaled); break;
        default: round_chain(y + c, CHAIN, rows + c, head_dim, &step, errors, mantissas + c, is_scaled);
        }
        feed_later(y, rows, head_dim, c + CHAIN, errors);
    }
}

ALWAYS_INLINE void encode_one(const struct head_transform *transform, const struct head_layout *layout,
                              const float *head, uint32_t token, struct encoded_tokens *encoded, const bool is_scaled)
{
    uint32_t head_dim = layout->head_dim, block_size = layout->block_size;
    int32_t mantissa_bits = (int32_t)layout->mantissa_bits;
    _Alignas(64) float y[KSORT_MAX_HEAD_DIM], mantissas[KSORT_MAX_HEAD_DIM];
    union token_mantissas bytes;
    uint8_t codes[MAX_BLOCKS];
    if (head_dim % 4)
        bytes.quads[head_dim / 4] = 0; /* padding of the last quad, a half one */
    memcpy(y, head, head_dim * sizeof *y);
    transform_key(transform, head_dim, y);
    for (uint32_t c = head_dim; c % LANES; c++)
        y[c] = 0.0f;
    for (uint32_t b = 0; b < layout->n_blocks; b++) {
        uint32_t n = (uint32_t)min_size(block_size, head_dim - b * block_size);
        codes[b] = (uint8_t)choose_code(y + b * block_size, n, mantissa_bits, is_scaled);
    }
    if (transform->feedback)
        round_with_feedback(layout, transform->feedback, codes, y, mantissas, is_scaled);
    for (uint32_t c = 0; c < head_dim; c += LANES) {
        lanes rounded = *(const lanes *)(mantissas + c);
        if (!transform->feedback) {
            lanes_int code = lanes_set_int(codes[c / block_size]);
            struct lanes_step step = lanes_step_of(code, mantissa_bits, is_scaled);
            rounded = lanes_mantissa(lanes_units(*(const lanes *)(y + c), &step, is_scaled), &step);
        }
        store_bytes(bytes.channels + c, (uint32_t)min_size(LANES, head_dim - c), lanes_to_int(rounded));
    }
    for (uint32_t quad = 0; quad < (head_dim + 3) / 4; quad++)
        encoded->quads[quad][token] = bytes.quads[quad];
    for (uint32_t b = 0; b < layout->n_blocks; b++)
        encoded->exponents[b][token] = codes[b];
}

ALWAYS_INLINE void encode_heads_of(const struct head_transform *transform, const struct head_layout *layout,
                                   uint32_t n_tokens, const float *heads, size_t stride, struct encoded_tokens *encoded,
                                   const bool is_scaled)
{
    uint32_t token = 0;
    for (uint32_t n; n_tokens - token >= FEWEST_GROUPED; token += n) {
        const float *rest = heads + token * stride;
        n = (uint32_t)min_size(MAX_REGISTERS * LANES, n_tokens - token);
        if (n > LANES)
            encode_group(transform, layout, n, rest, stride, token, encoded, 4, MAX_REGISTERS, is_scaled);
        else
            encode_group(transform, layout, n, rest, stride, token, encoded, 8, 1, is_scaled);
    }
    for (; token < n_tokens; token++)
        encode_one(transform, layout, heads + token * stride, token, encoded, is_scaled);
}

/* See kernels.h. */
ALWAYS_INLINE void encode_heads(const struct head_transform *transform, const struct head_layout *layout,
                                uint32_t n_tokens, const float *heads, size_t stride, struct encoded_tokens *encoded)
{
    if (layout->is_scaled)
        encode_heads_of(transform, layout, n_tokens, heads, stride, encoded, true);
    else
        encode_heads_of(transform, layout, n_tokens, heads, stride, encoded, false);
}

#endif /* KSORT_ENCODE_CHANNELS_H */
