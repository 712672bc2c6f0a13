/* Nearest rounding of a thread block's group of slots: with RoPE (pack_rope.cuh), or without (pack_plain.cuh). */
#ifndef KSORT_PACK_NEAREST_CUH
#define KSORT_PACK_NEAREST_CUH

#include "pack_plain.cuh"
#include "pack_rope.cuh"

/* Whether angles of all frequencies have room in rope_smem. */
template <int HEAD_DIM>
bool may_stage_angles(const ksort_rope &rope)
{
    return !rope.partner || rope.n_frequencies <= HEAD_DIM / 2;
}

/* The group's tile of a head. */
__device__ inline uint8_t *tile_of_group(const pack_side &side, const slot_group &group, uint32_t head)
{
    return tile_at(side.cache.pages, group.sequence, group.first / KSORT_TILE_TOKENS, head);
}

/* Slots of a group from n_cached on are packed, n_packed at most; so in pack_rope. */
template <int HEAD_DIM, uint32_t X_TYPE>
__device__ inline void pack_plain(const pack_work &work, const pack_side &side, const slot_group &group,
                                  uint32_t first_head, uint32_t n_packed)
{
    using shape = plain_shape<HEAD_DIM, X_TYPE>;
    const uint32_t warp = threadIdx.x / WARP, lane = lane_of_thread(), head = first_head + warp / shape::WARPS_A_HEAD;
    if (warp / shape::WARPS_A_HEAD >= shape::HEADS || head >= work.n_kv_heads)
        return;
    const uint32_t first = warp % shape::WARPS_A_HEAD * shape::QUADS * shape::QUAD_STEP + lane / shape::LANES * QUAD;
    plain_packer<HEAD_DIM, X_TYPE> packer = {
        work, side, group, n_packed, head, lane % shape::LANES, group.first + first};
    packer.load_quads(0);
    packer.tile = tile_of_group(side, group, head); /* after x is asked for: it may wait for the page table */
    packer.pack();
}

template <int HEAD_DIM, uint32_t X_TYPE, bool STAGED>
__device__ inline void pack_rope(const pack_work &work, const pack_side &side, const slot_group &group,
                                 uint32_t first_head, uint32_t n_packed, uint8_t *shared)
{
    const rope_rows<HEAD_DIM, X_TYPE, STAGED> rows = {
        work,
        side,
        group,
        *reinterpret_cast<rope_smem<HEAD_DIM, X_TYPE> *>(shared),
        first_head,
        min(work.rope_heads, work.n_kv_heads - first_head),
        n_packed,
        threadIdx.x / WARP,
        lane_of_thread()};
    const rope_packer<HEAD_DIM, X_TYPE, STAGED> packer = {rows};
    packer.pack(tile_of_group(side, group, first_head));
}

/* Packs a thread block's group of slots of some heads of a side. STAGED: angles of all frequencies have room in shared
 * memory. */
template <int HEAD_DIM, uint32_t X_TYPE, bool STAGED>
__device__ inline void pack_nearest(const pack_work &work, const pack_side &side, uint32_t group_index, uint8_t *shared)
{
    const uint32_t first_head = blockIdx.y * (side.has_rope ? work.rope_heads : GROUP_HEADS<HEAD_DIM, X_TYPE>);
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

#endif /* KSORT_PACK_NEAREST_CUH */
