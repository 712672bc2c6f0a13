/* Transformed heads on their way from x to what is rounded: RoPE, shift, scale, rotate, by one warp in
 * common/transform.cuh's layout; and rows of the feedback matrix in shared memory.
 */
#ifndef KSORT_CUDA_PACK_HEADS_CUH
#define KSORT_CUDA_PACK_HEADS_CUH

#include <cuda_pipeline.h>

#include "common/shared_loads.cuh"
#include "pack/scales.cuh"
#include "pack/work.cuh"

/* One KV head's tables, and what a lane has of them. */
template <int HEAD_DIM, uint32_t X_TYPE>
struct head_maker {
    static constexpr int N = CHANNELS_A_LANE<HEAD_DIM>;

    const pack_work &work;
    const pack_side &side;
    head_turns<HEAD_DIM> turns;
    float shift[N], scale[N];

    __device__ head_maker(const pack_work &work, const pack_side &side, uint32_t kv_head) : work(work), side(side)
    {
        if (side.has_rope)
            load_turns<HEAD_DIM>(work.rope, kv_head, turns);
#pragma unroll
        for (int i = 0; i < N; i++)
            shift[i] = 0.0f, scale[i] = 1.0f;
        load_entries<HEAD_DIM>(side.transform.shift, kv_head, shift);
        load_entries<HEAD_DIM>(side.transform.scale, kv_head, scale);
    }

    /* A lane's values of a head of x; zeros where it is not wanted. */
    __device__ void load(size_t at, bool wanted, float (&x)[N]) const
    {
#pragma unroll
        for (int i = 0; i < N; i++)
            x[i] = wanted && holds_channel<HEAD_DIM>(i) ? load_float(side.x, X_TYPE, at + i * WARP + lane_of_thread())
                                                        : 0.0f;
    }

    /* Heads of x become what is to be rounded, but for the permutation. Returns a bit for each head that may be stored;
     * the others are reported where they are wanted. exchange(x, partners): partners[t][i] is x[t] of channel
     * turns.partner[i]. */
    template <int TOKENS, class Exchange>
    __device__ uint32_t make_heads(const uint32_t (&positions)[TOKENS], const bool (&wanted)[TOKENS],
                                   float (&x)[TOKENS][N], Exchange exchange) const
    {
        uint32_t before[TOKENS], stored = 0;
#pragma unroll
        for (int t = 0; t < TOKENS; t++)
            before[t] = largest_of(x[t]);
        if (side.has_rope)
            turn<TOKENS>(positions, wanted, x, exchange);
#pragma unroll
        for (int t = 0; t < TOKENS; t++)
#pragma unroll
            for (int i = 0; i < N; i++)
                x[t][i] = holds_channel<HEAD_DIM>(i) ? __fmul_rn(__fsub_rn(x[t][i], shift[i]), scale[i]) : 0.0f;
        if (side.transform.rotate)
#pragma unroll
            for (int t = 0; t < TOKENS; t++)
                rotate_head<HEAD_DIM>(x[t]);
#pragma unroll
        for (int t = 0; t < TOKENS; t++)
            stored |= may_store(work, side, wanted[t], before[t], largest_of(x[t]), ALL_LANES) ? 1u << t : 0;
        return stored;
    }

  private:
    /* RoPE of heads at their positions, where they are wanted. */
    template <int TOKENS, class Exchange>
    __device__ void turn(const uint32_t (&positions)[TOKENS], const bool (&wanted)[TOKENS], float (&x)[TOKENS][N],
                         Exchange exchange) const
    {
        head_cos_sin<HEAD_DIM> cos_sin[TOKENS];
#pragma unroll
        for (int t = 0; t < TOKENS; t++) /* row 0 stands for what may not exist */
            load_cos_sin<HEAD_DIM>(work.rope, wanted[t] ? positions[t] : 0, turns, cos_sin[t]);
        float partners[TOKENS][N];
        exchange(x, partners);
#pragma unroll
        for (int t = 0; t < TOKENS; t++)
#pragma unroll
            for (int i = 0; i < N; i++)
                x[t][i] =
                    __fadd_rn(__fmul_rn(x[t][i], cos_sin[t].cosine[i]), __fmul_rn(partners[t][i], cos_sin[t].sine[i]));
    }

    __device__ static uint32_t largest_of(const float (&x)[N])
    {
        float largest = fabsf(x[0]);
#pragma unroll
        for (int i = 1; i < N; i++)
            largest = larger_magnitude(largest, x[i]);
        return float_bits(largest);
    }
};

/* Four floats of shared memory, aligned as many. */
__device__ inline void load_floats(const float *from, float (&to)[4])
{
    const float4 values = *reinterpret_cast<const float4 *>(from);
    to[0] = values.x, to[1] = values.y, to[2] = values.z, to[3] = values.w;
}

__device__ inline void store_floats(float *to, float a, float b, float c, float d)
{
    *reinterpret_cast<float4 *>(to) = make_float4(a, b, c, d);
}

/* Asks for n floats of the feedback matrix, a multiple of 4, which `from` may not be aligned to. */
__device__ inline void request_floats(float *to, const float *from, int n)
{
    if (reinterpret_cast<uintptr_t>(from) % sizeof(float4) == 0) {
        for (int i = 0; i < n; i += 4)
            __pipeline_memcpy_async(to + i, from + i, sizeof(float4));
        return;
    }
    for (int i = 0; i < n; i++)
        __pipeline_memcpy_async(to + i, from + i, sizeof(float));
}

/* Rows of the feedback matrix [HEAD_DIM][HEAD_DIM] in shared memory, in panels of a unit's: all of them, or STAGES. */
template <int HEAD_DIM, int STAGES>
struct feedback_panels {
    static constexpr int PANELS = HEAD_DIM / UNIT_CHANNELS;
    alignas(16) float rows[STAGES][UNIT_CHANNELS][HEAD_DIM];

    /* Asks for a panel from its own channels on, or nothing past the last one. */
    template <int THREADS>
    __device__ void request(const float *feedback, int panel)
    {
        constexpr int LANES = THREADS / UNIT_CHANNELS; /* of a row */
        const int row = threadIdx.x / LANES, at = panel * UNIT_CHANNELS + row;
        if (panel < PANELS)
            for (int column = panel * UNIT_CHANNELS + threadIdx.x % LANES * 4; column < HEAD_DIM; column += LANES * 4)
                request_floats(&rows[panel % STAGES][row][column], feedback + (size_t)at * HEAD_DIM + column, 4);
        __pipeline_commit();
    }

    __device__ const float (&panel(int panel) const)[UNIT_CHANNELS][HEAD_DIM] { return rows[panel % STAGES]; }
};

#endif /* KSORT_CUDA_PACK_HEADS_CUH */
