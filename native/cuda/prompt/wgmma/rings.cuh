/* Rings of tiles in shared memory, from the producers of prompt attention to its consumers (prompt/wgmma/kernel.cuh):
 *
 *     RING keys | RING values | queries of each consumer | RING stages of packed keys | of packed values
 */
#ifndef KSORT_CUDA_PROMPT_WGMMA_RINGS_CUH
#define KSORT_CUDA_PROMPT_WGMMA_RINGS_CUH

#include "prompt/shared/rows.cuh"
#include "prompt/wgmma/barriers.cuh"

#include <stddef.h>

constexpr int WARPGROUP = 4 * WARP;
constexpr int WARPGROUP_ROWS = 4 * MMA_ROWS;

constexpr int RING = 3; /* expanded tiles, and stages of packed ones */

/* Warpgroups of a CTA. */
constexpr uint32_t N_PRODUCERS = 2, LEAST_CONSUMERS = 2, MOST_CONSUMERS = 3;

template <int HEAD_DIM>
struct wgmma_shape {
    static constexpr int tile_bytes = panel_bytes<HEAD_DIM>(TILE);
    static constexpr int query_bytes = panel_bytes<HEAD_DIM>(WARPGROUP_ROWS); /* of a consumer */
    static constexpr int queries_offset = 2 * RING * tile_bytes;
    static constexpr int stages_offset = queries_offset + MOST_CONSUMERS * query_bytes;
};

/* What the kernel takes. */
struct prompt_job {
    attend_job attend;
    slot_range range;
    uint32_t n_consumers;
    bool is_second;   /* the kernel before it has other rows of the same prompt */
    float log2_scale; /* log2_scale_of */

    __host__ __device__ uint32_t rows() const { return n_consumers * WARPGROUP_ROWS; } /* of a block */
    __host__ __device__ uint32_t n_blocks() const { return n_row_blocks(attend, range, rows()); }
};

__host__ __device__ inline uint32_t packed_stage_bytes(const attend_job &job)
{
    return (uint32_t)(job.k.layout.tile_bytes + (job.v.layout.type == KSORT_F16 ? 0 : job.v.layout.tile_bytes));
}

/* Which blocks of rows a CTA takes: one of each turn of gridDim.x. */
__device__ inline uint32_t block_of_turn(uint32_t turn)
{
    return turn * gridDim.x + (turn % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* A place in a ring of buffers. `parity` is that of the round through the ring. */
struct ring_place {
    uint32_t buffer = 0, parity = 0;

    __device__ void advance()
    {
        bool wraps = ++buffer == RING;
        buffer = wraps ? 0 : buffer;
        parity ^= wraps;
    }
};

/* What producers and consumers share, in shared memory. A buffer is full when the four warps that made it have
 * arrived, and free when all consumer warps have. */
struct ring_state {
    uint64_t full_keys[RING], full_values[RING];
    uint64_t free_keys[RING], free_values[RING];
    uint64_t fetched_keys[RING], fetched_values[RING]; /* packed, in stages */
    int tops[RING];                                    /* of expanded values */
    int warp_tops[RING][WARPGROUP / WARP];             /* of bf16 values, from each warp of the producer */
};

/* A thread's view of the rings. Addresses are kept, as finding them takes as long as a product. */
template <int HEAD_DIM>
struct tile_rings {
    ring_state &state;
    uint8_t *smem;
    uint32_t barriers, tiles; /* addresses of state and smem */

    __device__ tile_rings(ring_state &state, uint8_t *smem)
        : state(state), smem(smem), barriers(uniform_smem_address(&state)), tiles(uniform_smem_address(smem))
    {
    }
    __device__ void init(uint32_t n_consumer_warps) const
    {
        for (uint32_t i = 0; i < RING; i++) {
            init_barrier(full_keys(i), WARPGROUP / WARP);
            init_barrier(full_values(i), WARPGROUP / WARP);
            init_barrier(free_keys(i), n_consumer_warps);
            init_barrier(free_values(i), n_consumer_warps);
            init_barrier(fetched_keys(i), 1);
            init_barrier(fetched_values(i), 1);
        }
    }
    __device__ uint32_t barrier(size_t ring, uint32_t buffer) const
    {
        return barriers + (uint32_t)ring + buffer * (uint32_t)sizeof(uint64_t);
    }
    __device__ uint32_t full_keys(uint32_t i) const { return barrier(offsetof(ring_state, full_keys), i); }
    __device__ uint32_t full_values(uint32_t i) const { return barrier(offsetof(ring_state, full_values), i); }
    __device__ uint32_t free_keys(uint32_t i) const { return barrier(offsetof(ring_state, free_keys), i); }
    __device__ uint32_t free_values(uint32_t i) const { return barrier(offsetof(ring_state, free_values), i); }
    __device__ uint32_t fetched_keys(uint32_t i) const { return barrier(offsetof(ring_state, fetched_keys), i); }
    __device__ uint32_t fetched_values(uint32_t i) const { return barrier(offsetof(ring_state, fetched_values), i); }

    /* One lane reads: the one that then arrives for its warp. */
    __device__ int top(uint32_t buffer) const
    {
        int top = threadIdx.x % WARP == 0 ? state.tops[buffer] : 0;
        return __shfl_sync(~0u, top, 0);
    }
    __device__ uint8_t *keys(uint32_t i) const { return smem + i * wgmma_shape<HEAD_DIM>::tile_bytes; }
    __device__ uint8_t *values(uint32_t i) const { return keys(RING + i); }
    __device__ uint32_t key_address(uint32_t i) const { return tiles + i * wgmma_shape<HEAD_DIM>::tile_bytes; }
    __device__ uint32_t value_address(uint32_t i) const { return key_address(RING + i); }
};

/* Joins the warpgroup's threads; barrier 0 is __syncthreads'. */
__device__ inline void join_warpgroup()
{
    join_threads<WARPGROUP>(1 + threadIdx.x / WARPGROUP);
}

#endif

#endif /* KSORT_CUDA_PROMPT_WGMMA_RINGS_CUH */
