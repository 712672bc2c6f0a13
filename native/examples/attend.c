/* The whole life of a packed cache: reserve, pack keys and values token by token, attend. cc attend.c -lksort */
#include <stdio.h>
#include <stdlib.h>

#include "ksort.h"

enum { N_HEADS = 4, N_KV_HEADS = 2, HEAD_DIM = 64, N_SLOTS = 256, N_TOKENS = 100 };

static ksort_cache reserve(uint32_t type)
{
    ksort_cache cache = {.struct_size = sizeof cache, .n_slots = N_SLOTS, .n_kv_heads = N_KV_HEADS};
    cache.format = (ksort_format){sizeof cache.format, type, HEAD_DIM, 32};
    ksort_tile_bytes(&cache.format, &cache.head_stride); /* layout [tile][head]; any other is a matter of strides */
    cache.tile_stride = N_KV_HEADS * cache.head_stride;
    cache.base = aligned_alloc(KSORT_ALIGNMENT, N_SLOTS / KSORT_TILE_TOKENS * cache.tile_stride);
    return cache;
}

int main(void)
{
    ksort_cache k = reserve(KSORT_BFP12), v = reserve(KSORT_F16);
    static float key[N_KV_HEADS * HEAD_DIM], value[N_KV_HEADS * HEAD_DIM];
    static float q[N_HEADS * HEAD_DIM], out[N_HEADS * HEAD_DIM];
    ksort_status status = KSORT_OK;
    for (size_t slot = 0; slot < N_TOKENS && status == KSORT_OK; slot++) {
        for (int i = 0; i < N_KV_HEADS * HEAD_DIM; i++) {
            key[i] = (float)((i * 7 + (int)slot * 13) % 31 - 15) / 15;
            value[i] = (float)slot; /* so the answer is the mean slot that the query looks at */
        }
        ksort_pack_args pack_k = {sizeof pack_k, &k, key, N_KV_HEADS * HEAD_DIM, slot, 1, NULL, NULL};
        ksort_pack_args pack_v = {sizeof pack_v, &v, value, N_KV_HEADS * HEAD_DIM, slot, 1, NULL, NULL};
        status = ksort_pack(&pack_k, 0, 1); /* part 0 of 1: no other threads */
        if (status == KSORT_OK)
            status = ksort_pack(&pack_v, 0, 1);
    }
    for (int i = 0; i < N_HEADS * HEAD_DIM; i++)
        q[i] = key[i % (N_KV_HEADS * HEAD_DIM)];
    ksort_attend_args attend = {.struct_size = sizeof attend,
                                .k = &k,
                                .v = &v,
                                .q = q,
                                .q_token_stride = N_HEADS * HEAD_DIM,
                                .out = out,
                                .out_token_stride = N_HEADS * HEAD_DIM,
                                .first_slot = N_TOKENS - 1,
                                .n_queries = 1,
                                .n_heads = N_HEADS,
                                .query_type = KSORT_BFP16,
                                .scale = 0.125f};
    if (status == KSORT_OK)
        status = ksort_attend_workspace_bytes(&attend, 1, &attend.workspace_bytes);
    attend.workspace = aligned_alloc(KSORT_ALIGNMENT, (attend.workspace_bytes / KSORT_ALIGNMENT + 1) * KSORT_ALIGNMENT);
    if (status == KSORT_OK)
        status = ksort_attend(&attend, 0, 1);
    if (status == KSORT_OK)
        status = ksort_attend_merge(&attend, 0, 1);
    printf("%s kernels: %s; head 0 looks at slot %.2f on average\n", ksort_kernels(), ksort_status_text(status),
           out[0]);
    free(k.base), free(v.base), free(attend.workspace);
    return status != KSORT_OK;
}
