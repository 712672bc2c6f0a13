/* The encoder of transformed heads for one token, LANES channels a register; and the choice between this and
 * encode_tokens.h.
 *
 *     y [head_dim] f32 --least error--> exponent of each block; the 16 partial sums of squares are lanes
 *     LANES channels in one register: lane i is rounded, its error is broadcast, lanes i + 1 .. take their share;
 *     then every later register takes the shares of all LANES errors, in their order
 *
 * Bytes moved: 4 head_dim in, head_dim + blocks out; half of the feedback matrix, 2 head_dim^2 bytes, from L1 or L2.
 * One token is bound by the chain of 10 dependent instructions a channel, not by bytes.
 *
 * The including file includes encode_tokens.h, and defines FEWEST_GROUPED, sum_in_halves and, as those of kernels.h,
 * max_magnitude and transform_key.
 */
#ifndef KSORT_ENCODE_CHANNELS_H
#define KSORT_ENCODE_CHANNELS_H

#include "template/encode_step.h"

#define SUM_REGISTERS (16 / LANES)

/* y [n], zero up to the next multiple of LANES. */
static uint32_t least_error_exponent(const float *y, uint32_t n, uint32_t mantissa_bits)
{
    uint32_t exponent = max_magnitude(y, n) >> 23;
    if (exponent <= 1)
        return exponent;
    struct lanes_step step = lanes_step_of(lanes_set_int((int32_t)exponent), (int32_t)mantissa_bits);
    lanes own[SUM_REGISTERS] = {{0}}, halved[SUM_REGISTERS] = {{0}};
    for (uint32_t c = 0; c < n; c += LANES) {
        lanes u = *(const lanes *)(y + c) * step.first * step.second, twice = u + u;
        lanes error = u - lanes_mantissa(u, step.low, step.high);
        lanes error_of_twice = twice - lanes_mantissa(twice, step.low, step.high);
        own[c / LANES % SUM_REGISTERS] += error * error;
        halved[c / LANES % SUM_REGISTERS] += error_of_twice * error_of_twice;
    }
    return sum_in_halves(halved) < 4.0f * sum_in_halves(own) ? exponent - 1 : exponent;
}

/* Lane i is final when its turn comes: its error, in all lanes, becomes errors[i], and later lanes take their share.
 * feedback: row and column `first` of the head's matrix, rows head_dim apart. Returns the register with lanes before
 * their own rounding. */
ALWAYS_INLINE lanes feed_forward(lanes y, const float *feedback, uint32_t head_dim, uint32_t n,
                                 const struct lanes_step *step, lanes errors[LANES])
{
#pragma GCC unroll 1
    for (uint32_t i = 0; i < n; i++) {
        lanes mantissa = lanes_mantissa(y * step->first * step->second, step->low, step->high);
        errors[i] = lanes_broadcast(y - mantissa * step->step, i);
        lanes_mask later = lanes_between(i + 1, n);
        lanes row = load_masked(feedback + (size_t)i * head_dim, later);
        y = lanes_select(later, y - errors[i] * row, y);
    }
    return y;
}

/* Takes the shares of LANES errors from the channels begin .. head_dim-1 of y. feedback: the errors' first row. */
static void feed_later(float *y, const float *feedback, uint32_t head_dim, uint32_t begin, const lanes errors[LANES])
{
    for (uint32_t c = begin; c < head_dim; c += LANES) {
        lanes_mask inside = lanes_between(0, (uint32_t)min_size(LANES, head_dim - c));
        lanes later = *(const lanes *)(y + c);
        for (uint32_t i = 0; i < LANES; i++)
            later -= errors[i] * load_masked(feedback + (size_t)i * head_dim + c, inside);
        *(lanes *)(y + c) = later;
    }
}

/* y [head_dim] is aligned, with room up to the next multiple of LANES. */
static void encode_one(const struct head_transform *transform, const struct head_layout *layout, float *y,
                       struct encoded_head *encoded)
{
    uint32_t head_dim = layout->head_dim, block_size = layout->block_size;
    transform_key(transform, head_dim, y);
    for (uint32_t c = head_dim; c % LANES; c++)
        y[c] = 0.0f;
    for (uint32_t b = 0; b < layout->n_blocks; b++) {
        uint32_t n = (uint32_t)min_size(block_size, head_dim - b * block_size);
        encoded->exponents[b] = (uint8_t)least_error_exponent(y + b * block_size, n, layout->mantissa_bits);
    }
    for (uint32_t c = 0; c < head_dim; c += LANES) {
        int32_t exponent = encoded->exponents[c / block_size];
        struct lanes_step step = lanes_step_of(lanes_set_int(exponent), (int32_t)layout->mantissa_bits);
        uint32_t n = (uint32_t)min_size(LANES, head_dim - c);
        lanes channels = *(const lanes *)(y + c);
        if (transform->feedback) {
            const float *feedback = transform->feedback + (size_t)c * head_dim;
            lanes errors[LANES];
            channels = feed_forward(channels, feedback + c, head_dim, n, &step, errors);
            feed_later(y, feedback, head_dim, c + LANES, errors);
        }
        lanes mantissas = lanes_mantissa(channels * step.first * step.second, step.low, step.high);
        store_bytes(encoded->mantissas.channels + c, n, lanes_to_int(mantissas));
    }
}

/* See kernels.h. */
ALWAYS_INLINE void encode_heads(const struct head_transform *transform, const struct head_layout *layout,
                                uint32_t n_tokens, float (*heads)[KSORT_MAX_HEAD_DIM], struct encoded_head *encoded)
{
    uint32_t token = 0;
    for (uint32_t n; n_tokens - token >= FEWEST_GROUPED; token += n) {
        n = (uint32_t)min_size(LANES, n_tokens - token);
        encode_group(transform, layout, n, heads + token, encoded + token);
    }
    for (; token < n_tokens; token++)
        encode_one(transform, layout, heads[token], &encoded[token]);
}

#endif /* KSORT_ENCODE_CHANNELS_H */
