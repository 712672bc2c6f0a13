/* ksort_pack: checks, then writes. With a transform, up to GROUP_TOKENS tokens of a head are rounded together.
 *
 *     x [tokens][heads][head_dim]            items, head-major:  head 0: tokens 0 1 2 ..., head 1: tokens 0 1 2 ...
 *                                            parts:              |--- 0 ---|--- 1 ---|--- 2 ---|
 *
 * Head-major, because 16 tokens of a strip share each 64-byte line of words: one part fills whole lines.
 */
#include <float.h>
#include <math.h>

#include "check.h"
#include "half.h"
#include "pack.h"
#include "rounding.h"
#include "transform.h"

/* Transformed heads lie below it: no sum or error of the encoder comes near float32's largest. */
#define TRANSFORMED_LIMIT 0x1p120f

ksort_status ksort_pack_prepare(const ksort_pack_args *from, struct pack_job *job)
{
    ksort_pack_args *args = &job->args;
    ksort_status status = READ_STRUCT(args, from, n_tokens);
    if (status != KSORT_OK)
        return status;
    job->growth = 1.0;
    job->kernels = ksort_kernel_table();
    if (!job->kernels)
        return KSORT_ERR_KERNELS;
    status = ksort_read_cache(args->cache, true, &job->cache, &job->layout);
    if (status == KSORT_OK)
        status = ksort_read_exact(&job->cache, true, &job->exact);
    if (status == KSORT_OK)
        status = ksort_check_slots(&job->cache, args->first_slot, args->n_tokens);
    if (status != KSORT_OK)
        return status;
    uint32_t n_kv_heads = job->cache.n_kv_heads, head_dim = job->layout.head_dim;
    if (!args->x || check_rows(args->n_tokens, args->x_token_stride, (size_t)n_kv_heads * head_dim) != KSORT_OK)
        return KSORT_ERR_ARGUMENT;
    job->exact_layout = ksort_exact_layout(head_dim);
    if (args->transform)
        status = ksort_read_transform(args->transform, job->kernels, &job->layout, n_kv_heads, &job->transform);
    if (status == KSORT_OK && args->rope)
        status = ksort_read_rope(args->rope, n_kv_heads, head_dim, args->n_tokens, &job->rope, &job->growth);
    args->cache = &job->cache;
    args->rope = args->rope ? &job->rope : NULL;
    args->transform = args->transform ? &job->transform : NULL;
    return status;
}

/* The largest magnitude after RoPE and transform that is accepted. */
static float largest_storable(const struct pack_job *job)
{
    uint32_t type = job->layout.type;
    if (job->args.cache->exact)
        return F16_MAX;
    if (job->layout.is_scaled)
        return (float)((1 << (job->layout.mantissa_bits - 1)) - 1) * SCALE_MAX;
    if (job->args.transform)
        return nextafterf(TRANSFORMED_LIMIT, 0.0f);
    return type == KSORT_F16 ? F16_MAX : type == KSORT_BF16 ? BF16_MAX : FLT_MAX;
}

/* The head after RoPE: x itself, or rotated in buffer [head_dim]. */
static const float *rotated_head(const struct pack_job *job, uint32_t token, uint32_t head, float *buffer)
{
    const ksort_pack_args *args = &job->args;
    uint32_t head_dim = job->layout.head_dim;
    const float *x = args->x + token * args->x_token_stride + (size_t)head * head_dim;
    if (!args->rope)
        return x;
    struct rope_row row = rope_row_of(args->rope, head_dim, head, token);
    job->kernels->rope(&row, x, head_dim, buffer);
    return buffer;
}

/* y [head_dim], which may be `buffer` itself, shifted, scaled and rotated in buffer. */
static const float *transformed_head(const struct pack_job *job, const float *y, uint32_t head, float *buffer)
{
    uint32_t head_dim = job->layout.head_dim;
    struct head_transform transform = ksort_head_transform(job->args.transform, head_dim, head);
    memmove(buffer, y, head_dim * sizeof *y);
    job->kernels->transform_key(&transform, head_dim, buffer);
    return buffer;
}

/* The exact check, for values so large that the bound does not settle it. RoPE or a transform that overflows float32 is
 * found too: neither infinity nor NaN (infinity minus infinity) has a magnitude up to the limit. */
static bool packed_tokens_fit(const struct pack_job *job, struct range tokens, float limit)
{
    float buffer[KSORT_MAX_HEAD_DIM];
    for (size_t token = tokens.begin; token < tokens.end; token++)
        for (uint32_t head = 0; head < job->args.cache->n_kv_heads; head++) {
            const float *y = rotated_head(job, (uint32_t)token, head, buffer);
            if (job->args.transform)
                y = transformed_head(job, y, head, buffer);
            if (job->kernels->max_magnitude(y, job->layout.head_dim) > float_bits(limit))
                return false;
        }
    return true;
}

ksort_status ksort_pack_check(const struct pack_job *job, uint32_t ith, uint32_t nth)
{
    const ksort_pack_args *args = &job->args;
    struct range tokens = share_of(args->n_tokens, ith, nth);
    size_t token_values = (size_t)args->cache->n_kv_heads * job->layout.head_dim;
    uint32_t max = 0;
    for (size_t token = tokens.begin; token < tokens.end; token++) {
        uint32_t magnitude = job->kernels->max_magnitude(args->x + token * args->x_token_stride, token_values);
        max = magnitude > max ? magnitude : max;
    }
    if (max >= FLOAT_MAGNITUDE_INF)
        return KSORT_ERR_NON_FINITE;
    float limit = largest_storable(job);
    /* growth is exact to float32 rounding of RoPE's three operations: 1e-6 covers them. */
    double bound = (double)bits_float(max) * job->growth * (1 + 1e-6);
    if (args->transform)
        bound = ksort_transformed_bound(job->kernels, args->transform, args->cache->n_kv_heads, job->layout.head_dim,
                                        bound);
    if (bound <= (double)limit)
        return KSORT_OK;
    return packed_tokens_fit(job, tokens, limit) ? KSORT_OK : KSORT_ERR_RANGE;
}

static uint8_t *slot_tile(const struct pack_job *job, size_t slot, uint32_t head)
{
    return tile_of(job->args.cache, slot / KSORT_TILE_TOKENS, head);
}

/* Tokens 0 .. n_tokens-1 of a head, whose padding quads are 0, from slot first_slot on. */
static void store_encoded(const struct pack_job *job, const struct encoded_tokens *encoded, uint32_t n_tokens,
                          size_t first_slot, uint32_t head)
{
    const struct head_layout *layout = &job->layout;
    for (uint32_t t = 0, n; t < n_tokens; t += n) {
        uint32_t token = (uint32_t)((first_slot + t) % KSORT_TILE_TOKENS);
        uint8_t *tile = slot_tile(job, first_slot + t, head);
        n = (uint32_t)min_size(n_tokens - t, STRIP_TOKENS - token % STRIP_TOKENS);
        ksort_store_columns(layout, &encoded->quads[0][t], GROUP_TOKENS, n, tile, token);
        for (uint32_t b = 0; b < layout->n_blocks; b++)
            memcpy(tile + exponent_offset(layout, b, token), &encoded->exponents[b][t], n);
    }
}

static void write_head(const struct pack_job *job, const float *y, uint8_t *tile, uint32_t token)
{
    const struct head_layout *layout = &job->layout;
    if (is_bfp(layout->type)) {
        union token_mantissas mantissas = {.quads = {0}}; /* padding channels stay 0 */
        uint8_t exponents[MAX_BLOCKS];
        round_function *round = layout->is_scaled ? job->kernels->round_sbfp : job->kernels->round_bfp;
        round(y, layout->head_dim, layout->block_size, layout->mantissa_bits, mantissas.channels, exponents);
        ksort_store_mantissas(layout, &mantissas, tile, token);
        for (uint32_t b = 0; b < layout->n_blocks; b++)
            tile[exponent_offset(layout, b, token)] = exponents[b];
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

/* Stores the head y [head_dim] of the call's token, as it is before rounding, where the cache keeps exact rows of its
 * slot. */
static void write_exact(const struct pack_job *job, const float *y, uint32_t head, size_t token)
{
    const ksort_exact *exact = job->args.cache->exact;
    size_t slot = job->args.first_slot + token, row = row_offset(&job->exact_layout, slot % KSORT_TILE_TOKENS);
    uint32_t head_dim = job->layout.head_dim;
    if (slot < exact->n_sinks)
        job->kernels->store_f16(y, head_dim, (uint16_t *)(exact_sinks(exact, head) + row));
    if (job->args.n_tokens - token <= (size_t)exact->n_tiles * KSORT_TILE_TOKENS)
        job->kernels->store_f16(y, head_dim, (uint16_t *)(exact_tile(exact, slot / KSORT_TILE_TOKENS, head) + row));
}

/* Tokens begin .. end-1 of a head, without a transform. */
static void write_tokens(const struct pack_job *job, uint32_t head, struct range tokens)
{
    for (size_t token = tokens.begin; token < tokens.end; token++) {
        size_t slot = job->args.first_slot + token;
        float buffer[KSORT_MAX_HEAD_DIM];
        const float *y = rotated_head(job, (uint32_t)token, head, buffer);
        write_head(job, y, slot_tile(job, slot, head), slot % KSORT_TILE_TOKENS);
        if (job->args.cache->exact)
            write_exact(job, y, head, token);
    }
}

/* The same with a transform. */
static void write_transformed_tokens(const struct pack_job *job, uint32_t head, struct range tokens)
{
    const struct head_layout *layout = &job->layout;
    struct head_transform transform = ksort_head_transform(job->args.transform, layout->head_dim, head);
    float rotated[GROUP_TOKENS][KSORT_MAX_HEAD_DIM];
    struct encoded_tokens encoded;
    for (uint32_t quad = (layout->head_dim + 3) / 4; quad < layout->n_quads; quad++) /* padding */
        memset(encoded.quads[quad], 0, sizeof encoded.quads[quad]);
    for (size_t first = tokens.begin; first < tokens.end; first += GROUP_TOKENS) {
        uint32_t n_tokens = (uint32_t)min_size(GROUP_TOKENS, tokens.end - first);
        const float *heads = rotated_head(job, (uint32_t)first, head, rotated[0]);
        size_t stride = heads == rotated[0] ? KSORT_MAX_HEAD_DIM : job->args.x_token_stride;
        for (uint32_t i = 1; i < n_tokens && job->args.rope; i++)
            rotated_head(job, (uint32_t)first + i, head, rotated[i]);
        for (uint32_t i = 0; i < n_tokens && job->args.cache->exact; i++) {
            _Alignas(64) float buffer[KSORT_MAX_HEAD_DIM];
            write_exact(job, transformed_head(job, heads + i * stride, head, buffer), head, first + i);
        }
        job->kernels->encode_transformed(&transform, layout, n_tokens, heads, stride, &encoded);
        store_encoded(job, &encoded, n_tokens, job->args.first_slot + first, head);
    }
}

void ksort_pack_write(const struct pack_job *job, uint32_t ith, uint32_t nth)
{
    size_t n_tokens = job->args.n_tokens;
    struct range items = share_of(job->args.cache->n_kv_heads * n_tokens, ith, nth);
    for (size_t item = items.begin; item < items.end;) {
        size_t head = item / n_tokens, end = min_size(items.end, (head + 1) * n_tokens);
        struct range tokens = {item - head * n_tokens, end - head * n_tokens};
        if (job->args.transform)
            write_transformed_tokens(job, (uint32_t)head, tokens);
        else
            write_tokens(job, (uint32_t)head, tokens);
        item = end;
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
