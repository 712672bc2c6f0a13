/* Random problems, their buffers between unmapped pages. */
#ifndef KSORT_TEST_PROBLEMS_H
#define KSORT_TEST_PROBLEMS_H

#include <sys/mman.h>
#include <unistd.h>

#include "support.h"

/*   | unmapped page | ... n_bytes ... | unmapped page |
 * Buffers lie flush against one of the two pages: at_end chooses which. */
typedef struct guarded {
    unsigned char *mapping;
    size_t mapped_bytes;
    void *data;
} guarded;

static inline guarded guarded_new(size_t n_bytes, int at_end) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t inner = (n_bytes + page - 1) / page * page;
    guarded g = {NULL, inner + 2 * page, NULL};
    void *mapping = mmap(NULL, g.mapped_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(mapping != MAP_FAILED);
    g.mapping = mapping;
    CHECK(inner == 0 || mprotect(g.mapping + page, inner, PROT_READ | PROT_WRITE) == 0);
    g.data = g.mapping + page + (at_end ? inner - n_bytes : 0);
    return g;
}

static inline void guarded_free(guarded g) { munmap(g.mapping, g.mapped_bytes); }

/* Exactly the floats that a row-strided array spans: the last row has no padding behind it. */
static inline size_t strided_floats(uint32_t n_rows, size_t stride, size_t row) { return (n_rows - 1) * stride + row; }

typedef struct problem {
    uint32_t n_heads, n_kv_heads, head_dim, n_queries, n_rot, nth;
    size_t first_slot, n_slots;
    int at_end;
} problem;

static inline problem random_problem(rng *r) {
    problem p;
    p.n_kv_heads = rng_between(r, 1, 3);
    p.n_heads = p.n_kv_heads * rng_between(r, 1, 5);
    p.head_dim = 2 * (rng_next(r) >> 63 ? rng_between(r, 1, 128) : 8 * rng_between(r, 1, 16));
    p.n_queries = rng_next(r) >> 62 ? 1 : rng_between(r, 1, 70);
    p.first_slot = rng_between(r, 0, 300);
    p.n_slots = p.first_slot + p.n_queries;
    if (rng_next(r) >> 63) { /* to the end of the last tile */
        p.n_slots = (p.n_slots + KSORT_TILE_TOKENS - 1) / KSORT_TILE_TOKENS * KSORT_TILE_TOKENS;
        p.first_slot = p.n_slots - p.n_queries;
    }
    p.n_rot = 2 * rng_between(r, 0, p.head_dim / 2);
    p.nth = rng_between(r, 1, 6);
    p.at_end = (int)rng_between(r, 0, 1);
    return p;
}

typedef struct guarded_rope {
    guarded partner, sign, frequency, cos, sin;
    ksort_rope rope;
} guarded_rope;

/* Swaps random pairs of a head's channels in its RoPE tables, as a plan's order does. */
static inline void order_head(rng *r, uint16_t *partner, int8_t *sign, uint16_t *frequency, uint32_t head_dim) {
    for (uint32_t a = 0; a < head_dim; a++) {
        uint32_t b = rng_between(r, 0, head_dim - 1);
        for (uint32_t c = 0; c < head_dim; c++)
            if (partner[c] == a || partner[c] == b) partner[c] = (uint16_t)(partner[c] == a ? b : a);
        uint16_t partner_of_a = partner[a], frequency_of_a = frequency[a];
        int8_t sign_of_a = sign[a];
        partner[a] = partner[b], frequency[a] = frequency[b], sign[a] = sign[b];
        partner[b] = partner_of_a, frequency[b] = frequency_of_a, sign[b] = sign_of_a;
    }
}

static inline guarded_rope random_rope(rng *r, const problem *p) {
    guarded_rope g;
    size_t n = (size_t)p->n_kv_heads * p->head_dim;
    uint32_t n_pairs = p->n_rot ? p->n_rot / 2 : 1;
    uint32_t n_frequencies = n_pairs + (rng_next(r) >> 63 ? 0 : rng_between(r, 0, 150));
    size_t n_entries = p->n_slots * n_frequencies;
    g.partner = guarded_new(n * sizeof(uint16_t), p->at_end);
    g.sign = guarded_new(n, p->at_end);
    g.frequency = guarded_new(n * sizeof(uint16_t), p->at_end);
    g.cos = guarded_new(n_entries * sizeof(float), p->at_end);
    g.sin = guarded_new(n_entries * sizeof(float), p->at_end);
    fill_rope_tables(g.partner.data, g.sign.data, g.frequency.data, p->n_kv_heads, p->head_dim, p->n_rot);
    for (size_t i = 0; i < n; i++)
        if (((int8_t *)g.sign.data)[i] == 0) ((uint16_t *)g.frequency.data)[i] = UINT16_MAX; /* any: not to be used */
    for (uint32_t head = 0; head < p->n_kv_heads; head++) {
        size_t at = (size_t)head * p->head_dim;
        order_head(r, (uint16_t *)g.partner.data + at, (int8_t *)g.sign.data + at, (uint16_t *)g.frequency.data + at,
                   p->head_dim);
    }
    rng_floats(r, g.cos.data, n_entries);
    rng_floats(r, g.sin.data, n_entries);
    g.rope = (ksort_rope){sizeof(ksort_rope), n_frequencies, g.partner.data, g.sign.data,
                          g.frequency.data,   g.cos.data,    g.sin.data};
    return g;
}

static inline void free_rope(guarded_rope g) {
    guarded_free(g.partner);
    guarded_free(g.sign);
    guarded_free(g.frequency);
    guarded_free(g.cos);
    guarded_free(g.sin);
}

typedef struct guarded_transform {
    guarded shift, scale, permutation, feedback;
    ksort_transform transform;
} guarded_transform;

/* Scales from 0.5 to 1.5. */
static inline guarded_transform random_transform(rng *r, const problem *p) {
    guarded_transform g;
    size_t d = p->head_dim, n = p->n_kv_heads * d;
    g.shift = guarded_new(n * sizeof(float), p->at_end);
    g.scale = guarded_new(n * sizeof(float), p->at_end);
    g.permutation = guarded_new(n * sizeof(uint16_t), p->at_end);
    g.feedback = guarded_new(n * d * sizeof(float), p->at_end);
    float *scale = g.scale.data, *feedback = g.feedback.data;
    rng_floats(r, g.shift.data, n);
    for (size_t i = 0; i < n; i++) scale[i] = 1.0f + 0.5f * rng_float(r);
    uint16_t *permutation = g.permutation.data, turn = (uint16_t)rng_between(r, 0, p->head_dim - 1);
    for (size_t i = 0; i < n; i++) permutation[i] = (uint16_t)((i + turn) % d);
    for (size_t i = 0; i < n * d; i++) feedback[i] = 0.1f * rng_float(r);
    g.transform = (ksort_transform){.struct_size = sizeof(ksort_transform), .shift = g.shift.data, .scale = g.scale.data};
    if (rng_next(r) >> 63) g.transform.feedback = feedback;
    g.transform.rotate = rng_between(r, 0, 1);
    if (rng_next(r) >> 63) g.transform.permutation = permutation;
    return g;
}

static inline void free_transform(guarded_transform g) {
    guarded_free(g.shift);
    guarded_free(g.scale);
    guarded_free(g.permutation);
    guarded_free(g.feedback);
}

/* A cache of p's geometry whose memory holds exactly its tiles, filled with 0xFF: NaN or infinity, were it read. */
static inline guarded new_cache(ksort_cache *cache, ksort_format format, const problem *p) {
    size_t tile_bytes = 0, n_tiles = (p->n_slots + KSORT_TILE_TOKENS - 1) / KSORT_TILE_TOKENS;
    CHECK_OK(ksort_tile_bytes(&format, &tile_bytes));
    guarded g = guarded_new(n_tiles * p->n_kv_heads * tile_bytes, p->at_end);
    memset(g.data, 0xFF, n_tiles * p->n_kv_heads * tile_bytes);
    *cache = (ksort_cache){sizeof *cache, format,       g.data, p->n_kv_heads * tile_bytes,
                           tile_bytes,    p->n_slots, p->n_kv_heads, NULL};
    return g;
}

/* Exact rows beside caches of p's geometry: cuts that k and v share, and room for any tail of its queries. */
static inline ksort_exact random_exact(rng *r, const problem *p) {
    ksort_exact exact = {.struct_size = sizeof exact};
    exact.n_sinks = rng_next(r) >> 63 ? rng_between(r, 0, 5) : rng_between(r, 0, KSORT_TILE_TOKENS);
    exact.n_tail = rng_next(r) >> 62 ? rng_between(r, 1, 200) : 0;
    size_t rows = exact.n_tail ? exact.n_tail + p->n_queries - 1 : 0;
    if (rows > p->n_slots) rows = p->n_slots;
    exact.n_tiles = (uint32_t)((rows + KSORT_TILE_TOKENS - 1) / KSORT_TILE_TOKENS) + rng_between(r, 0, 1);
    size_t tile_bytes = KSORT_TILE_TOKENS * p->head_dim * 2;
    exact.head_stride = tile_bytes, exact.tile_stride = p->n_kv_heads * tile_bytes;
    return exact;
}

static inline size_t exact_bytes(const ksort_exact *exact) { return (exact->n_tiles + 1) * exact->tile_stride; }

/* Memory of exact's own beside the cache, filled with 0xFF: NaN, were it read. */
static inline guarded add_exact(ksort_cache *cache, ksort_exact *exact, const problem *p) {
    guarded g = guarded_new(exact_bytes(exact), p->at_end);
    memset(g.data, 0xFF, exact_bytes(exact));
    exact->base = g.data;
    cache->exact = exact;
    return g;
}

/* What the caller does before n tokens are packed from first_slot on. */
static inline void keep_begin(ksort_exact *exact, size_t first_slot, size_t n) {
    size_t end = first_slot + n, rows = (size_t)exact->n_tiles * KSORT_TILE_TOKENS;
    if (first_slot < exact->begin) exact->begin = first_slot;
    if (end > rows && end - rows > exact->begin) exact->begin = end - rows;
}

#endif /* KSORT_TEST_PROBLEMS_H */
