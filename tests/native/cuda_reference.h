/* What cuda_test.cu compares with: the CPU library's packing, token by token, and attention in double. */
#ifndef KSORT_TEST_CUDA_REFERENCE_H
#define KSORT_TEST_CUDA_REFERENCE_H

#include "cuda_tables.h"

/* Elements between tokens and between contexts of rows [n_contexts, n_tokens, row], with gaps. */
struct row_strides {
    row_strides(rng *r, const shape &p, size_t row_elements) : row(row_elements) {
        size_t padded = (row + 7) / 8 * 8 + 8 * rng_between(r, 0, 2);
        bool tokens_inside = coin(r); /* of contexts; else contexts inside of tokens */
        token = tokens_inside ? padded : padded * p.n_contexts;
        context = tokens_inside ? padded * p.n_tokens : padded;
    }

    size_t row, token, context;
};

/* k_x, v_x, q or out. All bytes are 0xFF (NaN) where nothing was set: gaps, and tokens that do not count. */
class token_rows {
public:
    token_rows(const shape &p, const row_strides &strides) : type(p.x_type), strides(strides) {
        size_t last = (p.n_contexts - 1) * strides.context + (p.n_tokens - 1) * strides.token;
        bytes.assign((last + strides.row) * element_bytes(), 0xFF);
    }

    void set(uint32_t s, uint32_t t, size_t i, float x) {
        uint8_t *to = &bytes[place(s, t, i) * element_bytes()];
        __half half = __float2half(x);
        __nv_bfloat16 brain = __float2bfloat16(x);
        if (type == KSORT_F32) memcpy(to, &x, sizeof x);
        else if (type == KSORT_F16) memcpy(to, &half, sizeof half);
        else memcpy(to, &brain, sizeof brain);
    }
    float get(uint32_t s, uint32_t t, size_t i) const {
        const uint8_t *from = &bytes[place(s, t, i) * element_bytes()];
        float x;
        __half half;
        __nv_bfloat16 brain;
        memcpy(&x, from, type == KSORT_F32 ? sizeof x : 0);
        memcpy(&half, from, sizeof half), memcpy(&brain, from, sizeof brain);
        return type == KSORT_F32 ? x : type == KSORT_F16 ? __half2float(half) : __bfloat162float(brain);
    }
    std::vector<float> head(uint32_t s, uint32_t t, uint32_t h, uint32_t head_dim) const {
        std::vector<float> x(head_dim);
        for (uint32_t c = 0; c < head_dim; c++) x[c] = get(s, t, (size_t)h * head_dim + c);
        return x;
    }

    void upload() { device = device_array<uint8_t>(bytes); }
    void write() { device.write(bytes.data()); } /* where it was uploaded to */
    void download() { bytes = device.read(); }

    /* Bytes that are still 0xFF, but for those of rows that count. */
    bool others_are_untouched(const shape &p) const {
        std::vector<uint8_t> counts(bytes.size(), 0);
        for (uint32_t s = 0; s < p.n_contexts; s++)
            for (int32_t t = 0; t < p.n_new[s]; t++)
                memset(&counts[place(s, (uint32_t)t, 0) * element_bytes()], 1, strides.row * element_bytes());
        for (size_t i = 0; i < bytes.size(); i++)
            if (!counts[i] && bytes[i] != 0xFF) return false;
        return true;
    }

    /* Relative and absolute error of rounding to the type. */
    double rounding_error() const { return type == KSORT_F32 ? 0x1p-24 : type == KSORT_F16 ? 0x1p-11 : 0x1p-8; }
    static constexpr double SMALLEST = 0x1p-24; /* f16's smallest number */

    device_array<uint8_t> device;

private:
    size_t element_bytes() const { return type == KSORT_F32 ? 4 : 2; }
    size_t place(uint32_t s, uint32_t t, size_t i) const { return s * strides.context + t * strides.token + i; }

    uint32_t type;
    row_strides strides;
    std::vector<uint8_t> bytes;
};

/* What is stored of a call's tokens: NULL where keys or values have no RoPE or no transform. */
struct steps {
    const rope_tables *rope;
    const transform_tables *transform;
};

/* Packs one head by the CPU library into the host's tiles, at `slot` of KV head h of context s. */
inline ksort_status pack_on_cpu(const paged_cache &cache, const steps &steps, const std::vector<float> &head,
                                uint32_t s, uint32_t slot, uint32_t h) {
    ksort_cache tile = cache.tile_view(s, slot / KSORT_TILE_TOKENS, h);
    ksort_rope rope = steps.rope ? steps.rope->of_head(h, slot) : ksort_rope{};
    ksort_transform transform = steps.transform ? steps.transform->of_head(h) : ksort_transform{};
    ksort_pack_args args = {sizeof args, &tile, head.data(), head.size(), slot % KSORT_TILE_TOKENS, 1,
                            steps.rope ? &rope : nullptr, steps.transform ? &transform : nullptr};
    return ksort_pack(&args, 0, 1);
}

/* Packs every token that counts, head by head as the GPU does: what is refused is left out. The largest status. */
inline int32_t pack_all_on_cpu(const paged_cache &cache, const shape &p, const steps &steps, const token_rows &x) {
    int32_t largest = KSORT_OK;
    for (uint32_t s = 0; s < p.n_contexts; s++)
        for (int32_t t = 0; t < p.n_new[s]; t++)
            for (uint32_t h = 0; h < p.n_kv_heads; h++) {
                std::vector<float> head = x.head(s, (uint32_t)t, h, p.head_dim);
                ksort_status status = pack_on_cpu(cache, steps, head, s, (uint32_t)(p.n_cached[s] + t), h);
                largest = std::max(largest, (int32_t)status);
            }
    return largest;
}

/* The first n_slots of KV head h of context s, as the CPU library unpacks them: [n_slots, head_dim]. */
inline std::vector<float> unpack_on_cpu(const paged_cache &cache, uint32_t s, uint32_t h, uint32_t n_slots) {
    uint32_t head_dim = cache.cache.format.head_dim;
    std::vector<float> values((size_t)n_slots * head_dim);
    for (uint32_t first = 0; first < n_slots; first += KSORT_TILE_TOKENS) {
        ksort_cache tile = cache.tile_view(s, first / KSORT_TILE_TOKENS, h);
        uint32_t n = std::min(n_slots - first, (uint32_t)KSORT_TILE_TOKENS);
        CHECK_OK(ksort_unpack(&tile, 0, n, &values[(size_t)first * head_dim]));
    }
    return values;
}

/* Walsh-Hadamard of segments of falling powers of two (FORMAT.md, section 3). In float each operation is rounded. */
template <typename T>
void rotate(std::vector<T> &x) {
    for (size_t begin = 0, n; begin < x.size(); begin += n) {
        for (n = 1; n * 2 <= x.size() - begin; n *= 2) {}
        for (size_t stride = 1; stride < n; stride *= 2)
            for (size_t i = begin; i < begin + n; i++)
                if (!((i - begin) & stride)) {
                    T a = x[i], b = x[i + stride];
                    x[i] = a + b, x[i + stride] = a - b;
                }
        for (size_t i = begin; i < begin + n; i++) x[i] *= (T)(float)(1.0 / std::sqrt((double)n));
    }
}

/* A head after RoPE at a position. */
inline std::vector<float> turned_head(const std::vector<float> &q, const steps &steps, uint32_t kv_head,
                                      uint32_t position) {
    std::vector<float> x = q;
    if (!steps.rope) return x;
    ksort_rope rope = steps.rope->of_head(kv_head, position);
    for (uint32_t c = 0; c < x.size(); c++)
        if (rope.sign[c]) {
            float other = (float)rope.sign[c] * q[rope.partner[c]];
            float straight = q[c] * rope.cos[rope.frequency[c]], turned = other * rope.sin[rope.frequency[c]];
            x[c] = straight + turned;
        }
    return x;
}

inline void rotate_and_permute(const ksort_transform &transform, std::vector<float> &x) {
    if (transform.rotate) rotate(x);
    std::vector<float> y = x;
    for (uint32_t i = 0; transform.permutation && i < x.size(); i++) x[i] = y[transform.permutation[i]];
}

/* A key or value as it is before rounding: RoPE, transform. */
inline std::vector<float> transformed_head(const std::vector<float> &head, const steps &steps, uint32_t kv_head,
                                           uint32_t position) {
    std::vector<float> x = turned_head(head, steps, kv_head, position);
    if (!steps.transform) return x;
    ksort_transform transform = steps.transform->of_head(kv_head);
    for (uint32_t c = 0; transform.shift && c < x.size(); c++) x[c] = x[c] - transform.shift[c];
    for (uint32_t c = 0; transform.scale && c < x.size(); c++) x[c] = x[c] * transform.scale[c];
    rotate_and_permute(transform, x);
    return x;
}

/* The query that exact rows are multiplied with: RoPE, transform. */
inline std::vector<float> exact_query(const std::vector<float> &q, const steps &steps, uint32_t kv_head,
                                      uint32_t position) {
    std::vector<float> x = turned_head(q, steps, kv_head, position);
    if (!steps.transform) return x;
    ksort_transform transform = steps.transform->of_head(kv_head);
    for (uint32_t c = 0; transform.scale && c < x.size(); c++) x[c] = x[c] / transform.scale[c];
    rotate_and_permute(transform, x);
    return x;
}

/* The query that attention multiplies with: the same rounded to BFP16 in blocks of block_size. */
inline std::vector<float> prepared_query(const std::vector<float> &q, const steps &steps, uint32_t kv_head,
                                         uint32_t position, uint32_t block_size) {
    uint32_t head_dim = (uint32_t)q.size();
    std::vector<float> x = exact_query(q, steps, kv_head, position);
    ksort_cache cache = {sizeof cache, {sizeof cache.format, KSORT_BFP16, head_dim, block_size}};
    CHECK_OK(ksort_tile_bytes(&cache.format, &cache.tile_stride));
    cache.head_stride = cache.tile_stride, cache.n_slots = KSORT_TILE_TOKENS, cache.n_kv_heads = 1;
    std::unique_ptr<void, void (*)(void *)> tile(std::aligned_alloc(KSORT_ALIGNMENT, cache.tile_stride), std::free);
    cache.base = tile.get();
    ksort_pack_args args = {sizeof args, &cache, x.data(), head_dim, 0, 1, nullptr, nullptr};
    CHECK_OK(ksort_pack(&args, 0, 1));
    CHECK_OK(ksort_unpack(&cache, 0, 1, x.data()));
    return x;
}

/* An attention output in double, how far float arithmetic may be from it in any channel, and what weights of fewer bits
 * may add. */
struct expected_row {
    std::vector<double> out, bound, coarse;
};

/* A row over slots begin .. end-1 of k and v [slots, head_dim]; query_of(slot) is what multiplies its key. The bound is attend_bound of tests/native_support.py,
 * where it is derived. coarseness: relative error of weights that are rounded to fewer bits than float32's. */
template <typename QUERY_OF>
expected_row attend_in_double(QUERY_OF query_of, const std::vector<float> &k, const std::vector<float> &v,
                              uint32_t begin, uint32_t end, float scale, double coarseness = 0) {
    const double u = 0x1p-24, exp_error = 0x1p-23;
    size_t d = query_of(begin).size(), n_seen = end - begin;
    std::vector<double> scores(n_seen);
    double largest_score = 0, largest_value = 0, max = -INFINITY, sum = 0;
    for (size_t t = 0; t < n_seen; t++) {
        double magnitude = 0;
        const std::vector<float> &q = query_of(begin + t);
        for (size_t c = 0; c < d; c++) {
            double product = (double)q[c] * k[(begin + t) * d + c];
            scores[t] += product * scale, magnitude += std::fabs(product * scale);
            largest_value = std::max(largest_value, (double)std::fabs(v[(begin + t) * d + c]));
        }
        largest_score = std::max(largest_score, magnitude), max = std::max(max, scores[t]);
    }
    expected_row row = {std::vector<double>(d), {}, std::vector<double>(d, coarseness * largest_value)};
    for (size_t t = 0; t < n_seen; t++) {
        double weight = std::exp(scores[t] - max);
        sum += weight;
        for (size_t c = 0; c < d; c++) row.out[c] += weight * v[(begin + t) * d + c];
    }
    for (double &x : row.out) x /= sum;
    double weight_error = (d + 12) * u * largest_score + (n_seen / 32.0 + 8) * (exp_error + 2 * u);
    row.bound.assign(d, 2.2 * largest_value * (weight_error + (n_seen + 8) * u));
    return row;
}

/* Takes the transform of values back: (W out) / scale + shift, out in its own order again. A channel of W e is at most
 * sqrt(head_dim) times the largest of e; float arithmetic adds its roundings. */
inline void restore(const ksort_transform &transform, expected_row *row) {
    size_t d = row->out.size();
    std::vector<double> y = row->out;
    for (size_t i = 0; transform.permutation && i < d; i++) row->out[transform.permutation[i]] = y[i];
    double largest = 0, growth = transform.rotate ? std::sqrt((double)d) : 1.0;
    for (double x : row->out) largest = std::max(largest, std::fabs(x));
    if (transform.rotate) rotate(row->out);
    for (size_t c = 0; c < d; c++) {
        double scale = transform.scale ? transform.scale[c] : 1.0, shift = transform.shift ? transform.shift[c] : 0.0;
        row->out[c] = row->out[c] / scale + shift;
        row->coarse[c] *= growth / scale;
        row->bound[c] = row->bound[c] * growth / scale + 12 * 0x1p-24 * (growth * largest / scale + std::fabs(shift));
    }
}

#endif /* KSORT_TEST_CUDA_REFERENCE_H */
