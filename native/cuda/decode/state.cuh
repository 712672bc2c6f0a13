/* What a warp of decode attention keeps of its rows, how a chunk's scores are added to it, and how a block's warps are
 * joined into the partials of a split.
 */
#ifndef KSORT_CUDA_DECODE_STATE_CUH
#define KSORT_CUDA_DECODE_STATE_CUH

#include "common/dependent_launch.cuh"
#include "decode/keys.cuh"
#include "decode/values.cuh"
#include "decode/work.cuh"

/* Scores may exceed the maximum in use by this (units of log2) before sums are rescaled: weights up to 2^8 are as good
 * as weights up to 1, and after the first chunk nearly no chunk has to. */
constexpr float RISE = 8.0f;

/* Warps of a block, in shared memory after their last chunk. */
template <uint32_t HEAD_DIM, uint32_t WARPS>
struct joined_smem {
    softmax_part parts[WARPS][ROWS];
    float values[WARPS][ROWS][HEAD_DIM];
};

/* Softmax and sums of a warp: of row lane / 4; sum is of the lane's tokens alone. */
template <uint32_t N_PRODUCTS>
struct row_state {
    float max = -INFINITY;
    float sum = 0.0f;
    float values[N_PRODUCTS][4] = {};

    /* Raises the maximum where scores exceed it; lanes of a row agree on it. */
    __device__ void raise(const float (&scores)[8])
    {
        float largest = scores[0];
#pragma unroll
        for (int i = 1; i < 8; i++)
            largest = fmaxf(largest, scores[i]);
        if (!__any_sync(~0u, largest > max + RISE))
            return;
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
        largest = fmaxf(max, fmaxf(largest, __shfl_xor_sync(~0u, largest, 2)));
        const float rescale = exp2_approximate(max - largest);
        max = largest;
        sum *= rescale;
#pragma unroll
        for (uint32_t i = 0; i < N_PRODUCTS; i++)
#pragma unroll
            for (int c = 0; c < 4; c++)
                values[i][c] *= rescale;
    }
};

/* Slots outside the span: no weight, and values that are no NaN. */
template <typename VALUES>
__device__ inline void hide_slots(const attend_job &job, const slot_span &slots, uint32_t first_slot, uint32_t lane,
                                  uint8_t *v_smem, float (&scores)[8])
{
    const uint32_t slot = first_slot + lane;
    if (slot < slots.begin || slot >= slots.end)
        VALUES::clear_token(job.v.layout, v_smem, lane);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const uint32_t scored = first_slot + 8 * (lane % 4) + i;
        if (scored < slots.begin || scored >= slots.end)
            scores[i] = -INFINITY;
    }
    __syncwarp();
}

/* A warp's state into its place in shared memory. */
template <typename VALUES, uint32_t HEAD_DIM, uint32_t WARPS>
__device__ inline void store_state(row_state<VALUES::N_PRODUCTS> &state, uint32_t warp, uint32_t lane,
                                   joined_smem<HEAD_DIM, WARPS> &joined)
{
    const uint32_t row = lane / 4;
    state.sum += __shfl_xor_sync(~0u, state.sum, 1);
    state.sum += __shfl_xor_sync(~0u, state.sum, 2);
    if (lane % 4 == 0)
        joined.parts[warp][row] = {state.max, state.sum};
#pragma unroll
    for (uint32_t i = 0; i < VALUES::N_PRODUCTS; i++)
#pragma unroll
        for (uint32_t c = 0; c < 2; c++) {
            const uint32_t channel = VALUES::channel(i, 2 * (lane % 4) + c);
            if (channel < HEAD_DIM)
                joined.values[warp][row][channel] =
                    (state.values[i][c] + VALUES::LEFT_SCALE * state.values[i][c + 2]) * VALUES::OUT_SCALE;
        }
}

/* Joins the warps of a block into the split's partials. At least one warp had a chunk. */
template <uint32_t HEAD_DIM, uint32_t WARPS>
__device__ inline void write_partials(const attend_job &job, const decode_work &work,
                                      const joined_smem<HEAD_DIM, WARPS> &joined)
{
    constexpr uint32_t N_QUADS = HEAD_DIM / 4; /* four channels a thread */
    for (uint32_t at = threadIdx.x; at < work.n_rows * N_QUADS; at += blockDim.x) {
        const uint32_t row = at / N_QUADS, quad = at % N_QUADS;
        float max = -INFINITY, sum = 0.0f;
        float4 values = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (uint32_t warp = 0; warp < WARPS; warp++)
            max = fmaxf(max, joined.parts[warp][row].max);
#pragma unroll
        for (uint32_t warp = 0; warp < WARPS; warp++) {
            const float factor = exp2_approximate(joined.parts[warp][row].max - max);
            sum += factor * joined.parts[warp][row].sum;
            const float4 of_warp = reinterpret_cast<const float4 *>(joined.values[warp][row])[quad];
            values.x += factor * of_warp.x;
            values.y += factor * of_warp.y;
            values.z += factor * of_warp.z;
            values.w += factor * of_warp.w;
        }
        const uint32_t head = work.first_head + row;
        reinterpret_cast<float4 *>(part_values_of(job, work.context, head) + (size_t)work.split * HEAD_DIM)[quad] =
            values;
        if (quad == 0)
            parts_of(job, work.context, head)[work.split] = {max, sum};
    }
}

/* A chunk's scores: weights, values. first_slot: the chunk's; slots: those that count. */
template <typename VALUES>
__device__ inline void attend_scores(const attend_job &job, const slot_span &slots, uint32_t first_slot,
                                     uint32_t v_shift, uint32_t lane, uint8_t *v_smem, float (&scores)[8],
                                     row_state<VALUES::N_PRODUCTS> &state)
{
    if (first_slot < slots.begin || first_slot + CHUNK_TOKENS > slots.end)
        hide_slots<VALUES>(job, slots, first_slot, lane, v_smem, scores);
    state.raise(scores);
    float weights[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        weights[i] = exp2_approximate(scores[i] - state.max);
        state.sum += weights[i];
    }
    weight_fragments fragments;
    VALUES::weigh(weights, fragments);
    VALUES::accumulate(v_shift, v_smem, lane, fragments, state.values);
}

/* A split without a chunk, where its context has a new token. */
__device__ inline void write_empty_part(const attend_job &job, const decode_work &work)
{
    if (work.has_token && threadIdx.x < work.n_rows)
        parts_of(job, work.context, work.first_head + threadIdx.x)[work.split] = {-INFINITY, 0.0f};
}

#endif /* KSORT_CUDA_DECODE_STATE_CUH */
