/* Online softmax of one query row (Milakov and Gimelshein, arXiv 1805.02867): init, merge, finish. The step over a tile
 * is a kernel.
 *
 * After some tokens with scores s_i and values v_i: max = max s_i, sum = sum exp(s_i - max), and beside the state an
 * accumulator of sum exp(s_i - max) * v_i. Special cases:
 *   no token yet       max = -inf, sum = 0. The next step's factor exp(-inf - max) is 0; where the next step has no
 *                      token either, exp(-inf + inf) would be NaN, so both places ask first.
 *   overflowed score   sum = NaN. It stays NaN through every later step and merge (0 * NaN is NaN), and finish sees it.
 *                      A score of -inf counts as overflowed too: its weight of 0 would be a guess.
 */
#ifndef KSORT_SOFTMAX_H
#define KSORT_SOFTMAX_H

#include <math.h>
#include <stdbool.h>

struct softmax_state {
    float max;
    float sum;
};

static inline struct softmax_state softmax_init(void)
{
    return (struct softmax_state){-INFINITY, 0.0f};
}

/* Joins `other` into `state`. The accumulators are to be joined as own * *own_factor + other * *other_factor. */
static inline void softmax_merge(struct softmax_state *state, struct softmax_state other, float *own_factor,
                                 float *other_factor)
{
    float max = fmaxf(state->max, other.max);
    *own_factor = state->max == max ? 1.0f : expf(state->max - max);
    *other_factor = other.max == max ? 1.0f : expf(other.max - max);
    state->sum = state->sum * *own_factor + other.sum * *other_factor;
    state->max = max;
}

/* The factor that turns an accumulator into the output. False if a score overflowed. */
static inline bool softmax_finish(struct softmax_state state, float *factor)
{
    *factor = 1.0f / state.sum;
    return state.sum > 0.0f && isfinite(state.sum);
}

#endif /* KSORT_SOFTMAX_H */
