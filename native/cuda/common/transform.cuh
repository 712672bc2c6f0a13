/* RoPE and a plan's transforms of one head by one warp, with the operations of FORMAT.md section 3, each rounded on its
 * own, so that packed bytes are those of every CPU level. A head's channel c = WARP * i + lane is register x[i];
 * registers from head_dim on hold 0. `scratch` is the warp's own shared memory, HEAD_DIM floats.
 *
 * Products and sums are intrinsics, which the compiler never fuses, whatever a file is compiled with. All 32 lanes call
 * these together. Bytes moved, a head: 9 HEAD_DIM of RoPE tables, 10 HEAD_DIM of transform tables, from L1 or L2.
 */
#ifndef KSORT_CUDA_COMMON_TRANSFORM_CUH
#define KSORT_CUDA_COMMON_TRANSFORM_CUH

#include "common/device.cuh"

constexpr uint32_t ALL_LANES = 0xFFFFFFFFu;

__device__ inline uint32_t lane_of_thread()
{
    return threadIdx.x % WARP;
}

/* Whether register i of this lane is a channel of the head: false in the last register of head_dim 80. */
template <int HEAD_DIM>
__device__ inline bool holds_channel(int i)
{
    return HEAD_DIM % WARP == 0 || i * WARP + lane_of_thread() < HEAD_DIM;
}

/* A lane's entries of KV head kv_head in table [n_kv_heads][head_dim]; nothing without a table. */
template <int HEAD_DIM, class T, class U>
__device__ inline void load_entries(const T *table, uint32_t kv_head, U (&entries)[CHANNELS_A_LANE<HEAD_DIM>])
{
    if (!table)
        return;
#pragma unroll
    for (int i = 0; i < CHANNELS_A_LANE<HEAD_DIM>; i++)
        if (holds_channel<HEAD_DIM>(i))
            entries[i] = table[(size_t)kv_head * HEAD_DIM + i * WARP + lane_of_thread()];
}

/* y[c] = x[from[c]], through scratch; `from` holds channels below head_dim. */
template <int HEAD_DIM>
__device__ inline void gather_channels(const uint32_t (&from)[CHANNELS_A_LANE<HEAD_DIM>], float *scratch,
                                       const float (&x)[CHANNELS_A_LANE<HEAD_DIM>],
                                       float (&y)[CHANNELS_A_LANE<HEAD_DIM>])
{
    const uint32_t lane = lane_of_thread();
    __syncwarp(); /* what was read from scratch before has arrived */
#pragma unroll
    for (int i = 0; i < CHANNELS_A_LANE<HEAD_DIM>; i++)
        if (holds_channel<HEAD_DIM>(i))
            scratch[i * WARP + lane] = x[i];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < CHANNELS_A_LANE<HEAD_DIM>; i++)
        y[i] = holds_channel<HEAD_DIM>(i) ? scratch[from[i]] : 0.0f;
}

/* The inverse of gather_channels: y[to[c]] = x[c] for a permutation `to`. In place. */
template <int HEAD_DIM>
__device__ inline void scatter_channels(const uint16_t *to, float *scratch, float (&x)[CHANNELS_A_LANE<HEAD_DIM>])
{
    const uint32_t lane = lane_of_thread();
    __syncwarp();
#pragma unroll
    for (int i = 0; i < CHANNELS_A_LANE<HEAD_DIM>; i++)
        if (holds_channel<HEAD_DIM>(i))
            scratch[to[i * WARP + lane]] = x[i];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < CHANNELS_A_LANE<HEAD_DIM>; i++)
        if (holds_channel<HEAD_DIM>(i))
            x[i] = scratch[i * WARP + lane];
}

/* RoPE of one KV head: partner and signed frequency of a lane's channels. They don't depend on the position. */
template <int HEAD_DIM>
struct head_turns {
    uint32_t partner[CHANNELS_A_LANE<HEAD_DIM>];
    uint32_t frequency[CHANNELS_A_LANE<HEAD_DIM>];
    int sign[CHANNELS_A_LANE<HEAD_DIM>];
};

/* cos, and sin with the partner's sign, of a lane's channels at one position: 1 and 0 of channels that are not turned,
 * whose partners are themselves: turning gives them back. */
template <int HEAD_DIM>
struct head_cos_sin {
    float cosine[CHANNELS_A_LANE<HEAD_DIM>];
    float sine[CHANNELS_A_LANE<HEAD_DIM>];
};

/* Nothing without a rope (partner NULL), as all of these. */
template <int HEAD_DIM>
__device__ inline void load_turns(const ksort_rope &rope, uint32_t kv_head, head_turns<HEAD_DIM> &turns)
{
    if (!rope.partner)
        return;
#pragma unroll
    for (int i = 0; i < CHANNELS_A_LANE<HEAD_DIM>; i++)
        turns.partner[i] = turns.frequency[i] = 0, turns.sign[i] = 0;
    load_entries<HEAD_DIM>(rope.partner, kv_head, turns.partner);
    load_entries<HEAD_DIM>(rope.frequency, kv_head, turns.frequency);
    load_entries<HEAD_DIM>(rope.sign, kv_head, turns.sign);
#pragma unroll
    for (int i = 0; i < CHANNELS_A_LANE<HEAD_DIM>; i++) {
        turns.partner[i] = turns.sign[i] == 0 ? i * WARP + lane_of_thread() : turns.partner[i];
        turns.frequency[i] = turns.sign[i] == 0 ? 0 : turns.frequency[i]; /* the table's may be anything */
    }
}

template <int HEAD_DIM>
__device__ inline void load_cos_sin(const ksort_rope &rope, uint32_t position, const head_turns<HEAD_DIM> &turns,
                                    head_cos_sin<HEAD_DIM> &cos_sin)
{
    if (!rope.partner)
        return;
    const float *cosines = rope.cos + (size_t)position * rope.n_frequencies;
    const float *sines = rope.sin + (size_t)position * rope.n_frequencies;
#pragma unroll
    for (int i = 0; i < CHANNELS_A_LANE<HEAD_DIM>; i++) {
        const float cosine = cosines[turns.frequency[i]], sine = sines[turns.frequency[i]];
        cos_sin.cosine[i] = turns.sign[i] == 0 ? 1.0f : cosine;
        cos_sin.sine[i] = turns.sign[i] == 0 ? 0.0f : turns.sign[i] < 0 ? -sine : sine;
    }
}

/* x becomes RoPE(x) at the position of `cos_sin`. */
template <int HEAD_DIM>
__device__ inline void rope_head(const ksort_rope &rope, const head_turns<HEAD_DIM> &turns,
                                 const head_cos_sin<HEAD_DIM> &cos_sin, float *scratch,
                                 float (&x)[CHANNELS_A_LANE<HEAD_DIM>])
{
    if (!rope.partner)
        return;
    float partners[CHANNELS_A_LANE<HEAD_DIM>];
    gather_channels<HEAD_DIM>(turns.partner, scratch, x, partners);
#pragma unroll
    for (int i = 0; i < CHANNELS_A_LANE<HEAD_DIM>; i++)
        x[i] = __fadd_rn(__fmul_rn(x[i], cos_sin.cosine[i]), __fmul_rn(partners[i], cos_sin.sine[i]));
}

/* Channels of the rotation's segment that register i belongs to: 64 and 16 or 32 for head_dim 80 and 96. */
template <int HEAD_DIM>
__device__ constexpr int segment_of_register(int i)
{
    if (HEAD_DIM != 80 && HEAD_DIM != 96)
        return HEAD_DIM;
    return i < 2 ? 64 : HEAD_DIM - 64;
}

/* float32(n^-1/2) for a power of two; rounding.h's rotation_factor as a constant. */
__device__ constexpr float rotation_factor_of(int n)
{
    return n == 16    ? 0.25f
           : n == 32  ? 0.17677669529663687f
           : n == 64  ? 0.125f
           : n == 128 ? 0.08838834764831845f
                      : 0.0625f;
}

/* x = W x. Strides below WARP pair lanes, the others registers. */
template <int HEAD_DIM>
__device__ inline void rotate_head(float (&x)[CHANNELS_A_LANE<HEAD_DIM>])
{
    constexpr int N = CHANNELS_A_LANE<HEAD_DIM>;
#pragma unroll
    for (int stride = 1; stride < WARP; stride *= 2) {
        const float sign = lane_of_thread() & stride ? -1.0f : 1.0f;
#pragma unroll
        for (int i = 0; i < N; i++)
            if (stride < segment_of_register<HEAD_DIM>(i)) /* a + b or a - b: the product is exact */
                x[i] = __fmaf_rn(sign, x[i], __shfl_xor_sync(ALL_LANES, x[i], stride));
    }
#pragma unroll
    for (int apart = 1; apart < N; apart *= 2)
#pragma unroll
        for (int i = 0; i + apart < N; i++)
            if (!(i & apart) && apart * WARP < segment_of_register<HEAD_DIM>(i)) {
                float a = x[i], b = x[i + apart];
                x[i] = __fadd_rn(a, b);
                x[i + apart] = __fsub_rn(a, b);
            }
#pragma unroll
    for (int i = 0; i < N; i++)
        x[i] = __fmul_rn(x[i], rotation_factor_of(segment_of_register<HEAD_DIM>(i)));
}

/* x[c] = combine(x[c], table[kv_head][c]); nothing where there is no table. */
template <int HEAD_DIM, class Combine>
__device__ inline void combine_with(const float *table, uint32_t kv_head, float (&x)[CHANNELS_A_LANE<HEAD_DIM>],
                                    Combine combine)
{
    if (!table)
        return;
    const float *row = table + (size_t)kv_head * HEAD_DIM;
#pragma unroll
    for (int i = 0; i < CHANNELS_A_LANE<HEAD_DIM>; i++)
        if (holds_channel<HEAD_DIM>(i))
            x[i] = combine(x[i], row[i * WARP + lane_of_thread()]);
}

/* A lane's entries of a transform's tables, so that one load serves several heads. */
template <int HEAD_DIM>
struct transform_entries {
    float shift[CHANNELS_A_LANE<HEAD_DIM>];
    float scale[CHANNELS_A_LANE<HEAD_DIM>];
    uint32_t permutation[CHANNELS_A_LANE<HEAD_DIM>];
};

template <int HEAD_DIM>
__device__ inline void load_transform(const ksort_transform &transform, uint32_t kv_head,
                                      transform_entries<HEAD_DIM> &entries)
{
    load_entries<HEAD_DIM>(transform.shift, kv_head, entries.shift);
    load_entries<HEAD_DIM>(transform.scale, kv_head, entries.scale);
    load_entries<HEAD_DIM>(transform.permutation, kv_head, entries.permutation);
}

/* Rotate and permutation, which keys and queries share. */
template <int HEAD_DIM>
__device__ inline void rotate_and_permute(const ksort_transform &transform, const transform_entries<HEAD_DIM> &entries,
                                          float *scratch, float (&x)[CHANNELS_A_LANE<HEAD_DIM>])
{
    if (transform.rotate)
        rotate_head<HEAD_DIM>(x);
    if (transform.permutation)
        gather_channels<HEAD_DIM>(entries.permutation, scratch, x, x);
}

/* What stands before rounding of a key or value: shift, scale, rotate, permutation. */
template <int HEAD_DIM>
__device__ inline void transform_key(const ksort_transform &transform, const transform_entries<HEAD_DIM> &entries,
                                     float *scratch, float (&x)[CHANNELS_A_LANE<HEAD_DIM>])
{
#pragma unroll
    for (int i = 0; i < CHANNELS_A_LANE<HEAD_DIM>; i++) {
        if (transform.shift && holds_channel<HEAD_DIM>(i))
            x[i] = __fsub_rn(x[i], entries.shift[i]);
        if (transform.scale && holds_channel<HEAD_DIM>(i))
            x[i] = __fmul_rn(x[i], entries.scale[i]);
    }
    rotate_and_permute<HEAD_DIM>(transform, entries, scratch, x);
}

/* What multiplies transformed keys: q / scale, rotate, permutation. */
template <int HEAD_DIM>
__device__ inline void transform_query(const ksort_transform &transform, const transform_entries<HEAD_DIM> &entries,
                                       float *scratch, float (&x)[CHANNELS_A_LANE<HEAD_DIM>])
{
#pragma unroll
    for (int i = 0; i < CHANNELS_A_LANE<HEAD_DIM>; i++)
        if (transform.scale && holds_channel<HEAD_DIM>(i))
            x[i] = __fdiv_rn(x[i], entries.scale[i]);
    rotate_and_permute<HEAD_DIM>(transform, entries, scratch, x);
}

/* An average of transformed values becomes that of the values: the permutation undone, rotate, / scale, + shift. */
template <int HEAD_DIM>
__device__ void restore_value(const ksort_transform &transform, uint32_t kv_head, float *scratch,
                              float (&x)[CHANNELS_A_LANE<HEAD_DIM>])
{
    if (transform.permutation)
        scatter_channels<HEAD_DIM>(transform.permutation + (size_t)kv_head * HEAD_DIM, scratch, x);
    if (transform.rotate)
        rotate_head<HEAD_DIM>(x);
    combine_with<HEAD_DIM>(transform.scale, kv_head, x, [](float y, float scale) { return __fdiv_rn(y, scale); });
    combine_with<HEAD_DIM>(transform.shift, kv_head, x, [](float y, float shift) { return __fadd_rn(y, shift); });
}

#endif /* KSORT_CUDA_COMMON_TRANSFORM_CUH */
