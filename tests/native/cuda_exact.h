/* Exact rows of cuda_test.cu's problems: on the host, on the device, and which of them a query reads. */
#ifndef KSORT_TEST_CUDA_EXACT_H
#define KSORT_TEST_CUDA_EXACT_H

#include "cuda_scaled.h"

/* Sizes that keys and values of a call share, and where the ring of each context begins. */
struct exact_sizes {
    /* A ring that holds the tail of every query of a call, or more; one that begins later than it might. */
    exact_sizes(rng *r, const shape &p) {
        n_tail = rng_between(r, 0, 3) ? rng_between(r, 1, 150) : 0;
        n_sinks = coin(r) ? rng_between(r, 0, 5) : rng_between(r, 0, KSORT_TILE_TOKENS);
        n_tiles = n_tail ? (n_tail + p.n_tokens - 1 + KSORT_TILE_TOKENS - 1) / KSORT_TILE_TOKENS : 0;
        n_tiles += rng_between(r, 0, 2);
        for (uint32_t s = 0; s < p.n_contexts; s++) {
            int32_t end = p.n_cached[s] + p.n_new[s];
            int32_t least = std::max(0, end - (int32_t)(n_tiles * KSORT_TILE_TOKENS));
            begin.push_back(coin(r) ? least : (int32_t)rng_between(r, (uint32_t)least, (uint32_t)end));
        }
        device_begin = device_array<int32_t>(begin);
    }

    /* Of the query at slot p of context s. */
    bool reads(uint32_t s, uint32_t p, uint32_t slot) const {
        int64_t tail = std::max((int64_t)p + 1 - n_tail, (int64_t)begin[s]);
        return slot < n_sinks || (slot <= p && (int64_t)slot >= tail);
    }

    uint32_t n_tail, n_sinks, n_tiles;
    std::vector<int32_t> begin;
    device_array<int32_t> device_begin;
};

/* Exact rows of keys or of values; NaN where nothing was written. */
class exact_rows {
public:
    exact_rows(rng *r, const shape &p, const exact_sizes &sizes) : head_dim(p.head_dim), sizes(sizes) {
        size_t tile = (size_t)KSORT_TILE_TOKENS * head_dim * sizeof(__half), gap = KSORT_ALIGNMENT * rng_between(r, 0, 2);
        bool heads_inside = coin(r); /* of tiles */
        size_t inner = tile + gap, n_tiles = sizes.n_tiles + 1;
        exact = {sizeof exact};
        exact.tile_stride = heads_inside ? p.n_kv_heads * inner : inner;
        exact.head_stride = heads_inside ? inner : n_tiles * inner;
        exact.context_stride = n_tiles * p.n_kv_heads * inner;
        exact.n_tiles = sizes.n_tiles, exact.n_tail = sizes.n_tail, exact.n_sinks = sizes.n_sinks;
        exact.begin = sizes.device_begin.data;
        bytes.assign(exact.context_stride * p.n_contexts, 0xFF);
    }

    void set_sink(uint32_t s, uint32_t h, uint32_t slot, const std::vector<float> &x) { set(row(s, h, slot, 0), x); }
    void set_in_ring(uint32_t s, uint32_t h, uint32_t slot, const std::vector<float> &x) {
        set(row(s, h, slot, 1 + slot / KSORT_TILE_TOKENS % sizes.n_tiles), x);
    }

    /* Random rows of every slot that is kept. */
    void fill(rng *r, const shape &p, float size) {
        std::vector<float> x(head_dim);
        fill_slots(p, [&](uint32_t s, uint32_t slot, uint32_t h) {
            for (float &channel : x) channel = size * rng_normal(r);
            if (slot < sizes.n_sinks) set_sink(s, h, slot, x);
            for (float &channel : x) channel = slot < sizes.n_sinks ? channel : size * rng_normal(r);
            if ((int32_t)slot >= sizes.begin[s]) set_in_ring(s, h, slot, x);
        });
    }

    /* The row that a query reads of a slot. */
    void get(uint32_t s, uint32_t h, uint32_t slot, float *x) const {
        uint32_t tile = slot < sizes.n_sinks ? 0 : 1 + slot / KSORT_TILE_TOKENS % sizes.n_tiles;
        for (uint32_t c = 0; c < head_dim; c++) {
            __half half;
            memcpy(&half, &bytes[row(s, h, slot, tile) + c * sizeof half], sizeof half);
            x[c] = __half2float(half);
        }
    }

    void upload() { device = device_array<uint8_t>(bytes), exact.base = device.data; }
    bool device_has_same_bytes() const { return device.read() == bytes; }

    ksort_cuda_exact exact;

private:
    size_t row(uint32_t s, uint32_t h, uint32_t slot, uint32_t tile) const {
        return s * exact.context_stride + h * exact.head_stride + tile * exact.tile_stride +
               slot % KSORT_TILE_TOKENS * head_dim * sizeof(__half);
    }
    void set(size_t at, const std::vector<float> &x) {
        for (uint32_t c = 0; c < head_dim; c++) {
            __half half = __float2half(x[c]);
            memcpy(&bytes[at + c * sizeof half], &half, sizeof half);
        }
    }

    uint32_t head_dim;
    const exact_sizes &sizes;
    std::vector<uint8_t> bytes;
    device_array<uint8_t> device;
};

/* What packing writes of a call's tokens. The status that it reports beside those of packed heads. */
inline int32_t pack_exact_on_cpu(exact_rows *rows, const exact_sizes &sizes, const shape &p, const steps &steps,
                                 const token_rows &x) {
    int32_t status = KSORT_OK;
    for (uint32_t s = 0; s < p.n_contexts; s++)
        for (int32_t t = 0; t < p.n_new[s]; t++)
            for (uint32_t h = 0; h < p.n_kv_heads; h++) {
                uint32_t slot = (uint32_t)(p.n_cached[s] + t);
                bool to_sinks = slot < sizes.n_sinks;
                bool to_ring = p.n_new[s] - t <= (int32_t)(sizes.n_tiles * KSORT_TILE_TOKENS);
                std::vector<float> y = transformed_head(x.head(s, (uint32_t)t, h, p.head_dim), steps, h, slot);
                bool is_finite = true, fits = true;
                for (float channel : y) is_finite &= std::isfinite(channel), fits &= std::fabs(channel) <= 65504.0f;
                if ((to_sinks || to_ring) && is_finite && !fits) status = KSORT_ERR_RANGE;
                if (fits && to_sinks) rows->set_sink(s, h, slot, y);
                if (fits && to_ring) rows->set_in_ring(s, h, slot, y);
            }
    return status;
}

/* The most slots that a row of a prompt may see to have its weights in 22 bits also where outputs have 16
 * (ksort_cuda.h). Rows that see more have weights of 11 bits: their errors are held to the whole bound, and but for the
 * most that such weights may add to SHARE of it. */
static const uint32_t SHORT_SLOTS = 512;
static const double COARSENESS = 0x1p-11;

/* What a comparison of attention needs beside its shape. */
struct attend_problem {
    const shape &p;
    const paged_cache &k, &v;
    steps k_steps, v_steps;
    const token_rows &q, &out;
    uint32_t window;
    float scale;
    const exact_sizes *sizes; /* NULL: no exact rows */
    const exact_rows &k_exact, &v_exact;
};

/* Slots begin .. end-1 that token t of context s sees. */
struct seen_slots {
    seen_slots(const attend_problem &a, uint32_t s, uint32_t t)
        : end((uint32_t)a.p.n_cached[s] + t + 1), begin(a.window && end > a.window ? end - a.window : 0) {}

    uint32_t end, begin;
};

inline bool has_coarse_weights(const attend_problem &a, const seen_slots &seen) {
    return a.p.n_tokens > 1 && a.p.x_type != KSORT_F32 && seen.end - seen.begin > SHORT_SLOTS;
}

/* Keys or values of a KV head as the query at slot end - 1 reads them. */
inline std::vector<float> as_read(const attend_problem &a, const exact_rows &exact, std::vector<float> packed,
                                  uint32_t s, uint32_t h, const seen_slots &seen) {
    for (uint32_t slot = seen.begin; slot < seen.end; slot++)
        if (a.sizes->reads(s, seen.end - 1, slot)) exact.get(s, h, slot, &packed[(size_t)slot * a.p.head_dim]);
    return packed;
}

inline expected_row expected_of(const attend_problem &a, uint32_t s, uint32_t t, uint32_t head,
                                const std::vector<float> &k, const std::vector<float> &v) {
    const shape &p = a.p;
    seen_slots seen(a, s, t);
    uint32_t kv_head = head / (p.n_heads / p.n_kv_heads);
    double coarseness = has_coarse_weights(a, seen) ? COARSENESS : 0;
    std::vector<float> x = a.q.head(s, t, head, p.head_dim);
    std::vector<float> q = prepared_query(x, a.k_steps, kv_head, seen.end - 1, p.k.block_size);
    std::vector<float> exact_q = exact_query(x, a.k_steps, kv_head, seen.end - 1);
    auto query_of = [&](size_t slot) -> const std::vector<float> & {
        return a.sizes && a.sizes->reads(s, seen.end - 1, (uint32_t)slot) ? exact_q : q;
    };
    if (!a.sizes) return attend_in_double(query_of, k, v, seen.begin, seen.end, a.scale, coarseness);
    std::vector<float> k_read = as_read(a, a.k_exact, k, s, kv_head, seen);
    std::vector<float> v_read = is_bfp(p.v.type) ? as_read(a, a.v_exact, v, s, kv_head, seen) : v;
    return attend_in_double(query_of, k_read, v_read, seen.begin, seen.end, a.scale, coarseness);
}

#endif /* KSORT_TEST_CUDA_EXACT_H */
