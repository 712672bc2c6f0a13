/* The work of decode attention, cut: a block's heads and chunks, a warp's list of chunks, and the ring that they go
 * through. */
#ifndef KSORT_CUDA_DECODE_WORK_CUH
#define KSORT_CUDA_DECODE_WORK_CUH

#include "common/exact.cuh"
#include "decode/chunk.cuh"

/* What a block does. Chunks are counted from slot 0 of the context. */
struct decode_work {
    uint32_t context, kv_head, split;
    uint32_t first_head, n_rows; /* query heads */
    bool has_token;
    slot_sections sections;
    slot_span slots; /* packed ones */
    uint32_t first_chunk, end_chunk;
};

__device__ inline decode_work work_of_block(const attend_job &job)
{
    const uint32_t a_split = n_row_blocks(job.group), row_block = blockIdx.x % a_split;
    decode_work work;
    work.split = blockIdx.x / a_split;
    work.kv_head = blockIdx.y;
    work.context = blockIdx.z;
    work.first_head = work.kv_head * job.group + row_block * ROWS;
    work.n_rows = min(job.group - row_block * ROWS, ROWS);
    const slot_span seen = slots_of(job, work.context);
    work.has_token = seen.end != 0;
    work.sections = sections_of(job.k.exact, exact_begin(job.k.exact, work.context), seen.begin, seen.end);
    work.slots = {work.sections.sinks_end, work.sections.tail_begin, seen.exceeds};
    const uint32_t begin = work.slots.begin / CHUNK_TOKENS;
    const uint32_t end = work.slots.begin < work.slots.end ? (work.slots.end + CHUNK_TOKENS - 1) / CHUNK_TOKENS : begin;
    const uint32_t share = (end - begin) / job.n_splits, rest = (end - begin) % job.n_splits; /* first splits: 1 more */
    work.first_chunk = begin + share * work.split + min(work.split, rest);
    work.end_chunk = work.first_chunk + share + (work.split < rest ? 1 : 0);
    return work;
}

/* A warp's chunks: every WARPS-th from its first. Lanes look up the tiles of the next 32 together, as page tables and
 * divisions take long. */
template <uint32_t WARPS>
struct chunk_list {
    uint32_t first_chunk, n_chunks;
    const uint8_t *k_gmem, *v_gmem; /* of chunk `lane` of the 32 */

    __device__ chunk_list(const decode_work &work, uint32_t warp) : first_chunk(work.first_chunk + warp)
    {
        n_chunks = first_chunk < work.end_chunk ? (work.end_chunk - first_chunk + WARPS - 1) / WARPS : 0;
    }

    __device__ uint32_t chunk(uint32_t i) const { return first_chunk + WARPS * i; }

    __device__ void look_up(const attend_job &job, const decode_work &work, uint32_t i, uint32_t lane)
    {
        if (i + lane >= n_chunks)
            return;
        const uint32_t tile = chunk(i + lane) * CHUNK_TOKENS / KSORT_TILE_TOKENS;
        k_gmem = tile_at(job.k.pages, work.context, tile, work.kv_head);
        v_gmem = tile_at(job.v.pages, work.context, tile, work.kv_head);
    }

    /* The tile of chunk i, from the lane that looked it up. */
    static __device__ const uint8_t *of_lane(const uint8_t *tile_gmem, uint32_t i)
    {
        const unsigned long long address = reinterpret_cast<unsigned long long>(tile_gmem);
        return reinterpret_cast<const uint8_t *>(__shfl_sync(~0u, address, i % WARP));
    }
};

/* A warp's ring of chunks in shared memory: chunk i of its list is at place i % STAGES. */
template <uint32_t HEAD_DIM, uint32_t K_TYPE, uint32_t V_TYPE, uint32_t STAGES>
struct chunk_ring {
    static constexpr uint32_t STAGE_BYTES = stage_bytes(HEAD_DIM, K_TYPE, V_TYPE);
    static constexpr uint32_t K_BYTES = chunk_bytes(K_TYPE, HEAD_DIM);

    uint8_t *smem;

    __device__ uint8_t *k(uint32_t i) const { return smem + i % STAGES * STAGE_BYTES; }

    __device__ uint8_t *v(uint32_t i) const { return k(i) + K_BYTES; }

    /* Asks for chunk i, all lanes together; a commit in any case, as waiting counts them. */
    template <uint32_t WARPS>
    __device__ void fetch(const attend_job &job, const decode_work &work, chunk_list<WARPS> &list, uint32_t i,
                          uint32_t lane)
    {
        if (i < list.n_chunks) {
            if (i % WARP == 0)
                list.look_up(job, work, i, lane);
            const uint8_t *k_gmem = list.of_lane(list.k_gmem, i), *v_gmem = list.of_lane(list.v_gmem, i);
            const uint32_t first_token = list.chunk(i) * CHUNK_TOKENS % KSORT_TILE_TOKENS;
            const uint32_t to_smem = (uint32_t)__cvta_generic_to_shared(smem) + i % STAGES * STAGE_BYTES;
            fetch_chunk<K_TYPE, HEAD_DIM>(job.k.layout.n_blocks, k_gmem, first_token, lane, to_smem);
            fetch_chunk<V_TYPE, HEAD_DIM>(job.v.layout.n_blocks, v_gmem, first_token, lane, to_smem + K_BYTES);
        }
        commit_copies();
    }
};

#endif /* KSORT_CUDA_DECODE_WORK_CUH */
