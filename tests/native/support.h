/* What the C tests share: random numbers, checks, and random but valid problems. */
#ifndef KSORT_TEST_SUPPORT_H
#define KSORT_TEST_SUPPORT_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ksort.h"

#define SKIPPED 77 /* exit status: this CPU does not run the level that KSORT_KERNELS names */

/* xorshift64*: the same sequence everywhere. */
typedef struct rng {
    uint64_t state;
} rng;

static inline uint64_t rng_next(rng *r) {
    r->state ^= r->state >> 12;
    r->state ^= r->state << 25;
    r->state ^= r->state >> 27;
    return r->state * 0x2545F4914F6CDD1Dull;
}

/* Uniform in [low, high]. */
static inline uint32_t rng_between(rng *r, uint32_t low, uint32_t high) {
    return low + (uint32_t)((rng_next(r) >> 32) % (high - low + 1));
}

/* Uniform in [-1, 1). */
static inline float rng_float(rng *r) { return (float)(int32_t)(rng_next(r) >> 32) * 0x1p-31f; }

static inline void rng_floats(rng *r, float *x, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] = rng_float(r);
}

/* Ends the program, saying where, unless `ok`. */
static inline void check(int ok, const char *what, const char *file, int line) {
    if (ok) return;
    fprintf(stderr, "%s:%d: failed: %s\n", file, line, what);
    exit(1);
}
#define CHECK(condition) check(!!(condition), #condition, __FILE__, __LINE__)

static inline void check_ok(ksort_status status, const char *file, int line) {
    if (status != KSORT_OK) check(0, ksort_status_text(status), file, line);
}
#define CHECK_OK(call) check_ok((call), __FILE__, __LINE__)

/* Partner, sign and frequency tables of one RoPE: adjacent pairs of the first n_rot channels, for every head. */
static inline void fill_rope_tables(uint16_t *partner, int8_t *sign, uint16_t *frequency, uint32_t n_kv_heads,
                                    uint32_t head_dim, uint32_t n_rot) {
    for (uint32_t i = 0; i < n_kv_heads * head_dim; i++) {
        uint32_t channel = i % head_dim;
        int rotated = channel < n_rot;
        partner[i] = (uint16_t)(rotated ? channel ^ 1u : channel);
        sign[i] = (int8_t)(rotated ? (channel & 1u ? 1 : -1) : 0);
        frequency[i] = (uint16_t)(rotated ? channel / 2 : 0);
    }
}

/* A random format that ksort_tile_bytes accepts. */
static inline ksort_format random_format(rng *r, uint32_t lowest_type, uint32_t highest_type, uint32_t head_dim) {
    ksort_format format = {sizeof format, rng_between(r, lowest_type, highest_type), head_dim, 16};
    while (format.block_size * 2 <= head_dim && format.block_size < 128 && rng_next(r) >> 63) format.block_size *= 2;
    return format;
}

#endif /* KSORT_TEST_SUPPORT_H */
