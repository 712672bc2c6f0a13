/* ksort_attend and its two companions: argument checks around attend_part.c. */
#include "attend.h"
#include "check.h"
#include "transform.h"

/* Whether the ring holds the tail of every query. */
static bool tails_fit(const ksort_exact *exact, const ksort_attend_args *args)
{
    size_t end = args->first_slot + args->n_queries, rows = (size_t)exact->n_tiles * KSORT_TILE_TOKENS;
    return exact->n_tail == 0 || min_size((size_t)exact->n_tail + args->n_queries - 1, end) <= rows;
}

static ksort_status check_exact(struct attend_job *job)
{
    const ksort_exact *k = job->k_cache.exact, *v = job->v_cache.exact;
    job->exact = k ? k : v;
    job->exact_layout = ksort_exact_layout(job->k.head_dim);
    if (k && v && (k->n_tail != v->n_tail || k->n_sinks != v->n_sinks || k->begin != v->begin))
        return KSORT_ERR_ARGUMENT; /* a tile has one cut */
    bool fit = (!k || tails_fit(k, &job->args)) && (!v || tails_fit(v, &job->args));
    return fit ? KSORT_OK : KSORT_ERR_ARGUMENT;
}

static ksort_status read_caches(struct attend_job *job, bool with_memory)
{
    ksort_attend_args *args = &job->args;
    ksort_status status = ksort_read_cache(args->k, with_memory, &job->k_cache, &job->k);
    if (status == KSORT_OK)
        status = ksort_read_cache(args->v, with_memory, &job->v_cache, &job->v);
    if (status != KSORT_OK)
        return status;
    args->k = &job->k_cache;
    args->v = &job->v_cache;
    status = ksort_read_exact(&job->k_cache, with_memory, &job->k_exact);
    if (status == KSORT_OK)
        status = ksort_read_exact(&job->v_cache, with_memory, &job->v_exact);
    if (status != KSORT_OK)
        return status;
    if (args->query_type != KSORT_F32 && args->query_type != KSORT_BFP16)
        return KSORT_ERR_TYPE;
    if (job->k.head_dim != job->v.head_dim)
        return KSORT_ERR_HEAD_DIM;
    if (args->n_heads == 0)
        return KSORT_ERR_ARGUMENT;
    if (args->k->n_kv_heads != args->v->n_kv_heads || args->n_heads % args->k->n_kv_heads)
        return KSORT_ERR_HEADS;
    if (args->query_type == KSORT_BFP16)
        status = ksort_check_block_size(job->k.block_size, job->k.head_dim);
    if (status == KSORT_OK)
        status = ksort_check_slots(args->k, args->first_slot, args->n_queries);
    if (status == KSORT_OK)
        status = ksort_check_slots(args->v, args->first_slot, args->n_queries);
    return status == KSORT_OK ? check_exact(job) : status;
}

static ksort_status read_tables(struct attend_job *job)
{
    ksort_attend_args *args = &job->args;
    uint32_t n_kv_heads = job->k_cache.n_kv_heads;
    ksort_status status = KSORT_OK;
    double growth;
    if (args->k_transform)
        status = ksort_read_transform(args->k_transform, job->kernels, &job->k, n_kv_heads, &job->k_transform);
    if (status == KSORT_OK && args->v_transform)
        status = ksort_read_transform(args->v_transform, job->kernels, &job->v, n_kv_heads, &job->v_transform);
    if (status == KSORT_OK && args->rope)
        status = ksort_read_rope(args->rope, n_kv_heads, job->k.head_dim, args->n_queries, &job->rope, &growth);
    args->k_transform = args->k_transform ? &job->k_transform : NULL;
    args->v_transform = args->v_transform ? &job->v_transform : NULL;
    args->rope = args->rope ? &job->rope : NULL;
    return status;
}

static ksort_status check_memory(const ksort_attend_args *args, uint32_t nth)
{
    if (!args->q || !args->out || !args->workspace)
        return KSORT_ERR_ARGUMENT;
    if (!is_aligned(args->workspace))
        return KSORT_ERR_ALIGNMENT;
    return args->workspace_bytes / sizeof(struct attend_scratch) < nth ? KSORT_ERR_WORKSPACE : KSORT_OK;
}

ksort_status ksort_attend_prepare(const ksort_attend_args *from, uint32_t nth, bool with_memory, struct attend_job *job)
{
    ksort_attend_args *args = &job->args;
    ksort_status status = nth ? READ_STRUCT(args, from, scale) : KSORT_ERR_ARGUMENT;
    if (status != KSORT_OK)
        return status;
    job->kernels = ksort_kernel_table();
    if (!job->kernels)
        return KSORT_ERR_KERNELS;
    status = read_caches(job, with_memory);
    if (status != KSORT_OK)
        return status;
    size_t token_values = (size_t)args->n_heads * job->k.head_dim;
    if (check_rows(args->n_queries, args->q_token_stride, token_values) != KSORT_OK ||
        check_rows(args->n_queries, args->out_token_stride, token_values) != KSORT_OK || !isfinite(args->scale))
        return KSORT_ERR_ARGUMENT;
    job->group = args->n_heads / args->k->n_kv_heads;
    job->stride = (job->v.head_dim + 15) / 16 * 16; /* rows of accumulators start on a cache line */
    if (!with_memory)
        return KSORT_OK;
    status = check_memory(args, nth);
    if (status == KSORT_OK)
        status = read_tables(job);
    if (status == KSORT_OK)
        ksort_count_work(job);
    return status;
}

ksort_status ksort_attend_check(const struct attend_job *job, uint32_t ith, uint32_t nth)
{
    const ksort_attend_args *args = &job->args;
    struct range tokens = share_of(args->n_queries, ith, nth);
    size_t token_values = (size_t)args->n_heads * job->k.head_dim;
    for (size_t token = tokens.begin; token < tokens.end; token++)
        if (job->kernels->max_magnitude(args->q + token * args->q_token_stride, token_values) >= FLOAT_MAGNITUDE_INF)
            return KSORT_ERR_NON_FINITE;
    return KSORT_OK;
}

ksort_status ksort_attend_workspace_bytes(const ksort_attend_args *args, uint32_t nth, size_t *bytes)
{
    struct attend_job job;
    size_t n_parts = nth;
    ksort_status status = bytes ? ksort_attend_prepare(args, nth, false, &job) : KSORT_ERR_ARGUMENT;
    if (status == KSORT_OK && n_parts > SIZE_MAX / sizeof(struct attend_scratch))
        status = KSORT_ERR_ARGUMENT;
    if (status == KSORT_OK)
        *bytes = n_parts * sizeof(struct attend_scratch);
    return status;
}

ksort_status ksort_attend(const ksort_attend_args *args, uint32_t ith, uint32_t nth)
{
    struct attend_job job;
    ksort_status status = ith < nth ? ksort_attend_prepare(args, nth, true, &job) : KSORT_ERR_ARGUMENT;
    if (status == KSORT_OK)
        status = ksort_attend_check(&job, 0, 1);
    return status == KSORT_OK ? ksort_attend_run(&job, ith, nth) : status;
}

ksort_status ksort_attend_merge(const ksort_attend_args *args, uint32_t ith, uint32_t nth)
{
    struct attend_job job;
    ksort_status status = ith < nth ? ksort_attend_prepare(args, nth, true, &job) : KSORT_ERR_ARGUMENT;
    return status == KSORT_OK ? ksort_attend_join(&job, ith, nth) : status;
}
