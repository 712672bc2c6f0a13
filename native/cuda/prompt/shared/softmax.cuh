/* Online softmax of the rows that a lane has in an accumulator (prompt/shared/products.cuh): two rows, a quarter of the
 * columns each; the other columns of a row are in the other three lanes of its quad. The method is that of
 * libksort's softmax.h.
 */
#ifndef KSORT_CUDA_PROMPT_SHARED_SOFTMAX_CUH
#define KSORT_CUDA_PROMPT_SHARED_SOFTMAX_CUH

#include "prompt/shared/products.cuh"

#include <float.h>

constexpr int ROWS_A_LANE = 2;

/* Weights are 2^WEIGHT_TOP times exp(score - base). The base is a maximum of the row's that stays until weights exceed
 * LARGEST_SUM, as raising it rescales all sums: so weights stay within f16's range, and what f16's subnormals lose of
 * the second part of a weight is 2^-32 of the largest. The factor 2^WEIGHT_TOP leaves with the division by the sum. */
constexpr float WEIGHT_TOP = 7.0f;
constexpr float LARGEST_SUM = 32768.0f; /* of a lane's weights of a row and tile */

/* Rows that see at most so many slots are short. What errors of 11-bit weights reach, as a share of the bound of the
 * CPU library's tests (tests/native_support.py), 64 and 128 channels, the largest of random problems:
 *
 *     slots seen                          up to 31    63    127    255    511    1023    1600
 *     weight on many slots                      15   1.8    1.0    0.9    0.5     0.2     0.1
 *     on two, with values of +1 and -1         1.1   0.9    1.0    0.8    1.2     0.8     0.4
 */
constexpr uint32_t SHORT_SLOTS = 512;

struct row_softmax {
    float shift; /* WEIGHT_TOP less the base, in units of log2; NO_BASE before the first */
    float sum;   /* of this lane's weights */
};

/* Makes the weight of any score too large, and that of a masked one, -inf, 0. */
constexpr float NO_BASE = FLT_MAX;

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

/* Raises the bases of rows to their largest score. factors: what sums of earlier tiles are then to be multiplied by.
 * log2_scale, above 0, takes a score to units of log2. */
__device__ inline void raise_bases(const float (&scores)[TILE / 8][4], row_softmax (&rows)[ROWS_A_LANE],
                                   float (&factors)[ROWS_A_LANE], float log2_scale)
{
#pragma unroll
    for (int r = 0; r < ROWS_A_LANE; r++) {
        float largest = fmaxf(scores[0][2 * r], scores[0][2 * r + 1]);
#pragma unroll
        for (int n = 1; n < TILE / 8; n++)
            largest = fmaxf(largest, fmaxf(scores[n][2 * r], scores[n][2 * r + 1]));
        float shift = fminf(rows[r].shift, WEIGHT_TOP - quad_max(largest) * log2_scale);
        factors[r] = exp2_approx(shift - rows[r].shift);
        rows[r].shift = shift;
        rows[r].sum *= factors[r];
    }
}

/* Turns scores into weights; sums: those of the lane. False where weights may be more than f16 holds: looking at their
 * sums takes few instructions, the maximum of the scores would take one for each. */
__device__ inline bool find_weights(float (&scores)[TILE / 8][4], float (&sums)[ROWS_A_LANE],
                                    const row_softmax (&rows)[ROWS_A_LANE], float log2_scale)
{
    float parts[ROWS_A_LANE][2] = {};
#pragma unroll
    for (int n = 0; n < TILE / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            scores[n][e] = exp2_approx(fmaf(scores[n][e], log2_scale, rows[e / 2].shift));
            parts[e / 2][e % 2] += scores[n][e];
        }
#pragma unroll
    for (int r = 0; r < ROWS_A_LANE; r++)
        sums[r] = parts[r][0] + parts[r][1];
    return fmaxf(sums[0], sums[1]) <= LARGEST_SUM;
}

/* Weights as left operands in f16, in parts whose sum they are: one part keeps 11 bits, two keep 22. */
template <int PARTS>
__device__ inline void split_weights(uint32_t (&p)[PARTS][KEY_STEPS][4], const float (&weights)[TILE / 8][4])
{
#pragma unroll
    for (int step = 0; step < KEY_STEPS; step++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float x = weights[2 * step + i / 2][i % 2 * 2], y = weights[2 * step + i / 2][i % 2 * 2 + 1];
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                __half2 rounded = __floats2half2_rn(x, y);
                p[part][step][i] = as_bits(rounded);
                x -= __low2float(rounded);
                y -= __high2float(rounded);
            }
        }
}

#endif /* KSORT_CUDA_PROMPT_SHARED_SOFTMAX_CUH */
