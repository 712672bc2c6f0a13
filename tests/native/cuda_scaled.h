/* Keys and values of cuda_test.cu's attention problems. Those of SBFP types are any bytes, not only those of encoders,
 * read here as FORMAT.md has it, apart from the CPU library. */
#ifndef KSORT_TEST_CUDA_SCALED_H
#define KSORT_TEST_CUDA_SCALED_H

#include "cuda_reference.h"

inline bool is_bfp(uint32_t type) { return type >= KSORT_BFP16; }
inline bool is_scaled(uint32_t type) { return type == KSORT_SBFP12 || type == KSORT_SBFP11; }

/* Keys or values, or both, become SBFP. */
inline void set_scaled_types(rng *r, shape *p) {
    uint32_t which = rng_between(r, 1, 3);
    if (which & 1) p->k = random_format(r, KSORT_SBFP12, KSORT_SBFP11, p->head_dim);
    if (which & 2) p->v = random_format(r, KSORT_SBFP12, KSORT_SBFP11, p->head_dim);
}

/* A token of a head in a tile. */
class scaled_token {
public:
    scaled_token(const paged_cache &cache, uint32_t s, uint32_t slot, uint32_t h)
        : format(cache.cache.format), tile((uint8_t *)cache.tile_view(s, slot / KSORT_TILE_TOKENS, h).base),
          token(slot % KSORT_TILE_TOKENS),
          n_words(format.type == KSORT_SBFP12 ? format.head_dim / 8 : (format.head_dim + 31) / 32 * 3) {}

    /* Any mantissas; scales of any sign, with exponent bits lowest .. highest (0 to 30). */
    void fill(rng *r, uint32_t lowest, uint32_t highest) const {
        for (uint32_t w = 0; w < n_words; w++)
            for (uint32_t byte = 0; byte < 4; byte++) word(w)[byte] = (uint8_t)(rng_next(r) >> 56);
        for (uint32_t block = 0; block * format.block_size < format.head_dim; block++)
            *scale(block) = (uint8_t)(rng_between(r, lowest, highest) << 2 | rng_between(r, 0, 3) | coin(r) << 7);
    }

    float value(uint32_t c) const {
        uint32_t half_bits = (uint32_t)*scale(c / format.block_size) << 8, exponent = half_bits >> 10 & 31;
        float fraction = (float)(half_bits & 0x3FF) / 1024.0f;
        float magnitude = exponent ? std::ldexp(1.0f + fraction, (int)exponent - 15) : std::ldexp(fraction, -14);
        return (float)mantissa(c) * (half_bits >> 15 ? -magnitude : magnitude);
    }

private:
    uint8_t *word(uint32_t w) const { return tile + token / 16 * 64 * n_words + (w * 16 + token % 16) * 4; }
    uint8_t *scale(uint32_t block) const { return tile + 256 * n_words + 64 * block + token; }

    int mantissa(uint32_t c) const {
        if (format.type == KSORT_SBFP12) {
            int bits = word(c / 8)[c % 4] >> c % 8 / 4 * 4 & 15;
            return bits < 8 ? bits : bits - 16;
        }
        uint32_t group = c / 32 * 3, quad = c % 32 / 4;
        int low = word(group + quad / 4)[c % 4] >> quad % 4 * 2 & 3, high = word(group + 2)[c % 4] >> quad & 1;
        return low - 4 * high;
    }

    ksort_format format;
    uint8_t *tile;
    uint32_t token, n_words;
};

/* The first n_slots of KV head h of context s, of any type: [n_slots, head_dim]. */
inline std::vector<float> unpack(const paged_cache &cache, uint32_t s, uint32_t h, uint32_t n_slots) {
    if (!is_scaled(cache.cache.format.type)) return unpack_on_cpu(cache, s, h, n_slots);
    std::vector<float> values;
    for (uint32_t slot = 0; slot < n_slots; slot++)
        for (uint32_t c = 0; c < cache.cache.format.head_dim; c++)
            values.push_back(scaled_token(cache, s, slot, h).value(c));
    return values;
}

/* Calls fill(s, slot, h) for every slot of every context. */
template <typename F>
void fill_slots(const shape &p, F fill) {
    for (uint32_t s = 0; s < p.n_contexts; s++)
        for (int32_t slot = 0; slot < p.n_cached[s] + p.n_new[s]; slot++)
            for (uint32_t h = 0; h < p.n_kv_heads; h++) fill(s, (uint32_t)slot, h);
}

/* Packed by the CPU library: channels of different size, outliers among them. */
inline void fill_packed(rng *r, const paged_cache &cache, const shape &p, const steps &steps, float size) {
    std::vector<float> factors(p.head_dim), head(p.head_dim);
    for (float &factor : factors) factor = size * std::exp(rng_normal(r));
    fill_slots(p, [&](uint32_t s, uint32_t slot, uint32_t h) {
        for (uint32_t c = 0; c < p.head_dim; c++) head[c] = rng_normal(r) * factors[c];
        CHECK_OK(pack_on_cpu(cache, steps, head, s, slot, h));
    });
}

/* Sizes of values: far beyond f16's range on either side too, where cache and output allow it; of SBFP types all that
 * there are. */
inline float random_value_size(rng *r, const shape &p) {
    static const float of_f16[] = {1.0f, 100.0f, 0.01f}, of_others[] = {1.0f, 1e8f, 1e-8f};
    bool has_f16 = p.v.type == KSORT_F16 || p.x_type == KSORT_F16;
    return (has_f16 ? of_f16 : of_others)[rng_between(r, 0, 2)];
}

inline void fill_keys(rng *r, const paged_cache &k, const shape &p, const steps &steps) {
    if (!is_scaled(p.k.type)) return fill_packed(r, k, p, steps, 1.0f);
    fill_slots(p, [&](uint32_t s, uint32_t slot, uint32_t h) { scaled_token(k, s, slot, h).fill(r, 10, 13); });
}

inline void fill_values(rng *r, const paged_cache &v, const shape &p, const steps &steps) {
    static const uint32_t ranges[][2] = {{10, 13}, {0, 2}, {27, 30}, {0, 30}};
    if (!is_scaled(p.v.type)) return fill_packed(r, v, p, steps, random_value_size(r, p));
    const uint32_t *range = ranges[rng_between(r, 0, p.x_type == KSORT_F16 ? 1 : 3)];
    fill_slots(p, [&](uint32_t s, uint32_t slot, uint32_t h) {
        scaled_token(v, s, slot, h).fill(r, range[0], range[1]);
    });
}

#endif /* KSORT_TEST_CUDA_SCALED_H */
