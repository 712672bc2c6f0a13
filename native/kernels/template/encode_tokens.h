/* The encoder of transformed heads for several registers of LANES tokens of one head: every register holds one channel of
 * LANES tokens, so no step runs across lanes and the feedback chain of all tokens is walked together. The chain's latency
 * (some 16 cycles a channel) is what more than one register of tokens hides, and they share each entry of feedback.
 *
 *     heads [R LANES tokens][head_dim] --shift, scale, transpose, first strides of rotating--> rotated [head_dim][R]
 *     --later strides, up to three a pass--> --permutation--> y [head_dim][R] --a block at a time--> scale bytes, steps
 *     channels in panels of P, held in P R registers:
 *         panel[i] -= error[c] * feedback[c][i]       for all channels c before the panel, in their order
 *         panel[i] -= error[c] * feedback[c][i]       for the panel's own channels c < i; --round--> mantissa, error[i]
 *     mantissas --four to a quad--> quads [n_quads][R]
 *
 *     P R registers of y:    R = 3, P = 4       R = 1, P = 8: fewer tokens
 *         channels          |t0 t1 t2|         |t0|
 *
 * Bytes moved, a panel: 4 R LANES for each earlier channel's errors, which stand in y's place (up to 24 KB with AVX2), and
 * 4 P of its feedback row for P R multiply-adds; the panel itself is loaded and stored once.
 *
 * The including file includes a level's lanes_*.h. R, P and is_scaled are constants throughout.
 */
#ifndef KSORT_ENCODE_TOKENS_H
#define KSORT_ENCODE_TOKENS_H

#include "template/encode_step.h"

#define MAX_REGISTERS 3 /* of tokens: R */
#define MAX_PANEL 12    /* registers: P * R */

/* Strides 1, 2, .. of `radix` registers. Subtracting as a fused product keeps adders and multipliers of some cores busy. */
ALWAYS_INLINE void butterflies(lanes *rows, const uint32_t radix)
{
#pragma GCC unroll 4
    for (uint32_t apart = 1; apart < radix; apart *= 2)
#pragma GCC unroll 16
        for (uint32_t i = 0; i < radix; i++)
            if (!(i & apart)) {
                lanes a = rows[i], b = rows[i + apart];
                rows[i] = a + b;
                rows[i + apart] = lanes_minus_product(a, b, lanes_set(1.0f));
            }
}

/* Strides `stride`, 2 stride, .. of y [n], times `factor`. */
ALWAYS_INLINE void pass_of_butterflies(lanes *y, size_t n, size_t stride, const uint32_t radix, float factor)
{
    for (size_t begin = 0; begin < n; begin += radix * stride)
        for (size_t i = begin; i < begin + stride; i++) {
            lanes rows[8];
#pragma GCC unroll 8
            for (uint32_t k = 0; k < radix; k++)
                rows[k] = y[i + k * stride];
            butterflies(rows, radix);
#pragma GCC unroll 8
            for (uint32_t k = 0; k < radix; k++)
                y[i + k * stride] = rows[k] * factor;
        }
}

/* What load_heads left to do: strides from LANES on where the segment has them, all strides of shorter ones.
 * y [head_dim][R] */
static void rotate_lanes(lanes *y, uint32_t head_dim, const uint32_t R)
{
    for (uint32_t begin = 0, n; begin < head_dim; begin += n, y += (size_t)n * R) {
        n = largest_power_of_two(head_dim - begin);
        float factor = rotation_factor(n);
        for (uint32_t stride = n < LANES ? 1 : LANES, radix;; stride *= radix) {
            uint32_t rest = n / stride; /* to go: 16 is 4 * 4, other numbers begin with 8 */
            radix = rest == 16 ? 4 : (uint32_t)min_size(rest, 8);
            float factor_now = radix == rest ? factor : 1.0f;
            switch (radix) {
            case 8: pass_of_butterflies(y, (size_t)n * R, (size_t)stride * R, 8, factor_now); break;
            case 4: pass_of_butterflies(y, (size_t)n * R, (size_t)stride * R, 4, factor_now); break;
            case 2: pass_of_butterflies(y, (size_t)n * R, (size_t)stride * R, 2, factor_now); break;
            default: pass_of_butterflies(y, (size_t)n * R, (size_t)stride * R, 1, factor_now);
            }
            if (radix == rest)
                break;
        }
    }
}

/* Channels c .. c + LANES - 1, n of them inside the head, of LANES tokens: y [LANES][R]. Where all are inside, a segment
 * of rotating holds them, whose first strides they run through here. */
ALWAYS_INLINE void load_channels(const struct head_transform *transform, const float *const tokens[LANES], uint32_t c,
                                 const uint32_t n, lanes *y, const uint32_t R)
{
    lanes rows[LANES], columns[LANES];
    lanes shift = transform->shift ? load_below(transform->shift + c, n, 0) : lanes_set(0.0f);
    lanes scale = transform->scale ? load_below(transform->scale + c, n, 0) : lanes_set(1.0f);
#pragma GCC unroll 16
    for (uint32_t i = 0; i < LANES; i++)
        rows[i] = (load_below(tokens[i] + c, n, 0) - shift) * scale;
    transpose_lanes(rows, columns);
    if (n == LANES && transform->rotate)
        butterflies(columns, LANES);
#pragma GCC unroll 16
    for (uint32_t i = 0; i < LANES; i++)
        y[i * R] = columns[i];
}

/* heads [n_tokens][head_dim], `stride` floats apart, shifted, scaled and rotated: y [head_dim][R]. Missing tokens repeat
 * the last one. */
ALWAYS_INLINE void load_heads(const struct head_transform *transform, uint32_t head_dim, uint32_t n_tokens,
                              const float *heads, size_t stride, lanes *y, const uint32_t R)
{
    for (uint32_t r = 0; r < R; r++) {
        const float *tokens[LANES];
        for (uint32_t i = 0; i < LANES; i++)
            tokens[i] = heads + min_size(r * LANES + i, n_tokens - 1) * stride;
        uint32_t c = 0;
        for (; c + LANES <= head_dim; c += LANES)
            load_channels(transform, tokens, c, LANES, y + c * R + r, R);
        if (c < head_dim)
            load_channels(transform, tokens, c, head_dim - c, y + c * R + r, R);
    }
    if (transform->rotate)
        rotate_lanes(y, head_dim, R);
}

/* Partial sum `residue` of a block's squared errors, for two steps. */
ALWAYS_INLINE void add_partial(const lanes *y, uint32_t n, uint32_t residue, const struct lanes_step *steps,
                               lanes *sums, const uint32_t R, const bool is_scaled)
{
    lanes first = lanes_set(0.0f), second = lanes_set(0.0f);
#pragma GCC unroll 2
    for (uint32_t c = residue; c < n; c += 16) {
        first = lanes_add_square(first, y[c * R], &steps[0], is_scaled);
        second = lanes_add_square(second, y[c * R], &steps[1], is_scaled);
    }
    sums[0] += first;
    sums[1] += second;
}

/* The squared errors of a block, y [n] R apart, for two steps. */
ALWAYS_INLINE void squared_errors(const lanes *y, uint32_t n, const struct lanes_step steps[2], lanes errors[2],
                                  const uint32_t R, const bool is_scaled)
{
    lanes sums[8][2];
    for (uint32_t i = 0; i < 8; i++) {
        sums[i][0] = sums[i][1] = lanes_set(-0.0f); /* which adds nothing to any sum */
        add_partial(y, n, i, steps, sums[i], R, is_scaled);
        add_partial(y, n, i + 8, steps, sums[i], R, is_scaled);
    }
#pragma GCC unroll 2
    for (uint32_t k = 0; k < 2; k++)
        errors[k] = ((sums[0][k] + sums[4][k]) + (sums[2][k] + sums[6][k])) +
                    ((sums[1][k] + sums[5][k]) + (sums[3][k] + sums[7][k]));
}

/* A block of n channels of one register of tokens, y [n] R apart, from its largest values: its scale bytes and steps. */
ALWAYS_INLINE lanes_int choose_step(const lanes *y, uint32_t n, lanes largest, int32_t mantissa_bits,
                                    struct lanes_step *chosen, const uint32_t R, const bool is_scaled)
{
    lanes_int code = lanes_larger_code(largest, mantissa_bits, is_scaled);
    lanes_int has_smaller = lanes_code_magnitude(code, is_scaled) > 1; /* a true comparison is -1 */
    struct lanes_step steps[2] = {lanes_step_of(code, mantissa_bits, is_scaled),
                                  lanes_step_of(code + has_smaller, mantissa_bits, is_scaled)};
    lanes errors[2];
    if (n == 32)
        squared_errors(y, 32, steps, errors, R, is_scaled);
    else
        squared_errors(y, n, steps, errors, R, is_scaled);
    lanes weights[2] = {lanes_set(4.0f), lanes_set(1.0f)};
    if (is_scaled)
        weights[0] = steps[0].step * steps[0].step, weights[1] = steps[1].step * steps[1].step;
    lanes_int is_smaller = has_smaller & (errors[1] * weights[1] < errors[0] * weights[0]);
    *chosen = steps[0]; /* low and high are the same */
    chosen->first = lanes_either(is_smaller, steps[1].first, steps[0].first);
    chosen->second = lanes_either(is_smaller, steps[1].second, steps[0].second);
    chosen->step = lanes_either(is_smaller, steps[1].step, steps[0].step);
    return code + is_smaller;
}

/* Block b of y [head_dim][R] from `rotated`, permuted; codes [R LANES], steps [R]. */
ALWAYS_INLINE void choose_steps(const struct head_layout *layout, const uint16_t *permutation, const lanes *rotated,
                                uint32_t b, lanes *y, uint8_t *codes, struct lanes_step *steps, const uint32_t R,
                                const bool is_scaled)
{
    uint32_t begin = b * layout->block_size, n = (uint32_t)min_size(layout->block_size, layout->head_dim - begin);
    lanes largest[MAX_REGISTERS] = {{0}};
    for (uint32_t c = begin + n; c-- > begin;) /* backwards: of equal ones the first stays */
#pragma GCC unroll 3
        for (uint32_t r = 0; r < R; r++) {
            lanes x = rotated[(permutation ? permutation[c] : c) * R + r];
            largest[r] = lanes_either(lanes_magnitude(x) >= lanes_magnitude(largest[r]), x, largest[r]);
            y[c * R + r] = x;
        }
#pragma GCC unroll 3
    for (uint32_t r = 0; r < R; r++) {
        lanes_int code =
            choose_step(y + begin * R + r, n, largest[r], (int32_t)layout->mantissa_bits, &steps[r], R, is_scaled);
        store_bytes((int8_t *)codes + r * LANES, LANES, code << 24 >> 24); /* signed bytes, which no level saturates */
    }
}

/* Channels first .. first + P - 1, of one block. feedback, or NULL, is the head's matrix; errors replace y.
 * mantissas [P][R] */
ALWAYS_INLINE void round_panel(lanes *y, const float *feedback, uint32_t head_dim, uint32_t first,
                               const struct lanes_step *steps, lanes *mantissas, const uint32_t P, const uint32_t R,
                               const bool is_scaled)
{
    lanes panel[MAX_PANEL];
#pragma GCC unroll 12
    for (uint32_t i = 0; i < P * R; i++)
        panel[i] = y[(size_t)first * R + i];
    const float *row = feedback ? feedback + first : NULL;
    lanes *own = y + (size_t)first * R;
    for (const lanes *errors = y; feedback && errors < own; errors += R, row += head_dim)
#pragma GCC unroll 8
        for (uint32_t i = 0; i < P; i++)
#pragma GCC unroll 3
            for (uint32_t r = 0; r < R; r++)
                panel[i * R + r] = lanes_minus_product(panel[i * R + r], errors[r], lanes_set(row[i]));
#pragma GCC unroll 8
    for (uint32_t i = 0; i < P; i++)
#pragma GCC unroll 3
        for (uint32_t r = 0; r < R; r++) {
            lanes x = panel[i * R + r];
#pragma GCC unroll 8
            for (uint32_t c = 0; feedback && c < i; c++) /* only the last of them waits for the channel before */
                x = lanes_minus_product(x, own[c * R + r], lanes_set(row[(size_t)c * head_dim + i]));
            lanes mantissa = lanes_mantissa(lanes_units(x, &steps[r], is_scaled), &steps[r]);
            mantissas[i * R + r] = mantissa;
            own[i * R + r] = lanes_minus_product(x, mantissa, steps[r].step);
        }
}

/* mantissas [P][R] of channels from `first` on, to quads [][tokens]. */
ALWAYS_INLINE void store_quads(const lanes *mantissas, uint32_t first, uint32_t (*quads)[GROUP_TOKENS],
                               const uint32_t P, const uint32_t R)
{
#pragma GCC unroll 3
    for (uint32_t r = 0; r < R; r++) {
        lanes_int *quad = (lanes_int *)&quads[first / 4][r * LANES];
        const lanes *m = mantissas + r;
        if (P == 2) { /* half a quad, the upper one where first is no multiple of 4 */
            lanes_int half = lanes_quad(m[0], m[R], lanes_set(0.0f), lanes_set(0.0f));
            *quad = first % 4 ? *quad | half << 16 : half;
        }
#pragma GCC unroll 2
        for (uint32_t i = 0; i + 4 <= P; i += 4, quad += GROUP_TOKENS / LANES)
            *quad = lanes_quad(m[i * R], m[(i + 1) * R], m[(i + 2) * R], m[(i + 3) * R]);
    }
}

/* n_tokens, up to R * LANES, to the columns from first_token on; see kernels.h. */
ALWAYS_INLINE void encode_group(const struct head_transform *transform, const struct head_layout *layout,
                                uint32_t n_tokens, const float *heads, size_t stride, uint32_t first_token,
                                struct encoded_tokens *encoded, const uint32_t P, const uint32_t R,
                                const bool is_scaled)
{
    uint32_t head_dim = layout->head_dim;
    lanes rotated[KSORT_MAX_HEAD_DIM * MAX_REGISTERS], y[KSORT_MAX_HEAD_DIM * MAX_REGISTERS], mantissas[MAX_PANEL];
    struct lanes_step steps[MAX_BLOCKS][MAX_REGISTERS];
    uint32_t (*quads)[GROUP_TOKENS] = (uint32_t (*)[GROUP_TOKENS]) & encoded->quads[0][first_token];
    load_heads(transform, head_dim, n_tokens, heads, stride, rotated, R);
    for (uint32_t b = 0; b < layout->n_blocks; b++)
        choose_steps(layout, transform->permutation, rotated, b, y, &encoded->exponents[b][first_token], steps[b], R,
                     is_scaled);
    uint32_t first = 0;
    for (; first + P <= head_dim; first += P) {
        round_panel(y, transform->feedback, head_dim, first, steps[first / layout->block_size], mantissas, P, R,
                    is_scaled);
        store_quads(mantissas, first, quads, P, R);
    }
    for (; first < head_dim; first += 2) {
        round_panel(y, transform->feedback, head_dim, first, steps[first / layout->block_size], mantissas, 2, R,
                    is_scaled);
        store_quads(mantissas, first, quads, 2, R);
    }
}

#endif /* KSORT_ENCODE_TOKENS_H */
