/* Nearest rounding of a thread block's group of slots: with RoPE (pack/rope.cuh), or without (pack/plain.cuh). */
#ifndef KSORT_CUDA_PACK_NEAREST_CUH
#define KSORT_CUDA_PACK_NEAREST_CUH

#include "pack/plain.cuh"
#include "pack/rope.cuh"

/* Whether cos and sin of all frequencies have room in rope_smem. */
template <int HEAD_DIM>
bool may_stage_rope_table(const ksort_rope &rope)
{
    return !rope.partner || rope.n_frequencies <= HEAD_DIM / 2;
}

/* Slots of a group from n_cached on are packed, n_packed at most; so in pack_rope. */
template <int HEAD_DIM, uint32_t X_TYPE>
__device__ inline void pack_plain(const pack_work &work, const pack_side &side, const slot_group &group,
                                  uint32_t first_head, uint32_t n_packed)
{
    using shape = plain_shape<HEAD_DIM, X_TYPE>;
    const uint32_t warp = threadIdx.x / WARP, lane = lane_of_thread(), head = first_head + warp / shape::WARPS_A_HEAD;
    if (warp / shape::WARPS_A_HEAD >= work.block_heads || head >= work.n_kv_heads)
        return;
    const uint32_t first = warp % shape::WARPS_A_HEAD * shape::WARP_SLOTS + lane / shape::LANES * QUAD;
    plain_packer<HEAD_DIM, X_TYPE> packer = {
        work, side, group, n_packed, head, lane % shape::LANES, group.first + first};
    packer.load();
    packer.tile = tile_of_group(side, group, head); /* after x is asked for: it may wait for the page table */
    packer.pack();
}

template <int HEAD_DIM, uint32_t X_TYPE, bool STAGED>
__device__ inline void pack_rope(const pack_work &work, const pack_side &side, const slot_group &group,
                                 uint32_t first_head, uint32_t n_packed, uint8_t *shared)
{
    const rope_rows<HEAD_DIM, X_TYPE, STAGED> rows = {work,
                                                      side,
                                                      group,
                                                      *reinterpret_cast<rope_smem<HEAD_DIM, X_TYPE> *>(shared),
                                                      first_head,
                                                      min(work.block_heads, work.n_kv_heads - first_head),
                                                      n_packed,
                                                      threadIdx.x / WARP,
                                                      lane_of_thread()};
    const rope_packer<HEAD_DIM, X_TYPE, STAGED> packer = {rows};
    packer.pack();
}

/* Packs a thread block's group of slots of some heads of a side. STAGED: cos and sin of all frequencies have room in
 * shared memory. */
template <int HEAD_DIM, uint32_t X_TYPE, bool STAGED>
__device__ inline void pack_nearest(const pack_work &work, const pack_side &side, uint32_t group_index, uint8_t *shared)
{
    const uint32_t first_head = blockIdx.y * work.block_heads;
    if (first_head >= work.n_kv_heads)
        return;
    const slot_group group = find_group(work, group_index);
    const uint32_t n_packed = count_packed(work, side, group);
    if (n_packed == 0 || group.first >= group.n_cached + n_packed)
        return; /* its tile may not even exist */
    if (side.has_rope)
        pack_rope<HEAD_DIM, X_TYPE, STAGED>(work, side, group, first_head, n_packed, shared);
    else
        pack_plain<HEAD_DIM, X_TYPE>(work, side, group, first_head, n_packed);
}

/* Asks L2 for the rows of x that the thread block will load if the new slots of its context begin at a multiple of
 * GROUP_SLOTS; how many slots are in use is not known before the kernel before has ended. */
template <int HEAD_DIM, uint32_t X_TYPE>
__device__ inline void prefetch_rows(const pack_work &work, const pack_side &side, uint32_t group_index)
{
    constexpr uint32_t LINE = 128, ROW_BYTES = GROUP_HEADS<HEAD_DIM, X_TYPE> * HEAD_DIM * ELEMENT_BYTES<X_TYPE>;
    constexpr uint32_t ROW_LINES = (ROW_BYTES + LINE - 1) / LINE;
    const uint32_t first_head = blockIdx.y * work.block_heads;
    const size_t first = blockIdx.z * work.context_stride + (size_t)first_head * HEAD_DIM;
    const uint32_t bytes = min(work.block_heads, work.n_kv_heads - first_head) * HEAD_DIM * ELEMENT_BYTES<X_TYPE>;
#pragma unroll
    for (uint32_t i = threadIdx.x; i < GROUP_SLOTS * ROW_LINES; i += PACK_THREADS<HEAD_DIM>) {
        const uint32_t token = group_index * GROUP_SLOTS + i / ROW_LINES, in_row = i % ROW_LINES * LINE;
        const size_t at = (first + token * work.token_stride) * ELEMENT_BYTES<X_TYPE> + in_row;
        if (token < work.tokens.n_tokens && in_row < bytes)
            prefetch_into_l2(static_cast<const uint8_t *>(side.x) + at);
    }
}

#endif /* KSORT_CUDA_PACK_NEAREST_CUH */
