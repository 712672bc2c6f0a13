/* Packing's exact rows: heads as they are before rounding, in f16, into the rings and sinks beside packed tiles.
 * Compiled once a head dimension.
 *
 *     warp     0       | 1       | ...        a head of a token each
 *     grid:    x = 8 warps of the heads of a context's tokens   y = context   z = keys, values
 *
 * RoPE and transform are done again: few tokens are packed while speed counts, and of a prompt few are kept. Bytes
 * moved, a head: head_dim times 2 or 4 in, 2 head_dim out, and the tables. */
#include "common/dependent_launch.cuh"
#include "common/phases.cuh"
#include "common/transform.cuh"

namespace {

constexpr uint32_t EXACT_WARPS = 8; /* of a thread block */
constexpr float F16_MAX = 65504.0f;

/* Keys or values of a call. */
struct exact_side {
    device_cache cache;
    ksort_rope rope; /* zeros: none */
    ksort_transform transform;
    const void *x;
};

struct exact_work {
    exact_side sides[2];
    ksort_cuda_tokens tokens;
    size_t token_stride, context_stride;
    uint32_t x_type, n_kv_heads, n_sides;
};

/* Where a token's row goes: to the sinks, to the ring, or to both. */
struct exact_places {
    bool to_sinks, to_ring;

    __device__ exact_places(const ksort_cuda_exact &exact, uint32_t slot, uint32_t n_after)
        : to_sinks(slot < exact.n_sinks), to_ring(n_after < exact.n_tiles * KSORT_TILE_TOKENS)
    {
    }
};

template <int HEAD_DIM>
__device__ void store_row(uint8_t *tile_gmem, uint32_t slot, const float (&x)[CHANNELS_A_LANE<HEAD_DIM>])
{
    __half *row = reinterpret_cast<__half *>(tile_gmem) + slot % KSORT_TILE_TOKENS * HEAD_DIM;
#pragma unroll
    for (int i = 0; i < CHANNELS_A_LANE<HEAD_DIM>; i++)
        if (holds_channel<HEAD_DIM>(i))
            row[i * WARP + lane_of_thread()] = __float2half_rn(x[i]);
}

/* RoPE and transform. */
template <int HEAD_DIM>
__device__ void find_head(const exact_side &side, uint32_t kv_head, uint32_t position, float *scratch,
                          float (&x)[CHANNELS_A_LANE<HEAD_DIM>])
{
    head_turns<HEAD_DIM> turns;
    head_cos_sin<HEAD_DIM> cos_sin;
    transform_entries<HEAD_DIM> entries;
    load_turns<HEAD_DIM>(side.rope, kv_head, turns);
    load_cos_sin<HEAD_DIM>(side.rope, position, turns, cos_sin);
    load_transform<HEAD_DIM>(side.transform, kv_head, entries);
    rope_head<HEAD_DIM>(side.rope, turns, cos_sin, scratch, x);
    transform_key<HEAD_DIM>(side.transform, entries, scratch, x);
}

/* Positions beyond the RoPE tables, slots beyond the pages and what is not finite are reported by packing. */
template <int HEAD_DIM>
__global__ void __launch_bounds__(EXACT_WARPS *WARP) pack_exact_kernel(const __grid_constant__ exact_work work)
{
    __shared__ float scratch_of_warps[EXACT_WARPS][HEAD_DIM];
    wait_for_kernel_before();
    const exact_side &side = work.sides[blockIdx.z];
    const uint32_t warp = blockIdx.x * EXACT_WARPS + threadIdx.x / WARP, context = blockIdx.y;
    const uint32_t token = warp / work.n_kv_heads, kv_head = warp % work.n_kv_heads;
    const uint32_t n_new = n_new_of(work.tokens, context);
    if (!side.cache.exact.base || token >= n_new)
        return;
    const uint32_t slot = (uint32_t)work.tokens.n_cached[context] + token;
    const exact_places places(side.cache.exact, slot, n_new - 1 - token);
    const bool has_position = !side.rope.partner || slot < work.tokens.n_positions;
    if ((!places.to_sinks && !places.to_ring) || !has_position || slot >= n_slots(side.cache.pages))
        return;
    float x[CHANNELS_A_LANE<HEAD_DIM>];
    const size_t at = context * work.context_stride + token * work.token_stride + (size_t)kv_head * HEAD_DIM;
#pragma unroll
    for (int i = 0; i < CHANNELS_A_LANE<HEAD_DIM>; i++)
        x[i] = holds_channel<HEAD_DIM>(i) ? load_float(side.x, work.x_type, at + i * WARP + lane_of_thread()) : 0.0f;
    find_head<HEAD_DIM>(side, kv_head, slot, scratch_of_warps[threadIdx.x / WARP], x);
    bool fits = true, is_finite = true;
#pragma unroll
    for (int i = 0; i < CHANNELS_A_LANE<HEAD_DIM>; i++) {
        fits = fits && fabsf(x[i]) <= F16_MAX;
        is_finite = is_finite && isfinite(x[i]);
    }
    if (!__all_sync(ALL_LANES, fits)) {
        if (__all_sync(ALL_LANES, is_finite) && lane_of_thread() == 0)
            report(work.tokens, KSORT_ERR_RANGE);
        return;
    }
    if (places.to_sinks)
        store_row<HEAD_DIM>(exact_tile_at(side.cache.exact, context, 0, kv_head), slot, x);
    if (places.to_ring)
        store_row<HEAD_DIM>(
            exact_tile_at(side.cache.exact, context, ring_tile(side.cache.exact, slot / KSORT_TILE_TOKENS), kv_head),
            slot, x);
}

} // namespace

template <int HEAD_DIM>
cudaError_t launch_pack_exact(const pack_job &job, cudaStream_t stream)
{
    exact_work work = {};
    work.tokens = job.tokens;
    work.token_stride = job.token_stride, work.context_stride = job.context_stride;
    work.x_type = job.x_type;
    if (job.has_k)
        work.sides[work.n_sides++] = {job.k, job.rope, job.k_transform, job.k_x};
    if (job.has_v)
        work.sides[work.n_sides++] = {job.v, {}, job.v_transform, job.v_x};
    work.n_kv_heads = work.sides[0].cache.pages.n_kv_heads;
    const uint64_t blocks = ((uint64_t)job.tokens.n_tokens * work.n_kv_heads + EXACT_WARPS - 1) / EXACT_WARPS;
    if (blocks > INT32_MAX / EXACT_WARPS)
        return cudaErrorInvalidConfiguration;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((uint32_t)blocks, job.tokens.n_contexts, work.n_sides);
    config.blockDim = dim3(EXACT_WARPS * WARP);
    config.stream = stream;
    return launch_dependent(config, pack_exact_kernel<HEAD_DIM>, work);
}

template cudaError_t launch_pack_exact<KSORT_HEAD_DIM>(const pack_job &, cudaStream_t);
