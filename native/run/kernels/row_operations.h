/* Row operations of a transformer block in registers of LANES values: RMSNorm and SwiGLU, one vector. Bytes moved: the row
 * in and out, twice in for RMSNorm, whose sum of squares comes first (4 sums, which hide the addition's latency).
 *
 * The including file includes a level's lanes_*.h.
 */
#ifndef KSORT_ROW_OPERATIONS_H
#define KSORT_ROW_OPERATIONS_H

#include <math.h>

#include "run_kernels.h"
#include "template/exp_constants.h"

#define SUMS 4

ALWAYS_INLINE lanes all_lanes(float x)
{
    return x - (lanes){0};
}

/* Values i .. i+LANES-1 of x, below n; scale * `added`, or NULL, is added to them first, and to x. */
ALWAYS_INLINE lanes load_sum(float *x, const float *added, lanes scale, uint32_t n, uint32_t i)
{
    lanes values = load_below(x, n, i);
    if (added) {
        values += scale * load_below(added, n, i);
        store_below(x, n, i, values);
    }
    return values;
}

ALWAYS_INLINE float sum_of_squares(float *x, const float *added, lanes scale, uint32_t n)
{
    lanes sums[SUMS] = {{0}};
    uint32_t i = 0;
    for (; n - i >= SUMS * LANES; i += SUMS * LANES)
        for (uint32_t k = 0; k < SUMS; k++) {
            lanes values = load_sum(x, added, scale, n, i + k * LANES);
            sums[k] = lanes_multiply_add(values, values, sums[k]);
        }
    for (; i < n; i += LANES) {
        lanes values = load_sum(x, added, scale, n, i);
        sums[0] = lanes_multiply_add(values, values, sums[0]);
    }
    lanes sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (uint32_t half = LANES / 2; half > 0; half /= 2)
        for (uint32_t lane = 0; lane < half; lane++)
            sum[lane] += sum[lane + half];
    return sum[0];
}

ALWAYS_INLINE void rms_norm_row(float *x, const float *added, float added_scale, const float *gain, uint32_t n,
                                float epsilon, float *y)
{
    const float sum = sum_of_squares(x, added, all_lanes(added_scale), n);
    const lanes factor = all_lanes(1.0f / sqrtf(sum / (float)n + epsilon));
    for (uint32_t i = 0; i < n; i += LANES)
        store_below(y, n, i, load_below(x, n, i) * factor * load_below(gain, n, i));
}

/* exp(x), x cut to +-87, where it is 1.6e-38 and 6e37. NaN becomes exp(87). */
ALWAYS_INLINE lanes exp_lanes(lanes x)
{
    x = lanes_max(lanes_min(x, all_lanes(87.0f)), all_lanes(-87.0f));
    lanes n = lanes_round(x * EXP_LOG2_E);
    lanes r = lanes_multiply_add(n, all_lanes(-EXP_LN2_LOW), lanes_multiply_add(n, all_lanes(-EXP_LN2_HIGH), x));
    lanes p = lanes_multiply_add(all_lanes(EXP_P4), r, all_lanes(EXP_P3));
    p = lanes_multiply_add(p, r, all_lanes(EXP_P2));
    p = lanes_multiply_add(p, r, all_lanes(EXP_P1));
    p = lanes_multiply_add(p, r, all_lanes(EXP_P0));
    p = lanes_multiply_add(p, r, all_lanes(1.0f));
    p = lanes_multiply_add(p, r, all_lanes(1.0f));
    return p * (lanes)((lanes_to_int(n) + 127) << 23);
}

ALWAYS_INLINE void swiglu_row(const float *gate, const float *up, uint32_t n, float *y)
{
    for (uint32_t i = 0; i < n; i += LANES) {
        lanes g = load_below(gate, n, i);
        store_below(y, n, i, g / (1.0f + exp_lanes(-g)) * load_below(up, n, i));
    }
}

#endif /* KSORT_ROW_OPERATIONS_H */
