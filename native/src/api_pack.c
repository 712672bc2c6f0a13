/* ksort_pack: checks, then writes.
 *
 *     x [tokens][heads][head_dim]            items, head-major:  head 0: tokens 0 1 2 ..., head 1: tokens 0 1 2 ...
 *                                            parts:              |--- 0 ---|--- 1 ---|--- 2 ---|
 *
 * Head-major, because 16 tokens of a strip share each 64-byte line of words: one part fills whole lines.
 */
#include <float.h>

#include "check.h"
#include "half.h"
#include "pack.h"

ksort_status ksort_pack_prepare(const ksort_pack_args *args, struct pack_job *job)
{
    if (!args)
        return KSORT_ERR_ARGUMENT;
    if (args->struct_size != sizeof *args)
        return KSORT_ERR_STRUCT_SIZE;
    *job = (struct pack_job){.args = args, .kernels = ksort_kernel_table(), .growth = 1.0};
    if (!job->kernels)
        return KSORT_ERR_KERNELS;
    const ksort_cache *cache = args->cache;
    ksort_status status = ksort_check_cache(cache, true, &job->layout);
    if (status == KSORT_OK)
        status = ksort_check_slots(cache, args->first_slot, args->n_tokens);
    if (status != KSORT_OK)
        return status;
    if (!args->x)
        return KSORT_ERR_ARGUMENT;
    status = ksort_check_rows(args->n_tokens, args->x_token_stride, (size_t)cache->n_kv_heads * job->layout.head_dim);
    if (status != KSORT_OK)
        return status;
    if (!args->rope)
        return KSORT_OK;
    return ksort_check_rope(args->rope, cache->n_kv_heads, job->layout.head_dim, args->n_tokens, &job->growth);
}

static float largest_storable(uint32_t type)
{
    return type == KSORT_F16 ? F16_MAX : type == KSORT_BF16 ? BF16_MAX : FLT_MAX;
}

/* The head after RoPE: x itself, or rotated in buffer [head_dim]. */
static const float *rotated_head(const struct pack_job *job, uint32_t token, uint32_t head, float *buffer)
{
    const ksort_pack_args *args = job->args;
    uint32_t head_dim = job->layout.head_dim;
    const float *x = args->x + token * args->x_token_stride + (size_t)head * head_dim;
    if (!args->rope)
        return x;
    struct rope_row row = rope_row_of(args->rope, head_dim, head, token);
    job->kernels->rope(&row, x, head_dim, buffer);
    return buffer;
}

/* The exact check, for values so large that the bound does not settle it. RoPE that overflows float32 is found too:
 * neither infinity nor NaN (infinity minus infinity) has a magnitude up to the limit. */
static bool rotated_tokens_fit(const struct pack_job *job, struct range tokens, float limit)
{
    float buffer[KSORT_MAX_HEAD_DIM];
    for (size_t token = tokens.begin; token < tokens.end; token++)
        for (uint32_t head = 0; head < job->args->cache->n_kv_heads; head++) {
            const float *y = rotated_head(job, (uint32_t)token, head, buffer);
            if (job->kernels->max_magnitude(y, job->layout.head_dim) > float_bits(limit))
                return false;
        }
    return true;
}

ksort_status ksort_pack_check(const struct pack_job *job, uint32_t ith, uint32_t nth)
{
    const ksort_pack_args *args = job->args;
    struct range tokens = share_of(args->n_tokens, ith, nth);
    size_t token_values = (size_t)args->cache->n_kv_heads * job->layout.head_dim;
    uint32_t max = 0;
    for (size_t token = tokens.begin; token < tokens.end; token++) {
        uint32_t magnitude = job->kernels->max_magnitude(args->x + token * args->x_token_stride, token_values);
        max = magnitude > max ? magnitude : max;
    }
    if (max >= FLOAT_MAGNITUDE_INF)
        return KSORT_ERR_NON_FINITE;
    float limit = largest_storable(job->layout.type);
    /* growth is exact to float32 rounding of RoPE's three operations: 1e-6 covers them. */
    if ((double)bits_float(max) * job->growth * (1 + 1e-6) <= (double)limit)
        return KSORT_OK;
    return rotated_tokens_fit(job, tokens, limit) ? KSORT_OK : KSORT_ERR_RANGE;
}

static void write_bfp(const struct pack_job *job, const float *y, uint8_t *tile, uint32_t token)
{
    const struct head_layout *layout = &job->layout;
    union token_mantissas mantissas = {.quads = {0}}; /* padding channels stay 0 */
    uint8_t exponents[MAX_BLOCKS];
    job->kernels->round_bfp(y, layout->head_dim, layout->block_size, layout->mantissa_bits, mantissas.channels,
                            exponents);
    ksort_store_mantissas(layout, &mantissas, tile, token);
    for (uint32_t b = 0; b < layout->n_blocks; b++)
        tile[exponent_offset(layout, b, token)] = exponents[b];
}

static void write_head(const struct pack_job *job, const float *y, uint8_t *tile, uint32_t token)
{
    const struct head_layout *layout = &job->layout;
    if (is_bfp(layout->type)) {
        write_bfp(job, y, tile, token);
        return;
    }
    void *row = tile + row_offset(layout, token);
    if (layout->type == KSORT_F32)
        memcpy(row, y, layout->head_dim * sizeof *y);
    else if (layout->type == KSORT_F16)
        job->kernels->store_f16(y, layout->head_dim, row);
    else
        job->kernels->store_bf16(y, layout->head_dim, row);
}

void ksort_pack_write(const struct pack_job *job, uint32_t ith, uint32_t nth)
{
    const ksort_pack_args *args = job->args;
    struct range items = share_of((size_t)args->cache->n_kv_heads * args->n_tokens, ith, nth);
    for (size_t item = items.begin; item < items.end; item++) {
        uint32_t head = (uint32_t)(item / args->n_tokens), token = (uint32_t)(item % args->n_tokens);
        size_t slot = args->first_slot + token;
        float buffer[KSORT_MAX_HEAD_DIM];
        const float *y = rotated_head(job, token, head, buffer);
        write_head(job, y, tile_of(args->cache, slot / KSORT_TILE_TOKENS, head), slot % KSORT_TILE_TOKENS);
    }
}

ksort_status ksort_pack(const ksort_pack_args *args, uint32_t ith, uint32_t nth)
{
    struct pack_job job;
    if (ith >= nth)
        return KSORT_ERR_ARGUMENT;
    ksort_status status = ksort_pack_prepare(args, &job);
    if (status == KSORT_OK)
        status = ksort_pack_check(&job, 0, 1);
    if (status == KSORT_OK)
        ksort_pack_write(&job, ith, nth);
    return status;
}
