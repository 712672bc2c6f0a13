/* libksort_cuda's calls on host memory, through libksort: lets the GPU runner's Python run, and be compared with the
 * CPU runner, where there is no GPU. One context, contiguous caches, float32 rows; all else is KSORT_ERR_ARGUMENT. */
#include "ksort_cuda.h"

#include <stdlib.h>

uint32_t ksort_cuda_abi_version(void)
{
    return KSORT_CUDA_ABI_VERSION;
}

ksort_status ksort_cuda_device_status(void)
{
    return KSORT_OK;
}

static int is_supported(const ksort_cuda_cache *cache, const ksort_cuda_tokens *tokens, uint32_t x_type)
{
    return cache->struct_size == sizeof *cache && tokens->struct_size == sizeof *tokens && cache->n_contexts == 1 &&
           tokens->n_contexts == 1 && cache->context_pages == 1 && !cache->page_table && !tokens->n_new &&
           x_type == KSORT_F32 && cache->page_stride == cache->page_tiles * cache->tile_stride;
}

/* exact: where the cache's exact rows are described, if it has any. */
static ksort_cache host_cache(const ksort_cuda_cache *cache, ksort_exact *exact)
{
    if (cache->exact)
        *exact = (ksort_exact){
            .struct_size = sizeof *exact,
            .base = cache->exact->base,
            .tile_stride = cache->exact->tile_stride,
            .head_stride = cache->exact->head_stride,
            .n_tiles = cache->exact->n_tiles,
            .n_tail = cache->exact->n_tail,
            .n_sinks = cache->exact->n_sinks,
            .begin = (size_t)cache->exact->begin[0],
        };
    return (ksort_cache){
        .struct_size = sizeof(ksort_cache),
        .format = cache->format,
        .base = cache->base,
        .tile_stride = cache->tile_stride,
        .head_stride = cache->head_stride,
        .n_slots = (size_t)cache->page_tiles * KSORT_TILE_TOKENS,
        .n_kv_heads = cache->n_kv_heads,
        .exact = cache->exact ? exact : NULL,
    };
}

/* The rows of cos and sin of the call's tokens: ksort.h's tables begin with the first of them. */
static ksort_rope host_rope(const ksort_rope *rope, const ksort_cuda_tokens *tokens)
{
    ksort_rope of_tokens = *rope;
    of_tokens.cos += (size_t)tokens->n_cached[0] * rope->n_frequencies;
    of_tokens.sin += (size_t)tokens->n_cached[0] * rope->n_frequencies;
    return of_tokens;
}

static ksort_status report(const ksort_cuda_tokens *tokens, ksort_status status)
{
    if (status == KSORT_ERR_NON_FINITE || status == KSORT_ERR_RANGE) {
        if (*tokens->device_status < (int32_t)status)
            *tokens->device_status = (int32_t)status;
        return KSORT_OK;
    }
    return status;
}

ksort_status ksort_cuda_pack(const ksort_cuda_pack_args *args, void *stream)
{
    (void)stream;
    const ksort_cuda_tokens *tokens = args->tokens;
    if (args->struct_size != sizeof *args || !is_supported(args->k, tokens, args->x_type) ||
        !is_supported(args->v, tokens, args->x_type) ||
        (uint32_t)tokens->n_cached[0] + tokens->n_tokens > tokens->n_positions)
        return KSORT_ERR_ARGUMENT;
    ksort_exact exact[2];
    ksort_cache caches[2] = {host_cache(args->k, &exact[0]), host_cache(args->v, &exact[1])};
    ksort_rope rope = host_rope(args->rope, tokens);
    for (int side = 0; side < 2; side++) {
        ksort_pack_args pack = {
            .struct_size = sizeof pack,
            .cache = &caches[side],
            .rope = side ? NULL : &rope,
            .x = side ? args->v_x : args->k_x,
            .x_token_stride = args->token_stride,
            .first_slot = (size_t)tokens->n_cached[0],
            .transform = side ? args->v_transform : args->k_transform,
            .n_tokens = tokens->n_tokens,
        };
        ksort_status status = report(tokens, ksort_pack(&pack, 0, 1));
        if (status != KSORT_OK)
            return status;
    }
    return KSORT_OK;
}

static int are_strides_large_enough(const ksort_cuda_attend_args *args)
{
    size_t row = (size_t)args->n_heads * args->k->format.head_dim;
    return args->q_token_stride >= row && args->out_token_stride >= row;
}

ksort_status ksort_cuda_attend_workspace_bytes(const ksort_cuda_attend_args *args, size_t *bytes)
{
    if (args->struct_size != sizeof *args || !are_strides_large_enough(args))
        return KSORT_ERR_ARGUMENT;
    *bytes = (size_t)256 * args->tokens->n_tokens;
    return KSORT_OK;
}

ksort_status ksort_cuda_attend(const ksort_cuda_attend_args *args, void *stream)
{
    (void)stream;
    const ksort_cuda_tokens *tokens = args->tokens;
    if (args->struct_size != sizeof *args || !is_supported(args->k, tokens, args->x_type) ||
        !is_supported(args->v, tokens, args->x_type) || !are_strides_large_enough(args) ||
        (uint32_t)tokens->n_cached[0] + tokens->n_tokens > args->max_slots)
        return KSORT_ERR_ARGUMENT;
    if (!args->workspace || args->workspace_bytes < (size_t)256 * tokens->n_tokens)
        return KSORT_ERR_WORKSPACE;
    ksort_exact exact[2];
    ksort_cache k = host_cache(args->k, &exact[0]), v = host_cache(args->v, &exact[1]);
    ksort_rope rope = host_rope(args->rope, tokens);
    ksort_attend_args attend = {
        .struct_size = sizeof attend,
        .k = &k,
        .v = &v,
        .rope = &rope,
        .k_transform = args->k_transform,
        .v_transform = args->v_transform,
        .q = args->q,
        .q_token_stride = args->q_token_stride,
        .out = args->out,
        .out_token_stride = args->out_token_stride,
        .first_slot = (size_t)tokens->n_cached[0],
        .n_queries = tokens->n_tokens,
        .n_heads = args->n_heads,
        .window = args->window,
        .query_type = KSORT_BFP16,
        .scale = args->scale,
    };
    ksort_status status = ksort_attend_workspace_bytes(&attend, 1, &attend.workspace_bytes);
    if (status != KSORT_OK)
        return status;
    attend.workspace_bytes = (attend.workspace_bytes + KSORT_ALIGNMENT - 1) / KSORT_ALIGNMENT * KSORT_ALIGNMENT;
    attend.workspace = aligned_alloc(KSORT_ALIGNMENT, attend.workspace_bytes);
    status = ksort_attend(&attend, 0, 1);
    if (status == KSORT_OK)
        status = ksort_attend_merge(&attend, 0, 1);
    free(attend.workspace);
    return report(tokens, status);
}
