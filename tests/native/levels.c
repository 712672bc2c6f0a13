/* Compares every kernel level of this machine with scalar, through the ABI: the same packed bytes; attention and
 * products within twice the bound of one level. Random problems, with inputs that are random, all smallest or all
 * largest, and unmapped pages around every buffer.
 * usage: levels ITERATIONS [SEED] */
#include "levels.h"

/* Head dimensions with whole and ragged blocks, chunks and registers. */
static uint32_t random_head_dim(rng *r) {
    static const uint32_t dims[] = {2, 12, 16, 18, 22, 26, 40, 56, 64, 80, 90, 96, 126, 128, 182, 256};
    return dims[rng_between(r, 0, sizeof dims / sizeof *dims - 1)];
}

/* What ksort_pack accepts, after RoPE (at most twice the largest) and a transform (scales up to 1.5, rotation up to 16)
 * of it. */
static float largest_packable(const ksort_cache *cache, const ksort_rope *rope, const ksort_transform *transform) {
    uint32_t type = cache->format.type;
    float largest = type == KSORT_F16 ? 65504.0f : type == KSORT_BF16 ? 0x1.FEp127f : FLT_MAX;
    if (transform) largest = 0x1.FFp112f;
    if (type >= KSORT_SBFP12) largest = (type == KSORT_SBFP12 ? 7 : 3) * 57344.0f * (transform ? 0x1p-7f : 1.0f);
    if (cache->exact) largest = transform ? 2048.0f : 65504.0f; /* 2048 * 1.5 * 16 and the shift */
    return rope ? largest * 0.25f : largest;
}

/* Mostly BFP, where the head is large enough. */
static ksort_format random_cache_format(rng *r, uint32_t head_dim) {
    if (head_dim < 16) return random_format(r, KSORT_F32, KSORT_BF16, head_dim);
    return random_format(r, rng_next(r) >> 62 ? KSORT_BFP16 : KSORT_F32, KSORT_SBFP11, head_dim);
}

/* Packs x into the cache's memory, which holds bytes of 0xFF before: NaN or infinity, were they read. */
static void pack(const ksort_pack_args *args, uint32_t nth, size_t cache_bytes) {
    const ksort_exact *exact = args->cache->exact;
    memset(args->cache->base, 0xFF, cache_bytes);
    if (exact) memset(exact->base, 0xFF, exact_bytes(exact));
    for (uint32_t ith = 0; ith < nth; ith++) CHECK_OK(ksort_pack(args, ith, nth));
}

/* A cache's bytes and those of the exact rows beside it, where it has some. */
static void copy_stored(unsigned char *to, const ksort_cache *cache, size_t cache_bytes) {
    memcpy(to, cache->base, cache_bytes);
    if (cache->exact) memcpy(to + cache_bytes, cache->exact->base, exact_bytes(cache->exact));
}

/* Packs n_slots tokens at every level, in any number of parts. The cache holds scalar's bytes then: everyone's. */
static void compare_pack(rng *r, const problem *p, const ksort_cache *cache, const ksort_rope *rope,
                         const ksort_transform *transform, kind kind, float largest) {
    size_t row = (size_t)p->n_kv_heads * p->head_dim, stride = row + rng_between(r, 0, 3);
    size_t n = strided_floats((uint32_t)p->n_slots, stride, row);
    size_t cache_bytes = (p->n_slots + KSORT_TILE_TOKENS - 1) / KSORT_TILE_TOKENS * cache->tile_stride;
    guarded x = guarded_new(n * sizeof(float), p->at_end);
    fill(r, kind, largest, x.data, n);
    ksort_pack_args args = {sizeof args, cache, x.data, stride, 0, (uint32_t)p->n_slots, rope, transform};
    size_t n_bytes = cache_bytes + (cache->exact ? exact_bytes(cache->exact) : 0);
    unsigned char *expected = malloc(n_bytes), *stored = malloc(n_bytes);
    CHECK(expected && stored);
    CHECK_OK(ksort_select_kernels("scalar"));
    pack(&args, 1, cache_bytes);
    copy_stored(expected, cache, cache_bytes);
    for (int i = 0; i < N_LEVELS; i++) {
        if (ksort_select_kernels(LEVELS[i]) != KSORT_OK) continue;
        pack(&args, p->nth, cache_bytes);
        copy_stored(stored, cache, cache_bytes);
        CHECK(memcmp(stored, expected, n_bytes) == 0);
    }
    free(stored);
    free(expected);
    guarded_free(x);
}

/* Raises the largest |value| and the largest norm of a head to those in the cache. Heads that were not written are NaN. */
static void measure_cache(const problem *p, const ksort_cache *cache, double *largest, double *norm) {
    size_t n = cache->n_slots * p->n_kv_heads * p->head_dim;
    float *values = malloc(n * sizeof *values);
    CHECK(values);
    CHECK_OK(ksort_unpack(cache, 0, (uint32_t)cache->n_slots, values));
    for (size_t head = 0; head < n; head += p->head_dim) {
        if (!isfinite(values[head])) continue;
        double squares = 0.0;
        for (size_t c = 0; c < p->head_dim; c++) {
            double value = values[head + c];
            squares += value * value;
            *largest = fmax(*largest, fabs(value));
        }
        *norm = fmax(*norm, sqrt(squares));
    }
    free(values);
    if (!cache->exact) return;
    const ksort_exact *exact = cache->exact; /* its tiles are those of an f16 cache */
    ksort_cache rows = {sizeof rows, {sizeof rows.format, KSORT_F16, p->head_dim, 16}, exact->base, exact->tile_stride,
                        exact->head_stride, (exact->n_tiles + 1) * (size_t)KSORT_TILE_TOKENS, p->n_kv_heads, NULL};
    measure_cache(p, &rows, largest, norm);
}

/* The largest norm of a query head after RoPE, transform and rounding: RoPE with cos and sin up to 1 makes it up to
 * sqrt(2) times larger, division by scales of 0.5 or more 2 times, rounding to BFP16 1 + 16 * 2^-7 times. */
static double query_norm(const problem *p, const ksort_attend_args *args) {
    double largest = 0.0, growth = args->rope ? sqrt(2.0) : 1.0;
    if (args->k_transform && args->k_transform->scale) growth *= 2.0;
    if (args->query_type == KSORT_BFP16) growth *= 1.125;
    for (uint32_t token = 0; token < p->n_queries; token++)
        for (uint32_t head = 0; head < p->n_heads; head++) {
            double squares = 0.0;
            for (uint32_t c = 0; c < p->head_dim; c++) {
                double value = args->q[token * args->q_token_stride + head * p->head_dim + c];
                squares += value * value;
            }
            largest = fmax(largest, sqrt(squares));
        }
    return largest * growth;
}

/* The bound of native/README.md on one level's error, with the norms' product for A. Restoring transformed values
 * spreads the error of d channels over each, and rounds log2(d) + 4 times. At last what subnormal products lose. */
static double attend_bound(const problem *p, const ksort_attend_args *args) {
    double v_largest = 0, v_norm = 0, k_largest = 0, k_norm = 0, u = HALF_ULP, d = p->head_dim, n_seen = (double)p->n_slots;
    measure_cache(p, args->v, &v_largest, &v_norm);
    measure_cache(p, args->k, &k_largest, &k_norm);
    double a = args->scale * query_norm(p, args) * k_norm;
    double eta = (d + 12) * u * a + (n_seen / 32 + 8) * (2 * u + 2 * u);
    double bound = 2 * v_largest * (eta + (n_seen + 8) * u);
    if (args->v_transform) bound = 2 * (sqrt(d) * bound + (log2(d) + 4) * u * (sqrt(d) * v_largest + 1));
    return bound + n_seen * 0x1p-138;
}

static void run_attend(const ksort_attend_args *args, uint32_t nth, size_t n_out) {
    memset(args->workspace, 0xFF, args->workspace_bytes);
    memset(args->out, 0xFF, n_out * sizeof(float));
    for (uint32_t ith = 0; ith < nth; ith++) CHECK_OK(ksort_attend(args, ith, nth));
    for (uint32_t ith = 0; ith < nth; ith++) CHECK_OK(ksort_attend_merge(args, ith, nth));
}

static void compare_attend(rng *r, const problem *p, ksort_attend_args *args, kind kind) {
    size_t row = (size_t)p->n_heads * p->head_dim;
    args->q_token_stride = row + rng_between(r, 0, 3), args->out_token_stride = row + rng_between(r, 0, 3);
    size_t n_q = strided_floats(p->n_queries, args->q_token_stride, row);
    size_t n_out = strided_floats(p->n_queries, args->out_token_stride, row);
    guarded q = guarded_new(n_q * sizeof(float), p->at_end), out = guarded_new(n_out * sizeof(float), p->at_end);
    fill(r, kind, 0x1.FEp0f, q.data, n_q);
    args->q = q.data, args->out = out.data;
    CHECK_OK(ksort_attend_workspace_bytes(args, p->nth, &args->workspace_bytes));
    args->workspace_bytes = (args->workspace_bytes + KSORT_ALIGNMENT - 1) / KSORT_ALIGNMENT * KSORT_ALIGNMENT;
    guarded workspace = guarded_new(args->workspace_bytes, p->at_end);
    args->workspace = workspace.data;
    float *expected = malloc(n_out * sizeof *expected);
    CHECK(expected);
    CHECK_OK(ksort_select_kernels("scalar"));
    run_attend(args, p->nth, n_out);
    memcpy(expected, args->out, n_out * sizeof *expected);
    double limit = 2 * attend_bound(p, args);
    for (int i = 0; i < N_LEVELS; i++) {
        if (ksort_select_kernels(LEVELS[i]) != KSORT_OK) continue;
        run_attend(args, p->nth, n_out);
        check_rows(args->out, expected, p->n_queries, args->out_token_stride, row, limit);
    }
    free(expected);
    guarded_free(workspace);
    guarded_free(out);
    guarded_free(q);
}

/* Keys and values packed with any type, RoPE and transform, then attention over them. */
static void compare_cache(rng *r) {
    problem p = random_problem(r);
    p.head_dim = random_head_dim(r);
    p.n_rot = 2 * rng_between(r, 0, p.head_dim / 2);
    ksort_cache k, v;
    guarded k_memory = new_cache(&k, random_cache_format(r, p.head_dim), &p);
    guarded v_memory = new_cache(&v, random_cache_format(r, p.head_dim), &p);
    guarded_rope guarded_rope = random_rope(r, &p);
    guarded_transform guarded_transform = random_transform(r, &p);
    ksort_transform *transform = &guarded_transform.transform;
    if (rng_next(r) >> 63) transform->shift = NULL;
    if (rng_next(r) >> 63) transform->scale = NULL;
    const ksort_transform *k_transform = k.format.type >= KSORT_BFP16 && rng_next(r) >> 62 ? transform : NULL;
    const ksort_transform *v_transform = v.format.type >= KSORT_BFP16 && rng_next(r) >> 62 ? transform : NULL;
    const ksort_rope *rope = rng_next(r) >> 63 ? &guarded_rope.rope : NULL;
    ksort_exact k_exact = random_exact(r, &p), v_exact;
    keep_begin(&k_exact, 0, p.n_slots);
    v_exact = k_exact;
    guarded k_rows = {0}, v_rows = {0};
    if (k.format.type >= KSORT_BFP16 && rng_next(r) >> 63) k_rows = add_exact(&k, &k_exact, &p);
    if (v.format.type >= KSORT_BFP16 && rng_next(r) >> 63) v_rows = add_exact(&v, &v_exact, &p);
    kind kind = rng_between(r, RANDOM, N_KINDS - 1);
    compare_pack(r, &p, &k, rope, k_transform, kind, largest_packable(&k, rope, k_transform));
    compare_pack(r, &p, &k, rope, k_transform, kind, 0x1.FEp0f);
    compare_pack(r, &p, &v, NULL, v_transform, kind, 0x1.FEp0f);
    ksort_rope at_query = guarded_rope.rope;
    at_query.cos += p.first_slot * at_query.n_frequencies;
    at_query.sin += p.first_slot * at_query.n_frequencies;
    ksort_attend_args args = {.struct_size = sizeof args, .k = &k, .v = &v, .rope = rope ? &at_query : NULL,
                              .k_transform = k_transform, .v_transform = v_transform,
                              .first_slot = p.first_slot, .n_queries = p.n_queries, .n_heads = p.n_heads,
                              .window = rng_next(r) >> 63 ? 0 : rng_between(r, 1, 100),
                              .query_type = p.head_dim >= 16 && rng_next(r) >> 63 ? KSORT_BFP16 : KSORT_F32,
                              .scale = (rng_next(r) >> 63 ? 1.0f : 0x1p-12f) / sqrtf((float)p.head_dim)};
    compare_attend(r, &p, &args, kind);
    if (k.exact) guarded_free(k_rows);
    if (v.exact) guarded_free(v_rows);
    free_transform(guarded_transform);
    free_rope(guarded_rope);
    guarded_free(v_memory);
    guarded_free(k_memory);
}

/* Transformed keys as SBFP, up to the largest it holds: |x| grows up to twice by RoPE, 1.5 times by scale, 16 times by
 * rotation. */
static void compare_scaled(rng *r) {
    problem p = random_problem(r);
    p.head_dim = random_head_dim(r);
    if (p.head_dim < 16) p.head_dim += 16;
    p.n_rot = 2 * rng_between(r, 0, p.head_dim / 2);
    ksort_cache cache;
    guarded memory = new_cache(&cache, random_format(r, KSORT_SBFP12, KSORT_SBFP11, p.head_dim), &p);
    guarded_rope guarded_rope = random_rope(r, &p);
    guarded_transform guarded_transform = random_transform(r, &p);
    const ksort_rope *rope = rng_next(r) >> 63 ? &guarded_rope.rope : NULL;
    kind kind = rng_between(r, RANDOM, N_KINDS - 1);
    compare_pack(r, &p, &cache, rope, &guarded_transform.transform, kind, rng_next(r) >> 63 ? 3500.0f : 0x1p-12f);
    free_transform(guarded_transform);
    free_rope(guarded_rope);
    guarded_free(memory);
}

int main(int argc, char **argv) {
    long n_iterations = argc > 1 ? atol(argv[1]) : 100;
    rng r = {argc > 2 ? strtoull(argv[2], NULL, 10) | 1 : 1};
    char found[64] = "";
    for (int i = 0; i < N_LEVELS; i++)
        if (ksort_select_kernels(LEVELS[i]) == KSORT_OK) strcat(strcat(found, " "), LEVELS[i]);
    if (!*found) return SKIPPED;
    for (long i = 0; i < n_iterations; i++) {
        compare_cache(&r);
        compare_scaled(&r);
        compare_products(&r);
    }
    printf("levels: %ld problems, scalar against%s\n", n_iterations, found);
    return 0;
}
