#include "check.h"

#include "kernels.h"

/* Bytes from the start of the first to the end of the last of n pieces; false if that overflows or they overlap. */
static bool extent(size_t piece_bytes, size_t stride, size_t n, size_t *bytes)
{
    if (n > 1 && (stride < piece_bytes || stride > (PTRDIFF_MAX - piece_bytes) / (n - 1)))
        return false;
    *bytes = (n - 1) * stride + piece_bytes;
    return true;
}

/* Where tiles lie, of a cache or of exact rows. */
static ksort_status check_tiles(const void *base, bool with_memory, size_t tile_bytes, size_t n_tiles,
                                size_t tile_stride, uint32_t n_kv_heads, size_t head_stride)
{
    if (with_memory && !base)
        return KSORT_ERR_ARGUMENT;
    if (tile_stride % KSORT_ALIGNMENT || head_stride % KSORT_ALIGNMENT || (with_memory && !is_aligned(base)))
        return KSORT_ERR_ALIGNMENT;
    size_t inner, outer; /* tiles may lie within heads or heads within tiles */
    bool are_apart =
        (extent(tile_bytes, tile_stride, n_tiles, &inner) && extent(inner, head_stride, n_kv_heads, &outer)) ||
        (extent(tile_bytes, head_stride, n_kv_heads, &inner) && extent(inner, tile_stride, n_tiles, &outer));
    return are_apart ? KSORT_OK : KSORT_ERR_ARGUMENT;
}

ksort_status ksort_read_cache(const ksort_cache *from, bool with_memory, ksort_cache *cache, struct head_layout *layout)
{
    ksort_status status = READ_STRUCT(cache, from, n_kv_heads);
    if (status == KSORT_OK)
        status = ksort_layout_of(&cache->format, layout);
    if (status != KSORT_OK)
        return status;
    if (cache->n_kv_heads == 0 || cache->n_slots == 0)
        return KSORT_ERR_ARGUMENT;
    return check_tiles(cache->base, with_memory, layout->tile_bytes, (cache->n_slots - 1) / KSORT_TILE_TOKENS + 1,
                       cache->tile_stride, cache->n_kv_heads, cache->head_stride);
}

ksort_status ksort_read_exact(ksort_cache *cache, bool with_memory, ksort_exact *exact)
{
    if (!cache->exact)
        return KSORT_OK;
    ksort_status status = READ_STRUCT(exact, cache->exact, begin);
    if (status != KSORT_OK)
        return status;
    if (!is_bfp(cache->format.type))
        return KSORT_ERR_TYPE;
    if (exact->n_sinks > KSORT_TILE_TOKENS)
        return KSORT_ERR_ARGUMENT;
    cache->exact = exact;
    return check_tiles(exact->base, with_memory, ksort_exact_layout(cache->format.head_dim).tile_bytes,
                       (size_t)exact->n_tiles + 1, exact->tile_stride, cache->n_kv_heads, exact->head_stride);
}

ksort_status ksort_check_slots(const ksort_cache *cache, size_t first_slot, uint32_t n_tokens)
{
    bool inside = n_tokens > 0 && n_tokens <= cache->n_slots && first_slot <= cache->n_slots - n_tokens;
    return inside ? KSORT_OK : KSORT_ERR_ARGUMENT;
}

static bool head_pairs_up(const uint16_t *partner, const int8_t *sign, const uint16_t *frequency, uint32_t head_dim,
                          uint32_t n_frequencies)
{
    for (uint32_t c = 0; c < head_dim; c++) {
        if (partner[c] >= head_dim || sign[c] < -1 || sign[c] > 1)
            return false;
        if (sign[c] == 0)
            continue;
        if (frequency[c] >= n_frequencies || partner[partner[c]] != c || sign[partner[c]] != -sign[c])
            return false;
    }
    return true;
}

ksort_status ksort_read_rope(const ksort_rope *from, uint32_t n_kv_heads, uint32_t head_dim, uint32_t n_tokens,
                             ksort_rope *rope, double *growth)
{
    ksort_status status = READ_STRUCT(rope, from, sin);
    if (status != KSORT_OK)
        return status;
    if (rope->n_frequencies == 0 || !rope->partner || !rope->sign || !rope->frequency || !rope->cos || !rope->sin ||
        check_rows(n_tokens, rope->n_frequencies, rope->n_frequencies) != KSORT_OK)
        return KSORT_ERR_ARGUMENT;
    for (uint32_t h = 0; h < n_kv_heads; h++) {
        size_t at = (size_t)h * head_dim;
        if (!head_pairs_up(rope->partner + at, rope->sign + at, rope->frequency + at, head_dim, rope->n_frequencies))
            return KSORT_ERR_ROPE;
    }
    const struct kernels *kernels = ksort_kernel_table();
    if (!kernels)
        return KSORT_ERR_KERNELS;
    size_t n = (size_t)n_tokens * rope->n_frequencies;
    uint32_t max_cos = kernels->max_magnitude(rope->cos, n), max_sin = kernels->max_magnitude(rope->sin, n);
    if (max_cos >= FLOAT_MAGNITUDE_INF || max_sin >= FLOAT_MAGNITUDE_INF)
        return KSORT_ERR_ROPE;
    double sum = (double)bits_float(max_cos) + (double)bits_float(max_sin);
    *growth = sum > 1.0 ? sum : 1.0;
    return KSORT_OK;
}
