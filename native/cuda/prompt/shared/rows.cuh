/* What a warp keeps of its 16 rows while it walks over tiles (weighted sums of values and softmax states, in the layout
 * of prompt/shared/products.cuh), and how finished rows leave.
 */
#ifndef KSORT_CUDA_PROMPT_SHARED_ROWS_CUH
#define KSORT_CUDA_PROMPT_SHARED_ROWS_CUH

#include "common/transform.cuh"
#include "prompt/shared/row_blocks.cuh"
#include "prompt/shared/softmax.cuh"

#include <type_traits>

constexpr float LOG2_E = 1.44269504f;

/* Scores times this are in units of log2; the sign is in the queries. 0 would make 0 * -inf of a masked score. */
__host__ __device__ inline float log2_scale_of(const attend_job &job)
{
    return fmaxf(fabsf(job.scale) * LOG2_E, FLT_MIN);
}

/* Where a row of the block is among prepared queries, and what else has their order. */
__device__ inline size_t prepared_row(const attend_job &job, const row_block &block, uint32_t row)
{
    size_t token = (size_t)block.context * job.tokens.n_tokens + row / job.group;
    return token * job.n_heads + block.kv_head * job.group + row % job.group;
}

/* Of values, before the first tile. */
__device__ inline int first_top(const attend_job &job)
{
    return job.v.layout.type == KSORT_F16 ? UNIT_TOP : job.exact_rows ? FIRST_EXACT_TOP : FIRST_TOP;
}

/* What a lane keeps of its two rows. */
template <int HEAD_DIM>
struct lane_rows {
    float out[HEAD_DIM / 8][4];
    row_softmax softmax[ROWS_A_LANE];
    int top; /* of values: out is scaled by it */

    __device__ void init(const attend_job &job)
    {
        top = first_top(job);
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                out[n][e] = 0.0f;
#pragma unroll
        for (int r = 0; r < ROWS_A_LANE; r++)
            softmax[r] = {NO_BASE, 0.0f};
    }

    /* What exact rows have added, where there are any; after init. first_row: the warp's first, in the block. From L2:
     * as queries of prompt/wgmma/kernel.cuh. */
    __device__ void load_exact(const attend_job &job, const row_block &block, uint32_t first_row)
    {
        if (!job.exact_rows)
            return;
        float unit = exponent_scale((uint8_t)(127 + UNIT_TOP - top));
#pragma unroll
        for (int r = 0; r < ROWS_A_LANE; r++) {
            uint32_t row = min(block.begin + first_row + threadIdx.x % WARP / 4 + 8 * r, block.end - 1);
            size_t at = prepared_row(job, block, row);
            const float2 *sums = (const float2 *)(job.exact_queries + at * HEAD_DIM) + threadIdx.x % 4;
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; n++) {
                float2 pair = __ldcg(sums + 4 * n);
                out[n][2 * r] = pair.x * unit, out[n][2 * r + 1] = pair.y * unit;
            }
            float2 state = __ldcg((const float2 *)(job.exact_rows + at));
            softmax[r] = {state.x, threadIdx.x % 4 == 0 ? state.y : 0.0f};
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

    /* Scores of a packed tile that a row does not see as packed. first_row: the warp's first, in the block. */
    __device__ static void mask(float (&scores)[TILE / 8][4], const attend_job &job, const row_block &block,
                                uint32_t first_row, uint32_t tile)
    {
        int begin = tile * TILE;
        if (begin >= (int)block.whole_begin && begin + TILE <= (int)block.whole_end)
            return;
        row_view views[ROWS_A_LANE];
#pragma unroll
        for (int r = 0; r < ROWS_A_LANE; r++) {
            uint32_t row = block.begin + first_row + threadIdx.x % WARP / 4 + 8 * r;
            slot_sections slots = sections_of_token(job, block, slot_of_row(job, block, min(row, block.end - 1)));
            views[r] = {(int)slots.sinks_end - begin, (int)slots.tail_begin - 1 - begin};
        }
        mask_scores(scores, views);
    }

    /* Weights of a tile as left operands, in parts; sums get theirs. find_scores(x) makes x the tile's scores, masked.
     * Bases are raised at the first tile (is_first), and where weights turn out too large: then all partners begin again
     * with the scores, which have become weights. */
    template <int PARTS, typename FIND_SCORES>
    __device__ void weigh_tile(uint32_t (&p)[PARTS][KEY_STEPS][4], bool is_first, float log2_scale,
                               FIND_SCORES find_scores)
    {
        float x[TILE / 8][4], sums[ROWS_A_LANE];
        bool raises = is_first, fit;
        do {
            find_scores(x);
            if (raises) {
                float factors[ROWS_A_LANE];
                raise_bases(x, softmax, factors, log2_scale);
                rescale(factors);
            }
            fit = find_weights(x, sums, softmax, log2_scale) || raises;
            raises = any_of_partners(!fit);
        } while (raises);
#pragma unroll
        for (int r = 0; r < ROWS_A_LANE; r++)
            softmax[r].sum += sums[r];
        split_weights<PARTS>(p, x);
    }
};

/* Two neighbouring channels of a row. */
template <typename T>
__device__ inline void store_pair(void *out, size_t place, float x, float y)
{
    T *pair = (T *)out + place;
    if constexpr (sizeof(T) == sizeof(float))
        __stcg((float2 *)pair, make_float2(x, y)); /* always one store: an assignment may become two */
    else if constexpr (std::is_same_v<T, __half>)
        *(__half2 *)pair = __floats2half2_rn(x, y);
    else
        *(__nv_bfloat162 *)pair = __floats2bfloat162_rn(x, y);
}

/* Element of `out` at which a row of the block's context begins. */
template <int HEAD_DIM>
__device__ inline size_t place_of_row(const attend_job &job, const row_block &block, uint32_t row)
{
    return block.context * job.out_context_stride + row / job.group * job.out_token_stride +
           (block.kv_head * job.group + row % job.group) * HEAD_DIM;
}

/* Values with a transform are restored by whole rows: four at a time pass through shared memory (the warp's own
 * staged_row_bytes). Rows are 8 floats further apart than long, for the banks. */
constexpr int STAGED_ROWS = 4;

template <int HEAD_DIM>
constexpr int STAGED_ROW_FLOATS = HEAD_DIM + 8;

template <int HEAD_DIM>
constexpr int staged_row_bytes = STAGED_ROWS * STAGED_ROW_FLOATS<HEAD_DIM> * sizeof(float);

template <int HEAD_DIM>
__device__ inline void restore_row(const attend_job &job, const row_block &block, uint32_t row, float *row_smem)
{
    uint32_t lane = threadIdx.x % WARP;
    float x[CHANNELS_A_LANE<HEAD_DIM>];
#pragma unroll
    for (int j = 0; j < CHANNELS_A_LANE<HEAD_DIM>; j++) {
        uint32_t channel = WARP * j + lane;
        x[j] = channel < HEAD_DIM ? row_smem[channel] : 0.0f;
    }
    __syncwarp(); /* from here on the row is the transform's scratch */
    restore_value<HEAD_DIM>(job.v_transform, block.kv_head, row_smem, x);
    size_t place = place_of_row<HEAD_DIM>(job, block, row);
#pragma unroll
    for (int j = 0; j < CHANNELS_A_LANE<HEAD_DIM>; j++)
        if (WARP * j + lane < HEAD_DIM)
            store_float(job.out, job.x_type, place + WARP * j + lane, x[j]);
}

/* The rows of one half of the lanes' (rows.out[..][2 * half]), by factor and unit. */
template <int HEAD_DIM>
__device__ inline void restore_rows(const lane_rows<HEAD_DIM> &rows, int half, float factor, float unit,
                                    const attend_job &job, const row_block &block, uint32_t first_row,
                                    float *staged_smem)
{
    uint32_t lane = threadIdx.x % WARP;
    for (uint32_t step = 0; step < 8 / STAGED_ROWS; step++) {
        if (lane / 4 / STAGED_ROWS == step)
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; n++) {
                float2 pair = {rows.out[n][2 * half] * factor * unit, rows.out[n][2 * half + 1] * factor * unit};
                *(float2 *)(staged_smem + lane / 4 % STAGED_ROWS * STAGED_ROW_FLOATS<HEAD_DIM> + 8 * n + lane % 4 * 2) =
                    pair;
            }
        __syncwarp();
        for (uint32_t i = 0; i < STAGED_ROWS; i++) {
            uint32_t row = block.begin + first_row + 8 * half + step * STAGED_ROWS + i;
            if (row < block.end)
                restore_row<HEAD_DIM>(job, block, row, staged_smem + i * STAGED_ROW_FLOATS<HEAD_DIM>);
        }
        __syncwarp();
    }
}

/* Straight from registers: a lane has two neighbouring channels of a row. */
template <int HEAD_DIM, typename T>
__device__ inline void store_row_parts(const lane_rows<HEAD_DIM> &rows, int half, float factor, float unit, void *out,
                                       size_t place)
{
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; n++)
        store_pair<T>(out, place + 8 * n, rows.out[n][2 * half] * factor * unit,
                      rows.out[n][2 * half + 1] * factor * unit);
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
        uint32_t row = block.begin + first_row + lane / 4 + 8 * r;
        if (job.has_v_transform) {
            restore_rows(rows, r, factor, unit, job, block, first_row, staged_smem);
        } else if (row < block.end) {
            size_t place = place_of_row<HEAD_DIM>(job, block, row) + lane % 4 * 2;
            if (job.x_type == KSORT_F16)
                store_row_parts<HEAD_DIM, __half>(rows, r, factor, unit, job.out, place);
            else if (job.x_type == KSORT_BF16)
                store_row_parts<HEAD_DIM, __nv_bfloat16>(rows, r, factor, unit, job.out, place);
            else
                store_row_parts<HEAD_DIM, float>(rows, r, factor, unit, job.out, place);
        }
    }
}

#endif /* KSORT_CUDA_PROMPT_SHARED_ROWS_CUH */
