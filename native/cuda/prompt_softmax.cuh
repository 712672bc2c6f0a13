/* Online softmax of the rows that a lane has in an accumulator (prompt_products.cuh): two rows, a quarter of the
 * columns each; the other columns of a row are in the other three lanes of its quad. See native/src/softmax.h for the
 * method.
 */
#ifndef KSORT_PROMPT_SOFTMAX_CUH
#define KSORT_PROMPT_SOFTMAX_CUH

#include "prompt_products.cuh"

constexpr int ROWS_A_LANE = 2;

/* Weights are 2^WEIGHT_TOP times exp(score - base). The base is a maximum of the row's that stays until a score is more
 * than BASE_SLACK (in log2) above it, as raising it rescales all sums. So weights stay within f16's 65504, and what
 * f16's subnormals lose of the second part of a weight is 2^-32 of the largest. The factor 2^WEIGHT_TOP leaves with the
 * division by the sum. */
constexpr float WEIGHT_TOP = 7.0f;
constexpr float BASE_SLACK = 8.0f;

struct row_softmax {
    float base; /* of scores in units of log2: -inf before the first */
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

/* Raises the bases where scores are too far above one of the warp's rows; false where none is. factors: what sums of
 * earlier tiles are then to be multiplied by. log2_scale, above 0, takes a score to units of log2. */
__device__ inline bool raise_bases(const float (&scores)[TILE / 8][4], row_softmax (&rows)[ROWS_A_LANE],
                                   float (&factors)[ROWS_A_LANE], float log2_scale)
{
    float largest[ROWS_A_LANE];
#pragma unroll
    for (int r = 0; r < ROWS_A_LANE; r++) {
        largest[r] = fmaxf(scores[0][2 * r], scores[0][2 * r + 1]);
#pragma unroll
        for (int n = 1; n < TILE / 8; n++)
            largest[r] = fmaxf(largest[r], fmaxf(scores[n][2 * r], scores[n][2 * r + 1]));
        largest[r] *= log2_scale;
    }
    if (!__any_sync(~0u, largest[0] > rows[0].base + BASE_SLACK || largest[1] > rows[1].base + BASE_SLACK))
        return false;
#pragma unroll
    for (int r = 0; r < ROWS_A_LANE; r++) {
        float base = fmaxf(rows[r].base, quad_max(largest[r]));
        /* A row that has seen nothing yet has -inf, and -inf + inf would be NaN. */
        factors[r] = base == -INFINITY ? 1.0f : exp2_approx(rows[r].base - base);
        rows[r].base = base;
        rows[r].sum *= factors[r];
    }
    return true;
}

/* Turns scores of 16 columns into weights. */
__device__ inline void soften_scores(float (&scores)[TILE / 8][4], const float (&shifts)[ROWS_A_LANE],
                                     float log2_scale, int step)
{
#pragma unroll
    for (int n = 2 * step; n < 2 * step + 2; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            scores[n][e] = exp2_approx(fmaf(scores[n][e], log2_scale, shifts[e / 2]));
}

/* Weights of 16 columns as left operands in f16, in parts whose sum they are: one part keeps 11 bits, two keep 22. */
template <int PARTS>
__device__ inline void split_weights(uint32_t (&p)[PARTS][KEY_STEPS][4], const float (&weights)[TILE / 8][4], int step)
{
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

/* Turns scores into weights in parts, and adds them to the sums. Exponentials of a step run while the step before is
 * split: their unit takes eight cycles for a warp. The warp's joins keep nvcc 13.0 from putting them all first. */
template <int PARTS>
__device__ inline void weigh_scores(uint32_t (&p)[PARTS][KEY_STEPS][4], float (&scores)[TILE / 8][4],
                                    row_softmax (&rows)[ROWS_A_LANE], float log2_scale)
{
    float shifts[ROWS_A_LANE], sums[ROWS_A_LANE][2] = {};
#pragma unroll
    for (int r = 0; r < ROWS_A_LANE; r++)
        shifts[r] = WEIGHT_TOP - (rows[r].base == -INFINITY ? 0.0f : rows[r].base);
    soften_scores(scores, shifts, log2_scale, 0);
#pragma unroll
    for (int step = 0; step < KEY_STEPS; step++) {
        if (step + 1 < KEY_STEPS)
            soften_scores(scores, shifts, log2_scale, step + 1);
#pragma unroll
        for (int n = 2 * step; n < 2 * step + 2; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                sums[e / 2][e % 2] += scores[n][e];
        split_weights<PARTS>(p, scores, step);
        __syncwarp();
    }
#pragma unroll
    for (int r = 0; r < ROWS_A_LANE; r++)
        rows[r].sum += sums[r][0] + sums[r][1];
}

#endif /* KSORT_PROMPT_SOFTMAX_CUH */
