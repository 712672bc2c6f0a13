/* A thread block's part where transformed tokens are many: which slots its warps have. */
#ifndef KSORT_CUDA_PACK_MANY_CUH
#define KSORT_CUDA_PACK_MANY_CUH

#include "pack/many_packer.cuh"

template <int HEAD_DIM, bool SCALED, uint32_t X_TYPE>
__device__ inline void round_many(const pack_work &work, const pack_side &side, const many_slots &slots,
                                  const float *feedback, many_smem<HEAD_DIM> &smem)
{
    const uint32_t context = blockIdx.z, kv_head = blockIdx.y, warp = threadIdx.x / WARP;
    many_packer<HEAD_DIM, SCALED> packer = {side.cache.layout, smem, smem.y[warp], smem.bytes[warp]};
    const bool has_tokens = slots.first + WARP > slots.first_new && slots.first < min(slots.end_new, slots.n_positions);
    uint32_t stored = 0;
    uint8_t *tile = nullptr;
    if (has_tokens) {
        const head_maker<HEAD_DIM, X_TYPE> maker(work, side, kv_head);
        tile = tile_at(side.cache.pages, context, slots.first / KSORT_TILE_TOKENS, kv_head);
        stored = packer.make_tokens(maker, slots, context * work.context_stride + (size_t)kv_head * HEAD_DIM);
        packer.choose_bytes();
    }
    const bool is_stored = stored >> lane_of_thread() & 1;
    word_writer words = {side.cache.layout, tile, (slots.first + lane_of_thread()) % KSORT_TILE_TOKENS};
    if (feedback)
        packer.template round_units<true>(feedback, has_tokens, is_stored, words);
    else
        packer.template round_units<false>(nullptr, has_tokens, is_stored, words);
}

/* Rounds the index-th SLOTS slots of a context that new tokens touch, of one KV head. */
template <int HEAD_DIM, uint32_t X_TYPE>
__device__ inline void pack_many(const pack_work &work, const pack_side &side, uint32_t index, uint8_t *shared)
{
    using shape = many_shape<HEAD_DIM>;
    many_smem<HEAD_DIM> &smem = *reinterpret_cast<many_smem<HEAD_DIM> *>(shared);
    const uint32_t context = blockIdx.z, kv_head = blockIdx.y;
    many_slots slots;
    slots.first_new = (uint32_t)work.tokens.n_cached[context];
    slots.end_new = slots.first_new + n_new_of(work.tokens, context);
    const uint32_t first = (slots.first_new / shape::SLOTS + index) * shape::SLOTS;
    if (first >= slots.end_new || slots.first_new == slots.end_new)
        return;
    slots.first = first + threadIdx.x / WARP * WARP;
    slots.n_positions = n_slots(side.cache.pages);
    if (threadIdx.x == 0 && min(first + shape::SLOTS, slots.end_new) > slots.n_positions)
        report(work.tokens, KSORT_ERR_ARGUMENT);
    if (work.rope.partner && work.tokens.n_positions < slots.n_positions) {
        slots.n_positions = work.tokens.n_positions;
        const uint32_t end = min(min(first + shape::SLOTS, slots.end_new), n_slots(side.cache.pages));
        if (threadIdx.x == 0 && end > max(slots.n_positions, max(first, slots.first_new)))
            report(work.tokens, KSORT_ERR_ROPE);
    }
    const float *feedback = side.transform.feedback;
    if (feedback) {
        feedback += (size_t)kv_head * HEAD_DIM * HEAD_DIM;
        smem.request(feedback, 0);
    }
    for (uint32_t place = threadIdx.x; place < HEAD_DIM; place += shape::THREADS) {
        const uint16_t *permutation = side.transform.permutation;
        smem.places[permutation ? permutation[(size_t)kv_head * HEAD_DIM + place] : place] = (uint16_t)place;
    }
    __syncthreads();
    if (side.cache.layout.is_scaled)
        round_many<HEAD_DIM, true, X_TYPE>(work, side, slots, feedback, smem);
    else
        round_many<HEAD_DIM, false, X_TYPE>(work, side, slots, feedback, smem);
}

#endif /* KSORT_CUDA_PACK_MANY_CUH */
