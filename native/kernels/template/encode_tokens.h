/* The encoder of transformed heads for LANES tokens of one head at once: every register holds one channel of LANES
 * tokens, so no step runs across lanes and the feedback chain of all tokens is walked together.
 *
 *     heads [LANES tokens][head_dim] --transpose--> y [head_dim][LANES]
 *     y --shift, scale, rotate (radix 8: three strides a pass), permutation--> y --a block at a time--> exponents
 *     channels in panels of 8, held in registers:
 *         panel[i] -= error[c] * feedback[c][i]       for all channels c before the panel, in their order
 *         panel[i] --round--> mantissa, error[i]; panel[i + 1 ..] -= error[i] * feedback[i][i + 1 ..]
 *     mantissas --four to a quad--> quads [n_quads][LANES] --transpose--> tokens
 *
 * Bytes moved, a panel: 4 LANES for each earlier channel's errors, which stand in y's place (up to 16 KB, L1), and 32
 * of its feedback row; the panel itself is loaded and stored once.
 *
 * The including file includes a level's lanes_*.h.
 */
#ifndef KSORT_ENCODE_TOKENS_H
#define KSORT_ENCODE_TOKENS_H

#include "template/encode_step.h"

#define PANEL 8 /* channels: two quads, within a block of any size */

/* Strides `stride`, 2 stride, .. of `radix` rows that lie `stride` apart. radix is a constant. */
ALWAYS_INLINE void butterflies(lanes *y, uint32_t stride, const uint32_t radix)
{
    lanes rows[8];
#pragma GCC unroll 8
    for (uint32_t i = 0; i < radix; i++)
        rows[i] = y[i * stride];
#pragma GCC unroll 3
    for (uint32_t apart = 1; apart < radix; apart *= 2)
#pragma GCC unroll 8
        for (uint32_t i = 0; i < radix; i++)
            if (!(i & apart)) {
                lanes a = rows[i], b = rows[i + apart];
                rows[i] = a + b;
                rows[i + apart] = a - b;
            }
#pragma GCC unroll 8
    for (uint32_t i = 0; i < radix; i++)
        y[i * stride] = rows[i];
}

ALWAYS_INLINE void pass_of_butterflies(lanes *y, uint32_t n, uint32_t stride, const uint32_t radix)
{
    for (uint32_t begin = 0; begin < n; begin += radix * stride)
        for (uint32_t i = begin; i < begin + stride; i++)
            butterflies(y + i, stride, radix);
}

static void rotate_lanes(lanes *y, uint32_t head_dim)
{
    for (uint32_t begin = 0, n; begin < head_dim; begin += n, y += n) {
        n = largest_power_of_two(head_dim - begin);
        uint32_t stride = 1;
        for (; 8 * stride <= n; stride *= 8)
            pass_of_butterflies(y, n, stride, 8);
        if (4 * stride == n)
            pass_of_butterflies(y, n, stride, 4);
        else if (2 * stride == n)
            pass_of_butterflies(y, n, stride, 2);
        float factor = rotation_factor(n);
        for (uint32_t i = 0; i < n; i++)
            y[i] *= factor;
    }
}

ALWAYS_INLINE lanes sum_lanes_in_halves(lanes sums[16])
{
    for (uint32_t half = 8; half > 0; half /= 2)
        for (uint32_t i = 0; i < half; i++)
            sums[i] += sums[i + half];
    return sums[0];
}

static lanes_int least_error_exponents(const lanes *y, uint32_t n, int32_t mantissa_bits)
{
    lanes_int largest = {0};
    for (uint32_t c = 0; c < n; c++)
        largest = lanes_max_int(largest, (lanes_int)y[c] & 0x7FFFFFFF);
    lanes_int exponent = largest >> 23;
    struct lanes_step step = lanes_step_of(exponent, mantissa_bits);
    lanes own[16], halved[16];
    for (uint32_t residue = 0; residue < 16; residue++) { /* n is at least 2, and all sums begin at 0 */
        own[residue] = halved[residue] = lanes_set(0.0f);
        for (uint32_t c = residue; c < n; c += 16) {
            lanes u = y[c] * step.first * step.second, twice = u + u;
            lanes error = u - lanes_mantissa(u, step.low, step.high);
            lanes error_of_twice = twice - lanes_mantissa(twice, step.low, step.high);
            own[residue] += error * error;
            halved[residue] += error_of_twice * error_of_twice;
        }
    }
    lanes_int is_smaller = sum_lanes_in_halves(halved) < 4.0f * sum_lanes_in_halves(own);
    return exponent + (is_smaller & (exponent > 1)); /* a true comparison is -1 */
}

/* Channels first .. first + n - 1, n up to PANEL. feedback, or NULL, is the head's matrix. Errors replace y. */
ALWAYS_INLINE void round_panel(lanes *y, lanes_int *quads, const float *feedback, uint32_t head_dim, uint32_t first,
                               uint32_t n, const struct lanes_step *step)
{
    lanes panel[PANEL] = {{0}};
#pragma GCC unroll 8
    for (uint32_t i = 0; i < n; i++)
        panel[i] = y[first + i];
    for (uint32_t c = 0; feedback && c < first; c++) {
        const float *row = feedback + (size_t)c * head_dim + first;
        lanes error = y[c];
#pragma GCC unroll 8
        for (uint32_t i = 0; i < n; i++)
            panel[i] -= error * row[i];
    }
    lanes_int quad[2] = {{0}, {0}};
#pragma GCC unroll 8
    for (uint32_t i = 0; i < n; i++) {
        lanes mantissa = lanes_mantissa(panel[i] * step->first * step->second, step->low, step->high);
        quad[i / 4] |= (lanes_to_int(mantissa) & 0xFF) << (8 * (i % 4));
        if (!feedback)
            continue;
        const float *row = feedback + (size_t)(first + i) * head_dim + first;
        lanes error = panel[i] - mantissa * step->step;
        y[first + i] = error;
#pragma GCC unroll 8
        for (uint32_t j = i + 1; j < n; j++)
            panel[j] -= error * row[j];
    }
    quads[first / 4] = quad[0];
    quads[first / 4 + 1] = quad[1];
}

/* y [head_dim] becomes quads, in pairs up to the last panel's, and exponents [n_blocks]. */
static void encode_lanes(const struct head_layout *layout, const float *feedback, lanes *y, lanes_int *quads,
                         lanes_int *exponents)
{
    uint32_t head_dim = layout->head_dim;
    for (uint32_t b = 0, n; b < layout->n_blocks; b++) {
        n = (uint32_t)min_size(layout->block_size, head_dim - b * layout->block_size);
        exponents[b] = least_error_exponents(y + b * layout->block_size, n, (int32_t)layout->mantissa_bits);
    }
    for (uint32_t first = 0; first < head_dim; first += PANEL) {
        struct lanes_step step = lanes_step_of(exponents[first / layout->block_size], (int32_t)layout->mantissa_bits);
        if (head_dim - first >= PANEL)
            round_panel(y, quads, feedback, head_dim, first, PANEL, &step);
        else
            round_panel(y, quads, feedback, head_dim, first, head_dim - first, &step);
    }
}

/* See kernels.h; n_tokens up to LANES. Heads of missing tokens count as zero. */
static void encode_group(const struct head_transform *transform, const struct head_layout *layout, uint32_t n_tokens,
                         float (*heads)[KSORT_MAX_HEAD_DIM], struct encoded_head *encoded)
{
    uint32_t head_dim = layout->head_dim;
    lanes y[KSORT_MAX_HEAD_DIM];
    lanes_int quads[MAX_QUADS + LANES], exponents[MAX_BLOCKS];
    for (uint32_t token = n_tokens; token < LANES; token++)
        memset(heads[token], 0, head_dim * sizeof(float));
    for (uint32_t c = 0; c < head_dim; c += LANES)
        transpose_lanes(heads[0] + c, KSORT_MAX_HEAD_DIM, y + c);
    for (uint32_t c = 0; transform->shift && c < head_dim; c++)
        y[c] -= transform->shift[c];
    for (uint32_t c = 0; transform->scale && c < head_dim; c++)
        y[c] *= transform->scale[c];
    if (transform->rotate)
        rotate_lanes(y, head_dim);
    if (transform->permutation) {
        lanes copy[KSORT_MAX_HEAD_DIM];
        memcpy(copy, y, head_dim * sizeof *y);
        for (uint32_t i = 0; i < head_dim; i++)
            y[i] = copy[transform->permutation[i]];
    }
    encode_lanes(layout, transform->feedback, y, quads, exponents);

    uint32_t n_quads = (head_dim + 3) / 4;
    for (uint32_t first = 0; first < n_quads; first += LANES) {
        lanes tokens[LANES];
        transpose_lanes((const float *)(quads + first), LANES, tokens);
        size_t n_bytes = min_size(n_quads - first, LANES) * 4;
        for (uint32_t token = 0; token < n_tokens; token++)
            memcpy(encoded[token].mantissas.quads + first, &tokens[token], n_bytes);
    }
    for (uint32_t b = 0; b < layout->n_blocks; b++)
        for (uint32_t token = 0; token < n_tokens; token++)
            encoded[token].exponents[b] = (uint8_t)exponents[b][token];
}

#endif /* KSORT_ENCODE_TOKENS_H */
