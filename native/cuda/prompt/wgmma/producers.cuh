/* The producers of prompt attention on sm_90a (prompt/wgmma/kernel.cuh): one warpgroup expands packed keys, another
 * values, into the rings of prompt/wgmma/rings.cuh. Packed tiles are fetched into stages by one thread, as bulk copies
 * that barriers count.
 */
#ifndef KSORT_CUDA_PROMPT_WGMMA_PRODUCERS_CUH
#define KSORT_CUDA_PROMPT_WGMMA_PRODUCERS_CUH

#include "prompt/wgmma/rings.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* The tiles of a head, one after another. */
struct tile_walk {
    const ksort_cuda_cache &cache;
    size_t head;              /* bytes from a page's start */
    uint32_t entry, in_page;  /* page of the context, tile of the page */
    const uint8_t *page_gmem; /* NULL until it is asked for */

    __device__ tile_walk(const ksort_cuda_cache &cache, const row_block &block)
        : cache(cache), head(block.kv_head * cache.head_stride),
          entry(block.context * cache.context_pages + block.first_tile / cache.page_tiles),
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

/* Makes tiles of keys (MAKES_KEYS) or of values from packed ones; f16 values are fetched as they are. */
template <int HEAD_DIM, bool MAKES_KEYS>
struct tile_producer {
    const prompt_job &job;
    const tile_rings<HEAD_DIM> &rings;

    __device__ const device_cache &cache() const { return MAKES_KEYS ? job.attend.k : job.attend.v; }
    __device__ uint32_t tile_bytes() const { return (uint32_t)cache().layout.tile_bytes; }
    __device__ bool is_fetched_whole() const { return !MAKES_KEYS && cache().layout.type == KSORT_F16; }
    __device__ uint8_t *stage(uint32_t buffer) const
    {
        uint8_t *keys = rings.smem + wgmma_shape<HEAD_DIM>::stages_offset;
        return keys + (MAKES_KEYS ? 0 : RING * job.attend.k.layout.tile_bytes) + buffer * tile_bytes();
    }
    __device__ uint32_t fetched(uint32_t buffer) const
    {
        return MAKES_KEYS ? rings.fetched_keys(buffer) : rings.fetched_values(buffer);
    }

    /* Starts a fetch of the next packed tile into its stage; one thread does. */
    __device__ void fetch_packed(tile_walk &tiles, uint32_t buffer) const
    {
        expect_bytes(fetched(buffer), tile_bytes());
        copy_bytes_async(stage(buffer), tiles.tile(), tile_bytes(), fetched(buffer));
        tiles.advance();
    }

    __device__ void make_keys(ring_place at) const
    {
        wait_for_phase(rings.fetched_keys(at.buffer), at.parity);
        wait_for_phase(rings.free_keys(at.buffer), at.parity ^ 1);
        expand_keys<HEAD_DIM, WARPGROUP>(rings.keys(at.buffer), stage(at.buffer), cache().layout);
        publish_panels();
        arrive_as_warp(rings.full_keys(at.buffer));
    }

    /* The top of a fetched tile of values. */
    __device__ int top_of_tile(uint32_t n_valid, uint32_t buffer) const
    {
        constexpr uint32_t WARPS = WARPGROUP / WARP;
        if (cache().layout.type != KSORT_BF16)
            return top_of_blocks(stage(buffer), cache().layout, n_valid);
        uint32_t warp = threadIdx.x / WARP % WARPS;
        int *tops = rings.state.warp_tops[buffer];
        tops[warp] = largest_row_exponent<HEAD_DIM>(stage(buffer), n_valid, warp, WARPS);
        join_warpgroup();
        return max(max(tops[0], tops[1]), max(tops[2], tops[3]));
    }

    /* Gives the consumers a tile of values. */
    __device__ void publish_values(ring_place at, int top) const
    {
        if (threadIdx.x % WARPGROUP == 0)
            rings.state.tops[at.buffer] = top;
        publish_panels();
        arrive_as_warp(rings.full_values(at.buffer));
    }

    /* top: of the values so far (prompt/shared/tops.cuh); it is raised. */
    __device__ void make_values(uint32_t n_valid, ring_place at, int &top) const
    {
        wait_for_phase(rings.fetched_values(at.buffer), at.parity);
        top = max(top, top_of_tile(n_valid, at.buffer));
        wait_for_phase(rings.free_values(at.buffer), at.parity ^ 1);
        expand_values<HEAD_DIM, WARPGROUP>(rings.values(at.buffer), stage(at.buffer), cache().layout, top, n_valid);
        publish_values(at, top);
    }

    /* A block's tiles. Packed ones are fetched ahead: into a stage that all threads have expanded. */
    __device__ void make_tiles(const row_block &block, ring_place &at) const
    {
        tile_walk tiles(cache().pages, block);
        bool fetches = threadIdx.x % WARPGROUP == 0;
        int top = first_top(job.attend);
        ring_place ahead = at;
        for (uint32_t tile = block.first_tile; tile < min(block.first_tile + RING, block.end_tile); tile++) {
            if (fetches)
                fetch_packed(tiles, ahead.buffer);
            ahead.advance();
        }
        for (uint32_t tile = block.first_tile; tile < block.end_tile; tile++) {
            if constexpr (MAKES_KEYS)
                make_keys(at);
            else
                make_values(min(block.n_slots - tile * TILE, (uint32_t)TILE), at, top);
            join_warpgroup();
            if (fetches && tile + RING < block.end_tile)
                fetch_packed(tiles, at.buffer);
            at.advance();
        }
    }

    /* Starts a fetch of f16 values into their panels. */
    __device__ void fetch_panels(tile_walk &tiles, const row_block &block, uint32_t tile, ring_place at) const
    {
        if (tile < block.end_tile) {
            uint32_t n_valid = min(block.n_slots - tile * TILE, (uint32_t)TILE);
            wait_for_phase(rings.free_values(at.buffer), at.parity ^ 1);
            fetch_f16<HEAD_DIM, WARPGROUP>(rings.values(at.buffer), tiles.tile(), n_valid, threadIdx.x % WARPGROUP);
            tiles.advance();
        }
        group_copies();
    }

    /* A block's tiles of f16 values; one is asked for before the one before it has come. */
    __device__ void fetch_tiles(const row_block &block, ring_place &at) const
    {
        tile_walk tiles(cache().pages, block);
        fetch_panels(tiles, block, block.first_tile, at);
        for (uint32_t tile = block.first_tile; tile < block.end_tile; tile++) {
            ring_place next = at;
            next.advance();
            fetch_panels(tiles, block, tile + 1, next);
            wait_for_copies<1>();
            publish_values(at, UNIT_TOP);
            at = next;
        }
    }

    __device__ void run() const
    {
        ring_place at;
        uint32_t n_blocks = job.n_blocks();
        row_block block = {};
        for (uint32_t turn = 0; turn * gridDim.x < n_blocks; turn++) {
            uint32_t index = block_of_turn(turn);
            if (index >= n_blocks || !find_rows(job.attend, job.range, job.rows(), index, block))
                continue;
            if (is_fetched_whole())
                fetch_tiles(block, at);
            else
                make_tiles(block, at);
        }
    }
};

#endif

#endif /* KSORT_CUDA_PROMPT_WGMMA_PRODUCERS_CUH */
