/* Tables of cuda_test.cu's problems, on the host and on the device: RoPE and transforms. */
#ifndef KSORT_TEST_CUDA_TABLES_H
#define KSORT_TEST_CUDA_TABLES_H

#include "cuda_support.h"

/* A rope table, with channels of every head in an order of its own as a K plan has them. */
class rope_tables {
public:
    rope_tables(rng *r, const shape &p, uint32_t n_positions) : head_dim(p.head_dim) {
        uint32_t n = p.n_kv_heads * head_dim, n_rot = 2 * rng_between(r, 1, head_dim / 2);
        uint32_t n_unused = rng_between(r, 0, 3) == 0 ? rng_between(r, 1, head_dim) : 0; /* frequencies */
        uint32_t n_frequencies = n_rot / 2 + n_unused;
        std::vector<uint16_t> stock_partner(n), stock_frequency(n);
        std::vector<int8_t> stock_sign(n);
        fill_rope_tables(stock_partner.data(), stock_sign.data(), stock_frequency.data(), p.n_kv_heads, head_dim,
                         n_rot);
        partner.resize(n), frequency.resize(n), sign.resize(n);
        for (uint32_t h = 0; h < p.n_kv_heads; h++) {
            std::vector<uint16_t> place = random_permutation(r, head_dim);
            for (uint32_t c = 0; c < head_dim; c++) {
                uint32_t from = h * head_dim + c, to = h * head_dim + place[c];
                partner[to] = place[stock_partner[from]];
                sign[to] = stock_sign[from], frequency[to] = stock_frequency[from];
            }
        }
        for (uint32_t t = 0; t < n_positions; t++)
            for (uint32_t f = 0; f < n_frequencies; f++) {
                double angle = t * std::pow(10000.0, -2.0 * f / n_rot), length = f < n_rot / 2 ? 1.0 : 1.5;
                cos.push_back((float)(length * std::cos(angle))), sin.push_back((float)(length * std::sin(angle)));
            }
        uint32_t before = rng_between(r, 0, 3) == 0 ? 1 : 0; /* elements, so that a table is aligned to one only */
        d_partner = device_array<uint16_t>(moved(partner, before));
        d_frequency = device_array<uint16_t>(moved(frequency, before));
        d_sign = device_array<int8_t>(moved(sign, before));
        d_cos = device_array<float>(cos), d_sin = device_array<float>(sin);
        device = {sizeof device, n_frequencies, d_partner.data + before, d_sign.data + before};
        device.frequency = d_frequency.data + before, device.cos = d_cos.data, device.sin = d_sin.data;
    }

    /* For the CPU library: one KV head, rows of cos and sin from `position` on. */
    ksort_rope of_head(uint32_t h, uint32_t position) const {
        size_t at = (size_t)h * head_dim, row = (size_t)position * device.n_frequencies;
        return {sizeof(ksort_rope), device.n_frequencies, &partner[at], &sign[at], &frequency[at],
                &cos[row],          &sin[row]};
    }

    ksort_rope device;

private:
    template <typename T>
    static std::vector<T> moved(std::vector<T> table, uint32_t before) {
        table.insert(table.begin(), before, T(0));
        return table;
    }

    uint32_t head_dim;
    std::vector<uint16_t> partner, frequency;
    std::vector<int8_t> sign;
    std::vector<float> cos, sin;
    device_array<uint16_t> d_partner, d_frequency;
    device_array<int8_t> d_sign;
    device_array<float> d_cos, d_sin;
};

/* Some of the steps of a transform, or none of them. */
class transform_tables {
public:
    transform_tables(rng *r, const shape &p) : head_dim(p.head_dim) {
        size_t n = (size_t)p.n_kv_heads * head_dim;
        for (size_t i = 0; i < n; i++) shift.push_back(rng_normal(r)), scale.push_back(std::exp(rng_normal(r)));
        for (size_t i = 0; i < n * head_dim; i++) feedback.push_back(0.2f * rng_float(r));
        for (uint32_t h = 0; h < p.n_kv_heads; h++)
            for (uint16_t place : random_permutation(r, head_dim)) permutation.push_back(place);
        d_shift = device_array<float>(shift), d_scale = device_array<float>(scale);
        d_feedback = device_array<float>(feedback), d_permutation = device_array<uint16_t>(permutation);
        device = {sizeof device,
                  coin(r) ? 1u : 0u,
                  coin(r) ? d_shift.data : nullptr,
                  coin(r) ? d_scale.data : nullptr,
                  coin(r) ? d_feedback.data : nullptr,
                  coin(r) ? d_permutation.data : nullptr};
    }

    /* For the CPU library: one KV head. */
    ksort_transform of_head(uint32_t h) const {
        size_t at = (size_t)h * head_dim;
        return {sizeof(ksort_transform),
                device.rotate,
                device.shift ? &shift[at] : nullptr,
                device.scale ? &scale[at] : nullptr,
                device.feedback ? &feedback[at * head_dim] : nullptr,
                device.permutation ? &permutation[at] : nullptr};
    }

    ksort_transform device;

private:
    uint32_t head_dim;
    std::vector<float> shift, scale, feedback;
    std::vector<uint16_t> permutation;
    device_array<float> d_shift, d_scale, d_feedback;
    device_array<uint16_t> d_permutation;
};

#endif /* KSORT_TEST_CUDA_TABLES_H */
