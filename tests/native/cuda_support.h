/* What cuda_test.cu is made of: host memory and its copy on the device, random shapes, paged caches, tokens. */
#ifndef KSORT_TEST_CUDA_SUPPORT_H
#define KSORT_TEST_CUDA_SUPPORT_H

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <utility>
#include <vector>

#include "ksort_cuda.h"
#include "support.h"

inline void cuda_check(cudaError_t error, const char *file, int line) {
    if (error != cudaSuccess) check(0, cudaGetErrorString(error), file, line);
}
#define CUDA_OK(call) cuda_check((call), __FILE__, __LINE__)

/* n elements of device memory and not one more: compute-sanitizer sees what goes past them. */
template <typename T>
class device_array {
public:
    device_array() = default;
    explicit device_array(const std::vector<T> &host) : n(host.size()) {
        if (n == 0) return;
        CUDA_OK(cudaMalloc(&data, n * sizeof(T)));
        write(host.data());
    }
    device_array(device_array &&other) noexcept { swap(other); }
    device_array &operator=(device_array &&other) noexcept {
        swap(other);
        return *this;
    }
    ~device_array() { cudaFree(data); }

    void write(const T *host) { CUDA_OK(cudaMemcpy(data, host, n * sizeof(T), cudaMemcpyHostToDevice)); }
    std::vector<T> read() const {
        std::vector<T> host(n);
        CUDA_OK(cudaMemcpy(host.data(), data, n * sizeof(T), cudaMemcpyDeviceToHost));
        return host;
    }

    T *data = nullptr;
    size_t n = 0;

private:
    void swap(device_array &other) {
        std::swap(data, other.data);
        std::swap(n, other.n);
    }
};

/* About normal: the sum of 12 uniform numbers has variance 4. */
inline float rng_normal(rng *r) {
    float sum = 0.0f;
    for (int i = 0; i < 12; i++) sum += rng_float(r);
    return sum * 0.5f;
}

template <size_t N>
uint32_t pick(rng *r, const uint32_t (&choices)[N]) {
    return choices[rng_between(r, 0, N - 1)];
}

inline bool coin(rng *r) { return rng_next(r) >> 63; }

inline std::vector<uint16_t> random_permutation(rng *r, uint32_t n) {
    std::vector<uint16_t> order(n);
    for (uint32_t i = 0; i < n; i++) order[i] = (uint16_t)i;
    for (uint32_t i = n - 1; i > 0; i--) std::swap(order[i], order[rng_between(r, 0, i)]);
    return order;
}

/* Heads, contexts, lengths and pages of one problem. */
struct shape {
    uint32_t head_dim, n_heads, n_kv_heads, n_contexts, n_tokens, page_tiles, context_pages, x_type;
    ksort_format k, v;
    bool has_page_table;
    std::vector<int32_t> n_cached, n_new; /* [n_contexts] */

    uint32_t capacity() const { return context_pages * page_tiles * KSORT_TILE_TOKENS; }
    uint32_t most_slots() const {
        int32_t most = 1;
        for (uint32_t s = 0; s < n_contexts; s++) most = std::max(most, n_cached[s] + n_new[s]);
        return (uint32_t)most;
    }
};

/* Lengths near the ends of tiles, and of the cache, as often as any others. */
inline int32_t random_length(rng *r, uint32_t most) {
    if (coin(r)) return (int32_t)rng_between(r, 0, most);
    if (coin(r)) return (int32_t)most;
    uint32_t at_end = rng_between(r, 0, most) / KSORT_TILE_TOKENS * KSORT_TILE_TOKENS + rng_between(r, 0, 2);
    return (int32_t)std::min(at_end > 0 ? at_end - 1 : 0, most);
}

/* 60 indices in a row take every combination of head dimension, key type and value type. */
inline shape random_shape(rng *r, uint32_t index, uint32_t most_tokens) {
    static const uint32_t head_dims[] = {64, 80, 96, 128, 256}, groups[] = {1, 3, 4, 8, 16};
    static const uint32_t k_types[] = {KSORT_BFP16, KSORT_BFP14, KSORT_BFP12};
    static const uint32_t v_types[] = {KSORT_F16, KSORT_BF16, KSORT_BFP16, KSORT_BFP12};
    shape p;
    p.head_dim = head_dims[index % 5];
    p.k = random_format(r, k_types[index % 3], k_types[index % 3], p.head_dim);
    p.v = random_format(r, v_types[index % 4], v_types[index % 4], p.head_dim);
    p.n_kv_heads = rng_between(r, 1, 3);
    p.n_heads = p.n_kv_heads * pick(r, groups);
    p.n_contexts = rng_between(r, 1, 4);
    p.page_tiles = rng_between(r, 1, 3);
    p.context_pages = index % 8 == 0 ? rng_between(r, 6, 12) : rng_between(r, 1, 4);
    p.has_page_table = coin(r);
    p.x_type = rng_between(r, KSORT_F32, KSORT_BF16);
    p.n_tokens = std::min(rng_between(r, 1, most_tokens), p.capacity());
    for (uint32_t s = 0; s < p.n_contexts; s++) {
        p.n_new.push_back((int32_t)(rng_next(r) >> 62 ? p.n_tokens : rng_between(r, 0, p.n_tokens)));
        p.n_cached.push_back(random_length(r, p.capacity() - (uint32_t)p.n_new[s]));
    }
    return p;
}

/* A cache on the host, its copy on the device, and the CPU library's view of its tiles. */
class paged_cache {
public:
    paged_cache(rng *r, const shape &p, ksort_format format) {
        CHECK_OK(ksort_tile_bytes(&format, &tile_bytes));
        bool heads_inside = coin(r); /* of tiles; else tiles inside of heads */
        size_t gap = KSORT_ALIGNMENT * rng_between(r, 0, 2);
        size_t inner = tile_bytes + gap;
        cache = {sizeof cache, format};
        cache.tile_stride = heads_inside ? p.n_kv_heads * inner : inner;
        cache.head_stride = heads_inside ? inner : p.page_tiles * inner;
        cache.page_stride = (size_t)p.page_tiles * p.n_kv_heads * inner + gap;
        cache.context_pages = p.context_pages, cache.page_tiles = p.page_tiles;
        cache.n_contexts = p.n_contexts, cache.n_kv_heads = p.n_kv_heads;
        uint32_t n_entries = p.n_contexts * p.context_pages, n_pages = n_entries + (p.has_page_table ? 2 : 0);
        std::vector<uint16_t> order = random_permutation(r, n_pages);
        for (uint32_t i = 0; i < n_entries; i++) pages.push_back(p.has_page_table ? order[i] : (int32_t)i);
        bytes.resize(n_pages * cache.page_stride);
        tiles.reset(static_cast<uint8_t *>(std::aligned_alloc(KSORT_ALIGNMENT, bytes.size())));
        if (p.has_page_table) page_table = device_array<int32_t>(reached(p));
        cache.page_table = page_table.data;
    }

    /* Every byte of the host's memory: any, 0xFF (NaNs, the largest exponents) or 0. */
    void fill_any(rng *r) {
        for (size_t i = 0; i < bytes.size(); i++) tiles.get()[i] = (uint8_t)(rng_next(r) >> 56);
    }
    void fill_ones() { memset(tiles.get(), 0xFF, bytes.size()); }
    void fill_zeros() { memset(tiles.get(), 0, bytes.size()); }

    /* The host's bytes go to the device. */
    void upload() {
        memcpy(bytes.data(), tiles.get(), bytes.size());
        device = device_array<uint8_t>(bytes);
        cache.base = device.data;
    }
    bool device_has_same_bytes() const { return memcmp(device.read().data(), tiles.get(), bytes.size()) == 0; }

    /* One tile of one head, on the host, as a cache of its own. */
    ksort_cache tile_view(uint32_t context, uint32_t tile, uint32_t kv_head) const {
        size_t page = (size_t)pages[context * cache.context_pages + tile / cache.page_tiles];
        size_t at = page * cache.page_stride + tile % cache.page_tiles * cache.tile_stride +
                    kv_head * cache.head_stride;
        return {sizeof(ksort_cache), cache.format, tiles.get() + at, tile_bytes, tile_bytes, KSORT_TILE_TOKENS, 1};
    }

    ksort_cuda_cache cache;
    size_t tile_bytes = 0;

private:
    /* The page table, in which pages that no token reaches are far outside of the memory. */
    std::vector<int32_t> reached(const shape &p) const {
        std::vector<int32_t> entries = pages;
        uint32_t page_slots = p.page_tiles * KSORT_TILE_TOKENS;
        for (uint32_t s = 0; s < p.n_contexts; s++)
            for (uint32_t i = 0; i < p.context_pages; i++)
                if (i * page_slots >= (uint32_t)(p.n_cached[s] + p.n_new[s]))
                    entries[s * p.context_pages + i] = 1 << 30;
        return entries;
    }

    struct release {
        void operator()(uint8_t *memory) const { std::free(memory); }
    };
    std::vector<int32_t> pages;
    std::vector<uint8_t> bytes;
    std::unique_ptr<uint8_t, release> tiles;
    device_array<uint8_t> device;
    device_array<int32_t> page_table;
};

/* The tokens of a call, on the device. */
struct device_tokens {
    explicit device_tokens(const shape &p)
        : n_cached(p.n_cached), n_new(p.n_new), status(std::vector<int32_t>(1, KSORT_OK)),
          tokens{sizeof tokens, n_cached.data, n_new.data, p.n_contexts, p.n_tokens, p.capacity(), status.data} {}

    /* After all that was enqueued. */
    int32_t read_status() const {
        CUDA_OK(cudaDeviceSynchronize());
        return status.read()[0];
    }

    device_array<int32_t> n_cached, n_new, status;
    ksort_cuda_tokens tokens;
};

/* Groups of checks. */
void check_arguments();              /* statuses of arguments: needs no device */
void check_device_statuses(rng *r);  /* what kernels report */
void compare_captured_steps(rng *r); /* a step in a CUDA graph */

#endif /* KSORT_TEST_CUDA_SUPPORT_H */
