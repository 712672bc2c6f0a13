/* The producers of prompt attention with warpgroups of their own (prompt_wgmma.cuh): one expands packed keys, one
 * packed values, into rings of buffers in shared memory. Consumers wait for a buffer to be full, where the four warps
 * of a producer arrive; the producer waits for it to be free, where all consumer warps do.
 *
 *     shared memory: RING keys | RING values | rows on their way out | RING stages of packed keys | of packed values
 */
#ifndef KSORT_PROMPT_PRODUCERS_CUH
#define KSORT_PROMPT_PRODUCERS_CUH

#include "prompt_barriers.cuh"
#include "prompt_rows.cuh"

constexpr int WARPGROUP = 4 * WARP;
constexpr int WARPGROUP_ROWS = 4 * MMA_ROWS;

template <int HEAD_DIM>
struct wgmma_shape {
    static constexpr int producers = 2;
    static constexpr int consumers = 2;
    static constexpr int consumer_warps = consumers * WARPGROUP / WARP;
    static constexpr int rows = consumers * WARPGROUP_ROWS;
    static constexpr int threads = (producers + consumers) * WARPGROUP;
    static constexpr int tile_bytes = panel_bytes<HEAD_DIM>(TILE);
    static constexpr int staged_offset = 2 * RING * tile_bytes;
    static constexpr int stages_offset = staged_offset + consumer_warps * staged_row_bytes<HEAD_DIM>;
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

template <int HEAD_DIM>
struct tile_rings {
    typedef wgmma_shape<HEAD_DIM> shape;
    uint64_t full_keys[RING], full_values[RING];
    uint64_t free_keys[RING], free_values[RING];
    int tops[RING]; /* of expanded values */

    __device__ void init()
    {
        for (int i = 0; i < RING; i++) {
            init_barrier(&full_keys[i], WARPGROUP / WARP);
            init_barrier(&full_values[i], WARPGROUP / WARP);
            init_barrier(&free_keys[i], shape::consumer_warps);
            init_barrier(&free_values[i], shape::consumer_warps);
        }
    }
    __device__ static uint8_t *keys(uint8_t *smem, uint32_t buffer) { return smem + buffer * shape::tile_bytes; }
    __device__ static uint8_t *values(uint8_t *smem, uint32_t buffer)
    {
        return smem + (RING + buffer) * shape::tile_bytes;
    }
};

/* Makes tiles of keys from packed ones. */
template <int HEAD_DIM>
struct key_producer {
    static constexpr int join = 1; /* its barrier */
    const attend_job &job;
    tile_rings<HEAD_DIM> &rings;
    uint8_t *smem;

    __device__ uint8_t *stage(uint32_t buffer) const
    {
        return smem + wgmma_shape<HEAD_DIM>::stages_offset + buffer * job.k.layout.tile_bytes;
    }
    __device__ int first_top() const { return 0; }

    __device__ void fetch(const row_block &block, uint32_t tile, ring_place to) const
    {
        fetch_packed<WARPGROUP>(stage(to.buffer), tile_at(job.k.pages, block.sequence, tile, block.kv_head),
                                (uint32_t)job.k.layout.tile_bytes, threadIdx.x % WARPGROUP);
    }

    __device__ int expand(const row_block &, uint32_t, ring_place at, int) const
    {
        wait_for_phase(&rings.free_keys[at.buffer], at.parity ^ 1);
        expand_keys<HEAD_DIM, WARPGROUP>(rings.keys(smem, at.buffer), stage(at.buffer), job.k.layout);
        publish_panels();
        arrive_as_warp(&rings.full_keys[at.buffer]);
        return 0;
    }
};

/* Makes tiles of values; f16 ones are fetched as they are. */
template <int HEAD_DIM>
struct value_producer {
    static constexpr int join = 2;
    const attend_job &job;
    tile_rings<HEAD_DIM> &rings;
    uint8_t *smem;

    __device__ bool expands() const { return job.v.layout.type != KSORT_F16; }
    __device__ uint8_t *stage(uint32_t buffer) const
    {
        return smem + wgmma_shape<HEAD_DIM>::stages_offset + RING * job.k.layout.tile_bytes +
               buffer * job.v.layout.tile_bytes;
    }
    __device__ int first_top() const { return expands() ? FIRST_TOP : UNIT_TOP; }
    __device__ static uint32_t n_valid(const row_block &block, uint32_t tile)
    {
        return min(block.n_slots - tile * TILE, (uint32_t)TILE);
    }

    __device__ void fetch(const row_block &block, uint32_t tile, ring_place to) const
    {
        const uint8_t *tile_gmem = tile_at(job.v.pages, block.sequence, tile, block.kv_head);
        uint32_t thread = threadIdx.x % WARPGROUP;
        if (expands()) {
            fetch_packed<WARPGROUP>(stage(to.buffer), tile_gmem, (uint32_t)job.v.layout.tile_bytes, thread);
            return;
        }
        wait_for_phase(&rings.free_values[to.buffer], to.parity ^ 1);
        fetch_f16<HEAD_DIM, WARPGROUP>(rings.values(smem, to.buffer), tile_gmem, n_valid(block, tile), thread);
    }

    /* Returns the top of the values so far (prompt_expand.cuh). */
    __device__ int expand(const row_block &block, uint32_t tile, ring_place at, int top) const
    {
        if (expands()) {
            wait_for_phase(&rings.free_values[at.buffer], at.parity ^ 1);
            top = expand_values<HEAD_DIM, WARPGROUP>(rings.values(smem, at.buffer), stage(at.buffer), job.v.layout,
                                                     top, n_valid(block, tile));
        }
        if (threadIdx.x % WARPGROUP == 0)
            rings.tops[at.buffer] = top;
        publish_panels();
        arrive_as_warp(&rings.full_values[at.buffer]);
        return top;
    }
};

/* A producer's warpgroup: the fetch of a tile is started before the one before is expanded. Three stages: that which is
 * fetched into was expanded by all threads before any of them passed the last join. */
template <int HEAD_DIM, typename PRODUCER>
__device__ inline void produce_tiles(const PRODUCER &producer)
{
    constexpr int rows = wgmma_shape<HEAD_DIM>::rows;
    const attend_job &job = producer.job;
    ring_place fetched, expanded;
    uint32_t n_blocks = n_row_blocks(job, rows);
    row_block block = {};
    for (uint32_t turn = 0; turn * gridDim.x < n_blocks; turn++) {
        if (block_of_turn(turn) >= n_blocks || !find_rows(job, rows, block_of_turn(turn), block))
            continue;
        int top = producer.first_top();
        producer.fetch(block, block.first_tile, fetched);
        commit_copies();
        fetched.advance();
        for (uint32_t tile = block.first_tile; tile < block.end_tile; tile++) {
            if (tile + 1 < block.end_tile) {
                producer.fetch(block, tile + 1, fetched);
                fetched.advance();
            }
            commit_copies();
            wait_for_all_but_last_copies();
            join_threads<WARPGROUP>(PRODUCER::join);
            top = producer.expand(block, tile, expanded, top);
            expanded.advance();
        }
    }
}

#endif

#endif /* KSORT_PROMPT_PRODUCERS_CUH */
