/* Queries as attention multiplies them: without a transform as query/nearest.cuh has it, else, and with RoPE tables
 * that it does not take, as here. A warp takes the rows (query heads of one token) of a KV head one after another: they
 * share all tables, and each is loaded while the one before it is rounded. With few rows: one row.
 *
 *     warp      0        | 1         | ...     R = rows of a warp: the group, or 1
 *     rows      0 .. R-1 | R .. 2R-1 | ...     grid:  x = 8 warps of the rows of a context   y = context
 *
 *     q [row][head_dim] --RoPE, / scale, rotate, permute--> x: 32 lanes x HEAD_DIM / 32 registers
 *       --largest of a block--> exponents [row][blocks] u8 (not for a prompt)
 *       --nearest-------------> mantissas [row][query_stride] i8, or for a prompt values [row][head_dim] bf16
 *
 * Rows that are reported (not finite, or without a position in the RoPE tables) are prepared as zeros, so that
 * attention's outputs of them are finite. Bytes moved, a row: head_dim times 2 or 4 in, head_dim + 16 out; for a prompt
 * 2 head_dim.
 */
#ifndef KSORT_CUDA_QUERY_TRANSFORMED_CUH
#define KSORT_CUDA_QUERY_TRANSFORMED_CUH

#include "common/dependent_launch.cuh"
#include "common/encode.cuh"
#include "common/phases.cuh"

constexpr int QUERY_WARPS = 8; /* of a thread block */

template <int HEAD_DIM>
__device__ inline void load_query(const attend_job &job, size_t at, float (&x)[CHANNELS_A_LANE<HEAD_DIM>])
{
#pragma unroll
    for (int i = 0; i < CHANNELS_A_LANE<HEAD_DIM>; i++)
        x[i] = holds_channel<HEAD_DIM>(i) ? load_float(job.q, job.x_type, at + i * WARP + lane_of_thread()) : 0.0f;
}

template <int HEAD_DIM>
__device__ inline bool is_finite(const float (&x)[CHANNELS_A_LANE<HEAD_DIM>])
{
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < CHANNELS_A_LANE<HEAD_DIM>; i++)
        largest = larger_magnitude(largest, x[i]);
    return __all_sync(ALL_LANES, float_bits(largest) < FLOAT_MAGNITUDE_INF);
}

/* The nearest encoder of BFP16, in blocks of the keys' size. */
template <int HEAD_DIM>
__device__ void store_rounded(const attend_job &job, size_t row, const float (&x)[CHANNELS_A_LANE<HEAD_DIM>])
{
    constexpr uint32_t MANTISSA_BITS = 8;
    constexpr float LARGEST = 127.0f;
    constexpr int N = CHANNELS_A_LANE<HEAD_DIM>;
    const uint32_t lane = lane_of_thread(), block_size = job.k.layout.block_size;
    int8_t *mantissas = job.mantissas + row * job.query_stride;
    uint8_t *exponents = job.exponents + row * MAX_BLOCKS;
    uint32_t block_exponents[N];
    block_magnitudes<N>(x, block_size, block_exponents);
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (!holds_channel<HEAD_DIM>(i))
            continue;
        const uint32_t c = i * WARP + lane, exponent = block_exponents[i] >> 23;
        struct step_inverse inverse = step_inverse_of(exponent, MANTISSA_BITS);
        /* A block without an exponent (zeros and subnormals) has mantissas 0. */
        const float limit = exponent == 0 ? 0.0f : LARGEST;
        uint32_t bits = mantissa_bits_of(units_of_step(x[i], inverse), -limit, limit);
        if (job.values) {
            /* May be subnormal, and is exact. */
            const float unit = __fmul_rn(0x1p-6f, exponent_scale((uint8_t)exponent));
            job.values[row * HEAD_DIM + c] = __float2bfloat16_rn(__fmul_rn(mantissa_of(bits), unit));
            continue;
        }
        mantissas[c] = (int8_t)bits;
        if ((c & (block_size - 1)) == 0) /* a power of two, unknown to the compiler */
            exponents[c >> (__ffs(block_size) - 1)] = (uint8_t)exponent;
    }
    if (job.values)
        return;
    for (uint32_t c = HEAD_DIM + lane; c < job.query_stride; c += WARP)
        mantissas[c] = 0;
    if (lane < MAX_BLOCKS && lane >= job.k.layout.n_blocks)
        exponents[lane] = 0;
}

/* A row as it is before rounding, for exact rows. */
template <int HEAD_DIM>
__device__ inline void store_exact(float *row, const float (&x)[CHANNELS_A_LANE<HEAD_DIM>])
{
#pragma unroll
    for (int i = 0; i < CHANNELS_A_LANE<HEAD_DIM>; i++)
        if (holds_channel<HEAD_DIM>(i))
            row[i * WARP + lane_of_thread()] = x[i];
}

template <int HEAD_DIM>
__global__ void __launch_bounds__(QUERY_WARPS *WARP)
    prepare_kernel(const __grid_constant__ attend_job job, uint32_t rows_a_warp)
{
    let_dependent_begin(); /* decode asks for its first tiles meanwhile */
    __shared__ float scratch_of_warps[QUERY_WARPS][HEAD_DIM];
    float *scratch = scratch_of_warps[threadIdx.x / WARP];
    const uint32_t warp = blockIdx.x * QUERY_WARPS + threadIdx.x / WARP, warps_a_token = job.n_heads / rows_a_warp;
    const uint32_t context = blockIdx.y, token = warp / warps_a_token;
    const uint32_t first_head = warp % warps_a_token * rows_a_warp;
    if (token >= job.tokens.n_tokens)
        return;
    head_turns<HEAD_DIM> turns;
    transform_entries<HEAD_DIM> entries;
    float q[CHANNELS_A_LANE<HEAD_DIM>];
    const size_t first_q = context * job.q_context_stride + token * job.q_token_stride + (size_t)first_head * HEAD_DIM;
    load_query<HEAD_DIM>(job, first_q, q); /* of tokens that are not new as well: all loads are under way together */
    load_turns<HEAD_DIM>(job.rope, first_head / job.group, turns);
    load_transform<HEAD_DIM>(job.k_transform, first_head / job.group, entries);
    if (token >= n_new_of(job.tokens, context))
        return;
    const uint32_t position = (uint32_t)job.tokens.n_cached[context] + token;
    const bool has_position = !job.rope.partner || position < job.tokens.n_positions;
    head_cos_sin<HEAD_DIM> cos_sin;
    if (has_position)
        load_cos_sin<HEAD_DIM>(job.rope, position, turns, cos_sin);
    const size_t first_row = ((size_t)context * job.tokens.n_tokens + token) * job.n_heads + first_head;
    for (uint32_t r = 0; r < rows_a_warp; r++) {
        float x[CHANNELS_A_LANE<HEAD_DIM>];
#pragma unroll
        for (int i = 0; i < CHANNELS_A_LANE<HEAD_DIM>; i++)
            x[i] = q[i];
        if (r + 1 < rows_a_warp)
            load_query<HEAD_DIM>(job, first_q + (size_t)(r + 1) * HEAD_DIM, q);
        if (has_position) {
            rope_head<HEAD_DIM>(job.rope, turns, cos_sin, scratch, x);
            transform_query<HEAD_DIM>(job.k_transform, entries, scratch, x);
        }
        /* What was not finite has stayed so. */
        if (!has_position || !is_finite<HEAD_DIM>(x)) {
            if (lane_of_thread() == 0)
                report(job.tokens, has_position ? KSORT_ERR_NON_FINITE : KSORT_ERR_ROPE);
#pragma unroll
            for (int i = 0; i < CHANNELS_A_LANE<HEAD_DIM>; i++)
                x[i] = 0.0f;
        }
        if (job.exact_queries)
            store_exact<HEAD_DIM>(job.exact_queries + (first_row + r) * HEAD_DIM, x);
        store_rounded<HEAD_DIM>(job, first_row + r, x);
    }
}

#endif /* KSORT_CUDA_QUERY_TRANSFORMED_CUH */
