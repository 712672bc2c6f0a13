/* What every phase of libksort_cuda sees on the device: where a tile is, which tokens are new, reporting a status. */
#ifndef KSORT_CUDA_COMMON_DEVICE_CUH
#define KSORT_CUDA_COMMON_DEVICE_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

extern "C" {
#include "layout.h"
}
#include "ksort_cuda.h"

constexpr int WARP = 32;

/* A checked cache, as kernels take it by value. */
struct device_cache {
    head_layout layout;
    ksort_cuda_cache pages;
    ksort_cuda_exact exact; /* zeros: none */
};

inline bool has_exact(const device_cache &cache)
{
    return cache.pages.exact != nullptr;
}

/* Exact tile `tile` of a ring of KV head kv_head; 0: that of the sinks. */
__device__ inline uint8_t *exact_tile_at(const ksort_cuda_exact &exact, uint32_t context, uint32_t tile,
                                         uint32_t kv_head)
{
    return (uint8_t *)exact.base + context * exact.context_stride + tile * exact.tile_stride +
           kv_head * exact.head_stride;
}

/* Which of these has the slots of tile `tile` of a context. */
__device__ inline uint32_t ring_tile(const ksort_cuda_exact &exact, uint32_t tile)
{
    return 1 + tile % exact.n_tiles;
}

/* Channels c = WARP * i + lane of a head are a warp's registers x[i]: CHANNELS_A_LANE of them. */
template <int HEAD_DIM>
constexpr int CHANNELS_A_LANE = (HEAD_DIM + WARP - 1) / WARP;

__device__ inline uint8_t *tile_at(const ksort_cuda_cache &cache, uint32_t context, uint32_t tile, uint32_t kv_head)
{
    uint32_t entry = context * cache.context_pages + tile / cache.page_tiles;
    size_t page = cache.page_table ? (size_t)cache.page_table[entry] : entry;
    return (uint8_t *)cache.base + page * cache.page_stride + (size_t)(tile % cache.page_tiles) * cache.tile_stride +
           (size_t)kv_head * cache.head_stride;
}

HOST_DEVICE inline uint32_t n_slots(const ksort_cuda_cache &cache)
{
    return cache.context_pages * cache.page_tiles * KSORT_TILE_TOKENS;
}

__device__ inline uint32_t n_new_of(const ksort_cuda_tokens &tokens, uint32_t context)
{
    return tokens.n_new ? (uint32_t)tokens.n_new[context] : tokens.n_tokens;
}

/* Keeps the largest status reported. */
__device__ inline void report(const ksort_cuda_tokens &tokens, int status)
{
    atomicMax(tokens.device_status, status);
}

/* Element i of x, of a ksort_type that is a float type. */
__device__ inline float load_float(const void *x, uint32_t type, size_t i)
{
    if (type == KSORT_F32)
        return static_cast<const float *>(x)[i];
    if (type == KSORT_F16)
        return __half2float(static_cast<const __half *>(x)[i]);
    return __bfloat162float(static_cast<const __nv_bfloat16 *>(x)[i]);
}

__device__ inline void store_float(void *x, uint32_t type, size_t i, float value)
{
    if (type == KSORT_F32)
        static_cast<float *>(x)[i] = value;
    else if (type == KSORT_F16)
        static_cast<__half *>(x)[i] = __float2half_rn(value);
    else
        static_cast<__nv_bfloat16 *>(x)[i] = __float2bfloat16_rn(value);
}

#endif /* KSORT_CUDA_COMMON_DEVICE_CUH */
