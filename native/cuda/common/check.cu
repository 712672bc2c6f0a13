#include "common/check.cuh"

#include "common/head_dim.cuh"
#include "common/structs.cuh"

#include <utility>

namespace {

constexpr size_t DATA_ALIGNMENT = 16; /* bytes; of x, q and out */
constexpr size_t STRIDE_ELEMENTS = 8; /* what strides of x, q and out are multiples of */
constexpr uint32_t MAX_COUNT = 65535; /* of contexts and of KV heads */

/* Equal pieces along one direction of an array: n of them, `stride` apart. */
struct pieces {
    size_t stride;
    size_t n;
};

/* Whether pieces of `size`, repeated along all directions at once, lie apart and span at most PTRDIFF_MAX. Which
 * direction is the innermost follows from the strides; one of a single piece may have any. */
template <size_t N>
bool pieces_are_apart(size_t size, pieces (&directions)[N])
{
    for (size_t i = 1; i < N; i++)
        for (size_t j = i; j > 0 && directions[j].stride < directions[j - 1].stride; j--)
            std::swap(directions[j], directions[j - 1]);
    for (const pieces &direction : directions) {
        if (direction.n == 1)
            continue;
        if (direction.stride < size || direction.stride > (PTRDIFF_MAX - size) / (direction.n - 1))
            return false;
        size += (direction.n - 1) * direction.stride;
    }
    return true;
}

/* How many pages a page table chooses from only the caller knows: then two neighbours are looked at. */
bool tiles_are_apart(const ksort_cuda_cache &cache, size_t tile_bytes)
{
    size_t n_pages = cache.page_table ? 2 : (size_t)cache.n_contexts * cache.context_pages;
    pieces directions[] = {
        {cache.tile_stride, cache.page_tiles}, {cache.head_stride, cache.n_kv_heads}, {cache.page_stride, n_pages}};
    return pieces_are_apart(tile_bytes, directions);
}

/* Counts that are not zero, and whose products fit the 32 bits in which kernels count slots and pages. */
bool counts_fit(const ksort_cuda_cache &cache)
{
    bool are_counts = cache.n_contexts && cache.n_contexts <= MAX_COUNT && cache.n_kv_heads &&
                      cache.n_kv_heads <= MAX_COUNT && cache.context_pages && cache.page_tiles;
    return are_counts && (uint64_t)cache.n_contexts * cache.context_pages <= INT32_MAX &&
           (uint64_t)cache.context_pages * cache.page_tiles <= INT32_MAX / KSORT_TILE_TOKENS;
}

bool is_head_dim(uint32_t head_dim)
{
    return with_head_dim(head_dim, false, [](auto) { return true; });
}

bool is_value_type(uint32_t type)
{
    return type == KSORT_F16 || type == KSORT_BF16 || type == KSORT_BFP16 || type == KSORT_BFP12 ||
           type == KSORT_SBFP12 || type == KSORT_SBFP11;
}

ksort_status check_cache(const ksort_cuda_cache *cache, bool is_allowed(uint32_t type), memory memory,
                         device_cache *checked)
{
    ksort_cuda_cache &pages = checked->pages;
    ksort_status status = read_struct(cache, &pages);
    if (status == KSORT_OK)
        status = ksort_layout_of(&pages.format, &checked->layout);
    if (status != KSORT_OK)
        return status;
    if (!is_allowed(pages.format.type))
        return KSORT_ERR_TYPE;
    if (!is_head_dim(pages.format.head_dim))
        return KSORT_ERR_HEAD_DIM;
    if (!counts_fit(pages) || (memory == memory::needed && !pages.base))
        return KSORT_ERR_ARGUMENT;
    if (pages.page_stride % KSORT_ALIGNMENT || pages.tile_stride % KSORT_ALIGNMENT ||
        pages.head_stride % KSORT_ALIGNMENT || (memory == memory::needed && !is_aligned(pages.base, KSORT_ALIGNMENT)))
        return KSORT_ERR_ALIGNMENT;
    return tiles_are_apart(pages, checked->layout.tile_bytes) ? KSORT_OK : KSORT_ERR_ARGUMENT;
}

ksort_status check_exact(memory memory, device_cache *checked)
{
    const ksort_cuda_cache &pages = checked->pages;
    ksort_cuda_exact &exact = checked->exact;
    if (!pages.exact)
        return KSORT_OK;
    ksort_status status = read_struct(pages.exact, &exact);
    if (status != KSORT_OK)
        return status;
    if (!is_bfp(pages.format.type))
        return KSORT_ERR_TYPE;
    const bool has_memory = exact.base && exact.begin;
    if (exact.n_sinks > KSORT_TILE_TOKENS || exact.n_tiles > INT32_MAX / KSORT_TILE_TOKENS ||
        (memory == memory::needed && !has_memory))
        return KSORT_ERR_ARGUMENT;
    if (exact.context_stride % KSORT_ALIGNMENT || exact.tile_stride % KSORT_ALIGNMENT ||
        exact.head_stride % KSORT_ALIGNMENT || (memory == memory::needed && !is_aligned(exact.base, KSORT_ALIGNMENT)))
        return KSORT_ERR_ALIGNMENT;
    pieces directions[] = {{exact.tile_stride, (size_t)exact.n_tiles + 1},
                           {exact.head_stride, pages.n_kv_heads},
                           {exact.context_stride, pages.n_contexts}};
    const size_t tile_bytes = (size_t)KSORT_TILE_TOKENS * pages.format.head_dim * sizeof(uint16_t);
    return pieces_are_apart(tile_bytes, directions) ? KSORT_OK : KSORT_ERR_ARGUMENT;
}

ksort_status check_with_exact(const ksort_cuda_cache *cache, bool is_allowed(uint32_t type), memory memory,
                              device_cache *checked)
{
    ksort_status status = check_cache(cache, is_allowed, memory, checked);
    return status == KSORT_OK ? check_exact(memory, checked) : status;
}

} // namespace

ksort_status check_k_cache(const ksort_cuda_cache *cache, memory memory, device_cache *checked)
{
    return check_with_exact(cache, is_bfp, memory, checked);
}

ksort_status check_v_cache(const ksort_cuda_cache *cache, memory memory, device_cache *checked)
{
    return check_with_exact(cache, is_value_type, memory, checked);
}

ksort_status check_pair(const device_cache &k, const device_cache &v)
{
    if (k.layout.head_dim != v.layout.head_dim)
        return KSORT_ERR_HEAD_DIM;
    if (k.pages.n_kv_heads != v.pages.n_kv_heads)
        return KSORT_ERR_HEADS;
    return k.pages.n_contexts == v.pages.n_contexts ? KSORT_OK : KSORT_ERR_ARGUMENT;
}

ksort_status check_exact_pair(const device_cache &k, const device_cache &v, uint32_t n_tokens, uint32_t max_slots)
{
    if (!has_exact(k))
        return has_exact(v) ? KSORT_ERR_ARGUMENT : KSORT_OK;
    if (v.layout.type == KSORT_BF16)
        return KSORT_ERR_TYPE;
    const uint64_t rows = (uint64_t)k.exact.n_tiles * KSORT_TILE_TOKENS;
    const uint64_t needed = (uint64_t)k.exact.n_tail + n_tokens - 1;
    if (k.exact.n_tail && rows < (needed < max_slots ? needed : max_slots))
        return KSORT_ERR_ARGUMENT;
    if (v.layout.type == KSORT_F16)
        return KSORT_OK;
    const bool are_alike = has_exact(v) && v.exact.n_tail == k.exact.n_tail && v.exact.n_sinks == k.exact.n_sinks &&
                           v.exact.n_tiles == k.exact.n_tiles;
    return are_alike ? KSORT_OK : KSORT_ERR_ARGUMENT;
}

ksort_status check_tokens(const ksort_cuda_tokens *tokens, const device_cache &cache, memory memory,
                          ksort_cuda_tokens *checked)
{
    ksort_status status = read_struct(tokens, checked);
    if (status != KSORT_OK)
        return status;
    bool has_memory = checked->n_cached && checked->device_status;
    bool fits = checked->n_contexts == cache.pages.n_contexts && checked->n_tokens && checked->n_tokens <= INT32_MAX;
    return fits && (has_memory || memory == memory::aside) ? KSORT_OK : KSORT_ERR_ARGUMENT;
}

ksort_status check_rope(const ksort_rope *rope, const ksort_cuda_tokens &tokens, memory memory, ksort_rope *checked)
{
    *checked = {};
    if (!rope)
        return KSORT_OK;
    ksort_status status = read_struct(rope, checked);
    if (status != KSORT_OK)
        return status;
    bool has_memory = checked->partner && checked->sign && checked->frequency && checked->cos && checked->sin;
    bool fits = checked->n_frequencies && tokens.n_positions;
    return fits && (has_memory || memory == memory::aside) ? KSORT_OK : KSORT_ERR_ARGUMENT;
}

ksort_status check_transform(const ksort_transform *transform, const device_cache &cache, ksort_transform *checked)
{
    *checked = {};
    if (!transform)
        return KSORT_OK;
    ksort_status status = read_struct(transform, checked);
    if (status != KSORT_OK)
        return status;
    if (!is_bfp(cache.layout.type))
        return KSORT_ERR_TYPE;
    return checked->rotate <= 1 ? KSORT_OK : KSORT_ERR_TRANSFORM;
}

ksort_status check_rows(const ksort_cuda_tokens &tokens, uint32_t x_type, size_t token_stride, size_t context_stride,
                        size_t row_elements)
{
    if (x_type != KSORT_F32 && x_type != KSORT_F16 && x_type != KSORT_BF16)
        return KSORT_ERR_TYPE;
    if (token_stride % STRIDE_ELEMENTS || context_stride % STRIDE_ELEMENTS)
        return KSORT_ERR_ALIGNMENT;
    size_t element_bytes = x_type == KSORT_F32 ? 4 : 2;
    if (token_stride > PTRDIFF_MAX / element_bytes || context_stride > PTRDIFF_MAX / element_bytes)
        return KSORT_ERR_ARGUMENT;
    pieces directions[] = {{token_stride * element_bytes, tokens.n_tokens},
                           {context_stride * element_bytes, tokens.n_contexts}};
    return pieces_are_apart(row_elements * element_bytes, directions) ? KSORT_OK : KSORT_ERR_ARGUMENT;
}

ksort_status check_data(const void *data)
{
    if (!data)
        return KSORT_ERR_ARGUMENT;
    return is_aligned(data, DATA_ALIGNMENT) ? KSORT_OK : KSORT_ERR_ALIGNMENT;
}
