/* Packs, attends, unpacks and multiplies random problems with unmapped pages directly before and after every buffer, so that a read
 * or write of one byte too many ends the program, in code that sanitizers do not instrument (intrinsics) as well.
 * usage: guard_pages ITERATIONS [SEED]; KSORT_KERNELS chooses the level. */
#include <float.h>
#include <math.h>

#include "ksort_run.h"
#include "problems.h"

/* How much larger than the largest value a stored one may be: SBFP's scales are rounded by up to an eighth. */
static float growth_of(const ksort_cache *cache) { return cache->format.type >= KSORT_SBFP12 ? 1.125f : 1.0f; }

/* Packs n_slots random tokens in two calls and reads them back: finite, and off by at most one rounding step (where no
 * transform moves them further). */
static void pack_all(rng *r, const problem *p, const ksort_cache *cache, ksort_exact *exact, const ksort_rope *rope,
                     const ksort_transform *transform) {
    size_t row = (size_t)p->n_kv_heads * p->head_dim, stride = row + rng_between(r, 0, 3);
    uint32_t n = (uint32_t)p->n_slots, first_half = rng_between(r, 0, n - 1);
    for (uint32_t start = 0, end = first_half; start < n; start = end, end = n) {
        if (end == start) end = n;
        guarded x = guarded_new(strided_floats(end - start, stride, row) * sizeof(float), p->at_end);
        rng_floats(r, x.data, strided_floats(end - start, stride, row));
        ksort_rope at_start = rope ? *rope : (ksort_rope){0};
        at_start.cos += (size_t)start * at_start.n_frequencies;
        at_start.sin += (size_t)start * at_start.n_frequencies;
        ksort_pack_args args = {sizeof args, cache, x.data, stride, start, end - start, rope ? &at_start : NULL,
                                transform};
        if (cache->exact) keep_begin(exact, start, end - start);
        for (uint32_t ith = 0; ith < p->nth; ith++) CHECK_OK(ksort_pack(&args, ith, p->nth));
        guarded back = guarded_new((end - start) * row * sizeof(float), p->at_end);
        CHECK_OK(ksort_unpack(cache, start, end - start, back.data));
        float limit = transform ? FLT_MAX : 2.01f * growth_of(cache);
        for (size_t i = 0; i < (end - start) * row; i++) CHECK(fabsf(((float *)back.data)[i]) <= limit);
        guarded_free(back);
        guarded_free(x);
    }
}

/* Attends with the problem's last n_queries tokens; an average of values in [-1, 1] must lie there too, unless
 * they were rounded after a transform. */
static void attend(rng *r, const problem *p, const ksort_cache *k, const ksort_cache *v, const ksort_rope *rope,
                   const ksort_transform *k_transform, const ksort_transform *v_transform) {
    size_t row = (size_t)p->n_heads * p->head_dim;
    size_t q_stride = row + rng_between(r, 0, 3), out_stride = row + rng_between(r, 0, 3);
    guarded q = guarded_new(strided_floats(p->n_queries, q_stride, row) * sizeof(float), p->at_end);
    guarded out = guarded_new(strided_floats(p->n_queries, out_stride, row) * sizeof(float), p->at_end);
    rng_floats(r, q.data, strided_floats(p->n_queries, q_stride, row));
    memset(out.data, 0xFF, strided_floats(p->n_queries, out_stride, row) * sizeof(float));
    ksort_rope at_query = *rope;
    at_query.cos += p->first_slot * rope->n_frequencies;
    at_query.sin += p->first_slot * rope->n_frequencies;
    ksort_attend_args args = {.struct_size = sizeof args, .k = k, .v = v, .rope = &at_query,
                              .k_transform = k_transform, .v_transform = v_transform,
                              .q = q.data, .q_token_stride = q_stride, .out = out.data, .out_token_stride = out_stride,
                              .first_slot = p->first_slot, .n_queries = p->n_queries, .n_heads = p->n_heads,
                              .window = rng_next(r) >> 63 ? 0 : rng_between(r, 1, 100),
                              .query_type = p->head_dim >= 16 && rng_next(r) >> 63 ? KSORT_BFP16 : KSORT_F32,
                              .scale = 0.3f};
    CHECK_OK(ksort_attend_workspace_bytes(&args, p->nth, &args.workspace_bytes));
    size_t aligned_bytes = (args.workspace_bytes + KSORT_ALIGNMENT - 1) / KSORT_ALIGNMENT * KSORT_ALIGNMENT;
    guarded workspace = guarded_new(aligned_bytes, p->at_end);
    args.workspace = workspace.data;
    memset(args.workspace, 0xFF, aligned_bytes); /* NaN: what was there before must not matter */
    for (uint32_t ith = 0; ith < p->nth; ith++) CHECK_OK(ksort_attend(&args, ith, p->nth));
    for (uint32_t ith = 0; ith < p->nth; ith++) CHECK_OK(ksort_attend_merge(&args, ith, p->nth));
    float limit = v_transform ? FLT_MAX : 1.001f * growth_of(v);
    for (uint32_t i = 0; i < p->n_queries; i++)
        for (size_t c = 0; c < row; c++) CHECK(fabsf(((float *)out.data)[i * out_stride + c]) <= limit);
    guarded_free(workspace);
    guarded_free(out);
    guarded_free(q);
}

static void multiply(rng *r) {
    uint32_t type = rng_between(r, KSORT_F32, KSORT_BF16), n_rows = rng_between(r, 1, 9), nth = rng_between(r, 1, 6);
    size_t n_out = rng_between(r, 1, 70), n_in = rng_between(r, 1, 300);
    int at_end = (int)rng_between(r, 0, 1);
    size_t x_stride = n_in + rng_between(r, 0, 5), y_stride = n_out + rng_between(r, 0, 5);
    guarded weights = guarded_new(n_out * n_in * (type == KSORT_F32 ? 4 : 2), at_end);
    guarded bias = guarded_new(n_out * sizeof(float), at_end);
    guarded x = guarded_new(strided_floats(n_rows, x_stride, n_in) * sizeof(float), at_end);
    guarded y = guarded_new(strided_floats(n_rows, y_stride, n_out) * sizeof(float), at_end);
    rng_floats(r, x.data, strided_floats(n_rows, x_stride, n_in));
    ksort_linear_args args = {sizeof args, weights.data, x.data, y.data, x_stride, y_stride,
                              n_out, n_in, n_rows, type, bias.data};
    for (uint32_t ith = 0; ith < nth; ith++) CHECK_OK(ksort_linear(&args, ith, nth));
    guarded_free(y);
    guarded_free(x);
    guarded_free(bias);
    guarded_free(weights);
}

static void normalize_and_gate(rng *r) {
    uint32_t n_rows = rng_between(r, 1, 9), heads = rng_next(r) >> 63 ? 1 : rng_between(r, 1, 5);
    uint32_t n = rng_between(r, 1, 300), nth = rng_between(r, 1, 4);
    int at_end = (int)rng_between(r, 0, 1);
    size_t stride = heads * n + rng_between(r, 0, 5), n_floats = strided_floats(n_rows, stride, heads * n);
    guarded x = guarded_new(n_floats * sizeof(float), at_end), added = guarded_new(n_floats * sizeof(float), at_end);
    guarded y = guarded_new(n_floats * sizeof(float), at_end), gain = guarded_new(n * sizeof(float), at_end);
    rng_floats(r, x.data, n_floats);
    rng_floats(r, added.data, n_floats);
    rng_floats(r, gain.data, n);
    ksort_rms_norm_args norm = {sizeof norm, x.data, gain.data, y.data, stride, stride, n, n_rows, 1e-5f, heads,
                                added.data, stride, 0.5f};
    for (uint32_t ith = 0; ith < nth; ith++) CHECK_OK(ksort_rms_norm(&norm, ith, nth));
    ksort_swiglu_args swiglu = {sizeof swiglu, x.data, added.data, y.data, stride, stride, heads * n, n_rows};
    for (uint32_t ith = 0; ith < nth; ith++) CHECK_OK(ksort_swiglu(&swiglu, ith, nth));
    guarded_free(gain);
    guarded_free(y);
    guarded_free(added);
    guarded_free(x);
}

int main(int argc, char **argv) {
    long n_iterations = argc > 1 ? atol(argv[1]) : 100;
    rng r = {argc > 2 ? strtoull(argv[2], NULL, 10) | 1 : 1};
    if (strcmp(ksort_kernels(), "unsupported") == 0) return SKIPPED;
    for (long i = 0; i < n_iterations; i++) {
        problem p = random_problem(&r);
        ksort_cache k, v;
        uint32_t highest_type = p.head_dim < 16 ? KSORT_BF16 : KSORT_SBFP11;
        guarded k_memory = new_cache(&k, random_format(&r, KSORT_F32, highest_type, p.head_dim), &p);
        guarded v_memory = new_cache(&v, random_format(&r, KSORT_F32, highest_type, p.head_dim), &p);
        guarded_rope rope = random_rope(&r, &p);
        guarded_transform transform = random_transform(&r, &p);
        const ksort_transform *k_transform = k.format.type >= KSORT_BFP16 ? &transform.transform : NULL;
        const ksort_transform *v_transform = v.format.type >= KSORT_BFP16 ? &transform.transform : NULL;
        if (rng_next(&r) >> 63) k_transform = NULL;
        if (rng_next(&r) >> 63) v_transform = NULL;
        ksort_exact k_exact = random_exact(&r, &p), v_exact = k_exact;
        guarded k_rows = {0}, v_rows = {0};
        if (k.format.type >= KSORT_BFP16 && rng_next(&r) >> 63) k_rows = add_exact(&k, &k_exact, &p);
        if (v.format.type >= KSORT_BFP16 && rng_next(&r) >> 63) v_rows = add_exact(&v, &v_exact, &p);
        uint64_t state = r.state; /* both are cut at the same slot: begin is equal */
        pack_all(&r, &p, &k, &k_exact, &rope.rope, k_transform);
        r.state = state;
        pack_all(&r, &p, &v, &v_exact, NULL, v_transform);
        attend(&r, &p, &k, &v, &rope.rope, k_transform, v_transform);
        if (k.exact) guarded_free(k_rows);
        if (v.exact) guarded_free(v_rows);
        free_transform(transform);
        free_rope(rope);
        guarded_free(v_memory);
        guarded_free(k_memory);
        multiply(&r);
        normalize_and_gate(&r);
    }
    printf("guard_pages: %ld problems, kernels %s\n", n_iterations, ksort_kernels());
    return 0;
}
