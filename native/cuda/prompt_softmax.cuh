/* Online softmax of the rows that a lane has in an accumulator (prompt_products.cuh): two rows, a quarter of the
 * columns each; the other columns of a row are in the other three lanes of its quad. See native/src/softmax.h for the
 * method.
 */
#ifndef KSORT_PROMPT_SOFTMAX_CUH
#define KSORT_PROMPT_SOFTMAX_CUH

#include "prompt_products.cuh"

constexpr int ROWS_A_LANE = 2;

/* Weights are 2^WEIGHT_TOP times exp(score - max): far from where f16 becomes subnormal, so that parts of them keep
 * their bits, and within f16's 65504. The factor leaves with the division by the sum. */
constexpr float WEIGHT_TOP = 15.0f;

struct row_softmax {
    float max;  /* of scores in units of log2: -inf before the first */
    float sum;  /* of this lane's weights */
};

/* Slots that a row sees of a tile: columns first .. last of it, which may lie outside. */
struct row_view {
    int first, last;
};

__device__ inline float exp2_approx(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline float quad_max(float x)
{
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ inline float quad_sum(float x)
{
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

/* Scores of slots that a row does not see become -inf, whatever they are. */
__device__ inline void mask_scores(float (&scores)[TILE / 8][4], const row_view (&views)[ROWS_A_LANE])
{
    int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < TILE / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int place = 8 * n + column + e % 2;
            if (place < views[e / 2].first || place > views[e / 2].last)
                scores[n][e] = -INFINITY;
        }
}

/* Turns scores into weights and joins them to the state. factors: what sums of earlier tiles are to be multiplied by.
 * log2_scale, above 0, takes a score to units of log2. */
__device__ inline void soften_scores(float (&scores)[TILE / 8][4], row_softmax (&rows)[ROWS_A_LANE],
                                     float (&factors)[ROWS_A_LANE], float log2_scale)
{
#pragma unroll
    for (int r = 0; r < ROWS_A_LANE; r++) {
        float largest = fmaxf(scores[0][2 * r], scores[0][2 * r + 1]);
#pragma unroll
        for (int n = 1; n < TILE / 8; n++)
            largest = fmaxf(largest, fmaxf(scores[n][2 * r], scores[n][2 * r + 1]));
        float max = fmaxf(rows[r].max, quad_max(largest) * log2_scale);
        /* A row that has seen nothing yet has -inf, and -inf + inf would be NaN. */
        float base = max == -INFINITY ? 0.0f : max;
        factors[r] = exp2_approx(rows[r].max - base);
        rows[r].max = max;
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
#pragma unroll
            for (int e = 2 * r; e < 2 * r + 2; e++) {
                scores[n][e] = exp2_approx(fmaf(scores[n][e], log2_scale, WEIGHT_TOP - base));
                sum += scores[n][e];
            }
        rows[r].sum = rows[r].sum * factors[r] + sum;
    }
}

/* Weights as left operands in f16, in parts whose sum they are: one part keeps 11 bits, two keep 22. */
template <int PARTS>
__device__ inline void split_weights(uint32_t (&p)[PARTS][KEY_STEPS][4], const float (&weights)[TILE / 8][4])
{
#pragma unroll
    for (int k = 0; k < KEY_STEPS; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float x = weights[2 * k + i / 2][i % 2 * 2], y = weights[2 * k + i / 2][i % 2 * 2 + 1];
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                __half2 rounded = __floats2half2_rn(x, y);
                p[part][k][i] = as_bits(rounded);
                x -= __low2float(rounded);
                y -= __high2float(rounded);
            }
        }
}

#endif /* KSORT_PROMPT_SOFTMAX_CUH */
