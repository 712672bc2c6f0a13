/* The producers of prompt attention on sm_90a (prompt_wgmma.cuh): a warpgroup expands packed keys and values, or one
 * expands keys and another values, into rings of buffers in shared memory. Consumers wait for a buffer to be full,
 * where the four warps that made it arrive; producers wait for it to be free, where all consumer warps do.
 *
 *     shared memory: RING keys | RING values | queries of each consumer | RING stages of packed keys | of packed values
 *
 * Packed tiles are fetched into the stages by one thread, as bulk copies that barriers count.
 */
#ifndef KSORT_PROMPT_PRODUCERS_CUH
#define KSORT_PROMPT_PRODUCERS_CUH

#include "prompt_barriers.cuh"
#include "prompt_rows.cuh"

constexpr int WARPGROUP = 4 * WARP;
constexpr int WARPGROUP_ROWS = 4 * MMA_ROWS;

constexpr uint32_t WARPGROUPS = 4; /* of a CTA: one or two are producers, the others consumers */

template <int HEAD_DIM>
struct wgmma_shape {
    static constexpr int threads = WARPGROUPS * WARPGROUP;
    static constexpr int tile_bytes = panel_bytes<HEAD_DIM>(TILE);
    static constexpr int query_bytes = panel_bytes<HEAD_DIM>(WARPGROUP_ROWS); /* of a consumer */
    static constexpr int queries_offset = 2 * RING * tile_bytes;
    static constexpr int stages_offset = queries_offset + (WARPGROUPS - 1) * query_bytes;
};

/* What the kernel takes. */
struct prompt_job {
    attend_job attend;
    uint32_t n_producers;

    __host__ __device__ uint32_t n_consumers() const { return WARPGROUPS - n_producers; }
    __host__ __device__ uint32_t rows() const { return n_consumers() * WARPGROUP_ROWS; } /* of a block */
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
    uint64_t fetched_keys[RING], fetched_values[RING]; /* packed, in stages */
    int tops[RING];                                    /* of expanded values */
    int warp_tops[RING][WARPGROUP / WARP];             /* of bf16 values, from each warp of the producer */

    __device__ void init(uint32_t n_consumer_warps)
    {
        for (int i = 0; i < RING; i++) {
            init_barrier(&full_keys[i], WARPGROUP / WARP);
            init_barrier(&full_values[i], WARPGROUP / WARP);
            init_barrier(&free_keys[i], n_consumer_warps);
            init_barrier(&free_values[i], n_consumer_warps);
            init_barrier(&fetched_keys[i], 1);
            init_barrier(&fetched_values[i], 1);
        }
    }
    __device__ static uint8_t *keys(uint8_t *smem, uint32_t buffer) { return smem + buffer * shape::tile_bytes; }
    __device__ static uint8_t *values(uint8_t *smem, uint32_t buffer)
    {
        return smem + (RING + buffer) * shape::tile_bytes;
    }
};

/* Joins the warpgroup's threads; barrier 0 is __syncthreads'. */
__device__ inline void join_warpgroup()
{
    join_threads<WARPGROUP>(1 + threadIdx.x / WARPGROUP);
}

/* The tiles of a head, one after another. */
struct tile_walk {
    const ksort_cuda_cache &cache;
    size_t head;              /* bytes from a page's start */
    uint32_t entry, in_page;  /* page of the sequence, tile of the page */
    const uint8_t *page_gmem; /* NULL until it is asked for */

    __device__ tile_walk(const ksort_cuda_cache &cache, const row_block &block)
        : cache(cache), head(block.kv_head * cache.head_stride),
          entry(block.sequence * cache.sequence_pages + block.first_tile / cache.page_tiles),
          in_page(block.first_tile % cache.page_tiles), page_gmem(nullptr)
    {
    }

    __device__ const uint8_t *tile()
    {
        if (!page_gmem) {
            size_t page = cache.page_table ? (size_t)cache.page_table[entry] : entry;
            page_gmem = (const uint8_t *)cache.base + page * cache.page_stride + head;
        }
        return page_gmem + in_page * cache.tile_stride;
    }

    __device__ void advance()
    {
        if (++in_page == cache.page_tiles) {
            in_page = 0;
            entry++;
            page_gmem = nullptr;
        }
    }
};

/* Makes tiles of keys, of values or of both from packed ones; f16 values are fetched as they are. */
template <int HEAD_DIM>
struct tile_producer {
    const prompt_job &job;
    tile_rings<HEAD_DIM> &rings;
    uint8_t *smem;
    bool makes_keys, makes_values;

    __device__ const head_layout &key_layout() const { return job.attend.k.layout; }
    __device__ const head_layout &value_layout() const { return job.attend.v.layout; }
    __device__ bool expands_values() const { return makes_values && value_layout().type != KSORT_F16; }
    __device__ bool fetches_values() const { return makes_values && value_layout().type == KSORT_F16; }
    __device__ uint8_t *key_stage(uint32_t buffer) const
    {
        return smem + wgmma_shape<HEAD_DIM>::stages_offset + buffer * key_layout().tile_bytes;
    }
    __device__ uint8_t *value_stage(uint32_t buffer) const
    {
        return key_stage(RING) + buffer * value_layout().tile_bytes;
    }

    /* Starts a fetch of a packed tile into a stage. */
    __device__ static void fetch(uint8_t *stage, tile_walk &tiles, size_t tile_bytes, uint64_t *fetched)
    {
        expect_bytes(fetched, (uint32_t)tile_bytes);
        copy_bytes_async(stage, tiles.tile(), (uint32_t)tile_bytes, fetched);
        tiles.advance();
    }

    /* Starts fetches of the next packed tiles; one thread does. */
    __device__ void fetch_packed(tile_walk &keys, tile_walk &values, uint32_t buffer) const
    {
        if (makes_keys)
            fetch(key_stage(buffer), keys, key_layout().tile_bytes, &rings.fetched_keys[buffer]);
        if (expands_values())
            fetch(value_stage(buffer), values, value_layout().tile_bytes, &rings.fetched_values[buffer]);
    }

    /* Starts a fetch of f16 values into their panels. */
    __device__ void fetch_panels(tile_walk &values, uint32_t n_valid, ring_place at) const
    {
        wait_for_phase(&rings.free_values[at.buffer], at.parity ^ 1);
        fetch_f16<HEAD_DIM, WARPGROUP>(rings.values(smem, at.buffer), values.tile(), n_valid,
                                       threadIdx.x % WARPGROUP);
        values.advance();
    }

    __device__ void make_keys(ring_place at) const
    {
        wait_for_phase(&rings.fetched_keys[at.buffer], at.parity);
        wait_for_phase(&rings.free_keys[at.buffer], at.parity ^ 1);
        expand_keys<HEAD_DIM, WARPGROUP>(rings.keys(smem, at.buffer), key_stage(at.buffer), key_layout());
        publish_panels();
        arrive_as_warp(&rings.full_keys[at.buffer]);
    }

    /* The largest exponent of a fetched tile. */
    __device__ int largest_exponent(uint32_t n_valid, uint32_t buffer) const
    {
        constexpr uint32_t WARPS = WARPGROUP / WARP;
        if (value_layout().type != KSORT_BF16)
            return largest_block_exponent(value_stage(buffer), value_layout(), n_valid);
        uint32_t warp = threadIdx.x / WARP % WARPS;
        int *tops = rings.warp_tops[buffer];
        tops[warp] = largest_row_exponent<HEAD_DIM>(value_stage(buffer), n_valid, warp, WARPS);
        join_warpgroup();
        return max(max(tops[0], tops[1]), max(tops[2], tops[3]));
    }

    /* Returns the top of the values so far (prompt_expand.cuh). */
    __device__ int make_values(uint32_t n_valid, ring_place at, int top) const
    {
        if (expands_values()) {
            wait_for_phase(&rings.fetched_values[at.buffer], at.parity);
            top = max(top, largest_exponent(n_valid, at.buffer));
            wait_for_phase(&rings.free_values[at.buffer], at.parity ^ 1);
            expand_values<HEAD_DIM, WARPGROUP>(rings.values(smem, at.buffer), value_stage(at.buffer), value_layout(),
                                               top, n_valid);
        } else {
            wait_for_copies();
        }
        if (threadIdx.x % WARPGROUP == 0)
            rings.tops[at.buffer] = top;
        publish_panels();
        arrive_as_warp(&rings.full_values[at.buffer]);
        return top;
    }

    /* A block's tiles. Packed ones are fetched ahead: into a stage that all threads have expanded. */
    __device__ void make_tiles(const row_block &block, ring_place &at) const
    {
        tile_walk keys(job.attend.k.pages, block), values(job.attend.v.pages, block);
        int top = value_layout().type == KSORT_F16 ? UNIT_TOP : FIRST_TOP;
        bool fetches = threadIdx.x % WARPGROUP == 0;
        ring_place ahead = at;
        for (uint32_t tile = block.first_tile; tile < min(block.first_tile + RING, block.end_tile); tile++) {
            if (fetches)
                fetch_packed(keys, values, ahead.buffer);
            ahead.advance();
        }
        for (uint32_t tile = block.first_tile; tile < block.end_tile; tile++) {
            uint32_t n_valid = min(block.n_slots - tile * TILE, (uint32_t)TILE);
            if (fetches_values())
                fetch_panels(values, n_valid, at);
            if (makes_keys)
                make_keys(at);
            if (makes_values)
                top = make_values(n_valid, at, top);
            join_warpgroup();
            if (fetches && tile + RING < block.end_tile)
                fetch_packed(keys, values, at.buffer);
            at.advance();
        }
    }

    __device__ void run() const
    {
        ring_place at;
        uint32_t n_blocks = n_row_blocks(job.attend, job.rows());
        row_block block = {};
        for (uint32_t turn = 0; turn * gridDim.x < n_blocks; turn++)
            if (block_of_turn(turn) < n_blocks && find_rows(job.attend, job.rows(), block_of_turn(turn), block))
                make_tiles(block, at);
    }
};

#endif

#endif /* KSORT_PROMPT_PRODUCERS_CUH */
