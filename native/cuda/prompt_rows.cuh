/* What a warp keeps of its 16 rows while it walks over tiles (weighted sums of values and softmax states, in the layout
 * of prompt_products.cuh), and how finished rows leave.
 */
#ifndef KSORT_PROMPT_ROWS_CUH
#define KSORT_PROMPT_ROWS_CUH

#include "prompt_pipeline.cuh"
#include "prompt_softmax.cuh"
#include "transform.cuh"

#include <float.h>

constexpr float LOG2_E = 1.44269504f;

/* Scores times this are in units of log2; the sign is in the queries. 0 would make 0 * -inf of a masked score. */
__device__ inline float log2_scale_of(const attend_job &job)
{
    return fmaxf(fabsf(job.scale) * LOG2_E, FLT_MIN);
}

/* What a lane keeps of its two rows. */
template <int HEAD_DIM>
struct lane_rows {
    float out[HEAD_DIM / 8][4];
    row_softmax softmax[ROWS_A_LANE];
    int top;                        /* of values: out is scaled by it */
    uint32_t slots[ROWS_A_LANE];    /* the rows' own */

    /* first_row: the warp's first, in the block. */
    __device__ void init(const attend_job &job, const row_block &block, uint32_t first_row)
    {
        top = job.v.layout.type == KSORT_F16 ? UNIT_TOP : FIRST_TOP;
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                out[n][e] = 0.0f;
#pragma unroll
        for (int r = 0; r < ROWS_A_LANE; r++) {
            uint32_t row = block.begin + first_row + threadIdx.x % WARP / 4 + 8 * r;
            slots[r] = block.n_cached + min(row, block.end - 1) / job.group;
            softmax[r] = {-INFINITY, 0.0f};
        }
    }

    __device__ void rescale(const float (&factors)[ROWS_A_LANE])
    {
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                out[n][e] *= factors[e / 2];
    }

    /* new_top is never less than the one before. */
    __device__ void raise_top(int new_top)
    {
        if (new_top == top)
            return;
        float factor = exponent_scale((uint8_t)max(0, 127 + top - new_top));
        rescale({factor, factor});
        top = new_top;
    }

    /* Scores of a tile that not all rows of the block see as a whole. */
    __device__ void mask(float (&scores)[TILE / 8][4], const row_block &block, uint32_t tile, uint32_t window) const
    {
        int begin = tile * TILE;
        if (begin >= (int)block.whole_begin && begin + TILE <= (int)block.whole_end)
            return;
        row_view views[ROWS_A_LANE];
#pragma unroll
        for (int r = 0; r < ROWS_A_LANE; r++)
            views[r] = {(int)first_seen(slots[r], window) - begin, (int)slots[r] - begin};
        mask_scores(scores, views);
    }
};

/* Finished rows: eight at a time through shared memory (the warp's own staged_row_bytes), so that a warp has a whole
 * row, restored and stored. Rows are 8 floats further apart than long, for the banks. */
constexpr int STAGED_ROWS = 8;

template <int HEAD_DIM>
constexpr int STAGED_ROW_FLOATS = HEAD_DIM + 8;

template <int HEAD_DIM>
constexpr int staged_row_bytes = STAGED_ROWS * STAGED_ROW_FLOATS<HEAD_DIM> * sizeof(float);

template <int HEAD_DIM>
__device__ inline void store_row(const attend_job &job, const row_block &block, uint32_t row, float *row_smem)
{
    uint32_t lane = threadIdx.x % WARP;
    float x[CHANNELS_A_LANE<HEAD_DIM>];
#pragma unroll
    for (int j = 0; j < CHANNELS_A_LANE<HEAD_DIM>; j++) {
        uint32_t channel = WARP * j + lane;
        x[j] = channel < HEAD_DIM ? row_smem[channel] : 0.0f;
    }
    if (job.has_v_transform) {
        __syncwarp(); /* from here on the row is the transform's scratch */
        restore_value<HEAD_DIM>(job.v_transform, block.kv_head, row_smem, x);
    }
    size_t place = block.sequence * job.out_sequence_stride + row / job.group * job.out_token_stride +
                   (block.kv_head * job.group + row % job.group) * HEAD_DIM;
#pragma unroll
    for (int j = 0; j < CHANNELS_A_LANE<HEAD_DIM>; j++)
        if (WARP * j + lane < HEAD_DIM)
            store_float(job.out, job.x_type, place + WARP * j + lane, x[j]);
}

template <int HEAD_DIM>
__device__ inline void store_rows(const lane_rows<HEAD_DIM> &rows, const attend_job &job, const row_block &block,
                                  uint32_t first_row, float *staged_smem)
{
    uint32_t lane = threadIdx.x % WARP;
    float unit = exponent_scale((uint8_t)(rows.top + 127 - UNIT_TOP));
#pragma unroll
    for (int r = 0; r < ROWS_A_LANE; r++) {
        float factor = 1.0f / quad_sum(rows.softmax[r].sum);
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n++) {
            float2 pair = {rows.out[n][2 * r] * factor * unit, rows.out[n][2 * r + 1] * factor * unit};
            *(float2 *)(staged_smem + lane / 4 * STAGED_ROW_FLOATS<HEAD_DIM> + 8 * n + lane % 4 * 2) = pair;
        }
        __syncwarp();
        for (uint32_t i = 0; i < STAGED_ROWS; i++) {
            uint32_t row = block.begin + first_row + STAGED_ROWS * r + i;
            if (row < block.end)
                store_row<HEAD_DIM>(job, block, row, staged_smem + i * STAGED_ROW_FLOATS<HEAD_DIM>);
        }
        __syncwarp();
    }
}

#endif /* KSORT_PROMPT_ROWS_CUH */
