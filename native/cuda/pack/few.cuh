/* A thread block's part where transformed tokens are few: which tokens its warps have, and their heads from x to
 * few_packer. */
#ifndef KSORT_CUDA_PACK_FEW_CUH
#define KSORT_CUDA_PACK_FEW_CUH

#include "pack/few_packer.cuh"

/* Rounds a warp's head that stands in its row, and stores it. */
template <int HEAD_DIM, bool SCALED, class Smem>
__device__ inline void round_few(const pack_side &side, const float *feedback,
                                 uint32_t (&from)[few_shape<HEAD_DIM>::QUADS][QUAD_CHANNELS], uint8_t *tile,
                                 uint32_t token, bool has_head, bool is_stored, Smem &smem)
{
    few_packer<HEAD_DIM, SCALED> packer = {side.cache.layout};
#pragma unroll
    for (int q = 0; q < few_shape<HEAD_DIM>::QUADS; q++) {
        packer.quads[q] = 0;
#pragma unroll
        for (int j = 0; j < QUAD_CHANNELS; j++)
            packer.y[q][j] = packer.channel(q) < HEAD_DIM ? smem.rows[threadIdx.x / WARP][from[q][j]] : 0.0f;
    }
    if (has_head)
        packer.choose_bytes();
    if (feedback)
        packer.round_with_feedback(feedback, has_head, smem);
    else
        packer.round_alone();
    if (has_head)
        packer.store(tile, token, is_stored);
}

/* Rounds the index-th TOKENS new tokens of a context, of one KV head. */
template <int HEAD_DIM, uint32_t X_TYPE>
__device__ inline void pack_few(const pack_work &work, const pack_side &side, uint32_t index, uint8_t *shared)
{
    using shape = few_shape<HEAD_DIM>;
    using maker_type = head_maker<HEAD_DIM, X_TYPE>;
    few_smem<HEAD_DIM> &smem = *reinterpret_cast<few_smem<HEAD_DIM> *>(shared);
    const uint32_t context = blockIdx.z, kv_head = blockIdx.y, warp = threadIdx.x / WARP;
    const uint32_t token = index * shape::TOKENS + warp;
    const bool may_exist = token < work.tokens.n_tokens;
    /* Everything is asked for before it is known how many tokens are new. */
    const uint32_t n_cached = (uint32_t)work.tokens.n_cached[context], n_new = n_new_of(work.tokens, context);
    const maker_type maker(work, side, kv_head);
    float x[1][maker_type::N];
    maker.load(context * work.context_stride + token * work.token_stride + (size_t)kv_head * HEAD_DIM, may_exist, x[0]);
    const float *feedback = side.transform.feedback;
    if (feedback) {
        feedback += (size_t)kv_head * HEAD_DIM * HEAD_DIM;
#pragma unroll
        for (int panel = 0; panel < shape::STAGES - (shape::STAGES < shape::PANELS); panel++)
            smem.feedback.template request<PACK_THREADS<HEAD_DIM>>(feedback, panel);
    }
    uint32_t from[shape::QUADS][QUAD_CHANNELS];
#pragma unroll
    for (int q = 0; q < shape::QUADS; q++)
#pragma unroll
        for (int j = 0; j < QUAD_CHANNELS; j++) {
            const uint32_t c = q * 128 + lane_of_thread() * QUAD_CHANNELS + j;
            from[q][j] = side.transform.permutation && c < HEAD_DIM
                             ? side.transform.permutation[(size_t)kv_head * HEAD_DIM + c]
                             : c;
        }
    const uint32_t slot = n_cached + token;
    const bool has_room = slot < n_slots(side.cache.pages);
    const bool has_position = !work.rope.partner || slot < work.tokens.n_positions;
    const bool is_new = may_exist && token < n_new;
    const bool wanted[1] = {is_new && has_room && has_position};
    if (is_new && !wanted[0])
        report(work.tokens, has_room ? KSORT_ERR_ROPE : KSORT_ERR_ARGUMENT);
    bool is_stored = false;
    float *row = smem.rows[warp];
    uint8_t *tile = nullptr;
    if (wanted[0]) {
        tile = tile_at(side.cache.pages, context, slot / KSORT_TILE_TOKENS, kv_head);
        const uint32_t positions[1] = {slot};
        const auto store_row = [&](const float (&x)[1][maker_type::N]) {
#pragma unroll
            for (int i = 0; i < maker_type::N; i++)
                if (holds_channel<HEAD_DIM>(i))
                    row[i * WARP + lane_of_thread()] = x[0][i];
            __syncwarp();
        };
        is_stored = maker.template make_heads<1>(
            positions, wanted, x, [&](const float (&x)[1][maker_type::N], float (&partners)[1][maker_type::N]) {
                store_row(x);
#pragma unroll
                for (int i = 0; i < maker_type::N; i++)
                    partners[0][i] = holds_channel<HEAD_DIM>(i) ? row[maker.turns.partner[i]] : 0.0f;
                __syncwarp();
            });
        store_row(x);
    }
    if (side.cache.layout.is_scaled)
        round_few<HEAD_DIM, true>(side, feedback, from, tile, slot % KSORT_TILE_TOKENS, wanted[0], is_stored, smem);
    else
        round_few<HEAD_DIM, false>(side, feedback, from, tile, slot % KSORT_TILE_TOKENS, wanted[0], is_stored, smem);
}

#endif /* KSORT_CUDA_PACK_FEW_CUH */
