/* Packs, attends, unpacks and multiplies random problems with unmapped pages directly before and after every buffer, so that a read
 * or write of one byte too many ends the program, in code that sanitizers do not instrument (intrinsics) as well.
 * usage: guard_pages ITERATIONS [SEED]; KSORT_KERNELS chooses the level. */
#include <float.h>
#include <math.h>
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

static guarded guarded_new(size_t n_bytes, int at_end) {
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

static void guarded_free(guarded g) { munmap(g.mapping, g.mapped_bytes); }

/* Exactly the floats that a row-strided array spans: the last row has no padding behind it. */
static size_t strided_floats(uint32_t n_rows, size_t stride, size_t row) { return (n_rows - 1) * stride + row; }

typedef struct problem {
    uint32_t n_heads, n_kv_heads, head_dim, n_queries, n_rot, nth;
    size_t first_slot, n_slots;
    int at_end;
} problem;

static problem random_problem(rng *r) {
    problem p;
    p.n_kv_heads = rng_between(r, 1, 3);
    p.n_heads = p.n_kv_heads * rng_between(r, 1, 5);
    p.head_dim = 2 * (rng_next(r) >> 63 ? rng_between(r, 1, 128) : 8 * rng_between(r, 1, 16));
    p.n_queries = rng_next(r) >> 62 ? 1 : rng_between(r, 1, 70);
    p.first_slot = rng_between(r, 0, 300);
    p.n_slots = p.first_slot + p.n_queries;
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
static void order_head(rng *r, uint16_t *partner, int8_t *sign, uint16_t *frequency, uint32_t head_dim) {
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

static guarded_rope random_rope(rng *r, const problem *p) {
    guarded_rope g;
    size_t n = (size_t)p->n_kv_heads * p->head_dim;
    uint32_t n_pairs = p->n_rot ? p->n_rot / 2 : 1;
    uint32_t n_frequencies = n_pairs + (rng_next(r) >> 63 ? 0 : rng_between(r, 0, 150));
    size_t n_waves = p->n_slots * n_frequencies;
    g.partner = guarded_new(n * sizeof(uint16_t), p->at_end);
    g.sign = guarded_new(n, p->at_end);
    g.frequency = guarded_new(n * sizeof(uint16_t), p->at_end);
    g.cos = guarded_new(n_waves * sizeof(float), p->at_end);
    g.sin = guarded_new(n_waves * sizeof(float), p->at_end);
    fill_rope_tables(g.partner.data, g.sign.data, g.frequency.data, p->n_kv_heads, p->head_dim, p->n_rot);
    for (uint32_t head = 0; head < p->n_kv_heads; head++) {
        size_t at = (size_t)head * p->head_dim;
        order_head(r, (uint16_t *)g.partner.data + at, (int8_t *)g.sign.data + at, (uint16_t *)g.frequency.data + at,
                   p->head_dim);
    }
    rng_floats(r, g.cos.data, n_waves);
    rng_floats(r, g.sin.data, n_waves);
    g.rope = (ksort_rope){sizeof(ksort_rope), n_frequencies, g.partner.data, g.sign.data,
                          g.frequency.data,   g.cos.data,    g.sin.data};
    return g;
}

static void free_rope(guarded_rope g) {
    guarded_free(g.partner);
    guarded_free(g.sign);
    guarded_free(g.frequency);
    guarded_free(g.cos);
    guarded_free(g.sin);
}

typedef struct guarded_transform {
    guarded shift, scale, sequence, feedback;
    ksort_transform transform;
} guarded_transform;

/* Scales from 0.5 to 1.5. */
static guarded_transform random_transform(rng *r, const problem *p) {
    guarded_transform g;
    size_t d = p->head_dim, n = p->n_kv_heads * d;
    g.shift = guarded_new(n * sizeof(float), p->at_end);
    g.scale = guarded_new(n * sizeof(float), p->at_end);
    g.sequence = guarded_new(n * sizeof(uint16_t), p->at_end);
    g.feedback = guarded_new(n * d * sizeof(float), p->at_end);
    float *scale = g.scale.data, *feedback = g.feedback.data;
    rng_floats(r, g.shift.data, n);
    for (size_t i = 0; i < n; i++) scale[i] = 1.0f + 0.5f * rng_float(r);
    uint16_t *sequence = g.sequence.data, turn = (uint16_t)rng_between(r, 0, p->head_dim - 1);
    for (size_t i = 0; i < n; i++) sequence[i] = (uint16_t)((i + turn) % d);
    for (size_t i = 0; i < n * d; i++) feedback[i] = 0.1f * rng_float(r);
    g.transform = (ksort_transform){sizeof(ksort_transform), g.shift.data, g.scale.data,
                                    rng_next(r) >> 63 ? feedback : NULL, rng_between(r, 0, 1),
                                    rng_next(r) >> 63 ? sequence : NULL};
    return g;
}

static void free_transform(guarded_transform g) {
    guarded_free(g.shift);
    guarded_free(g.scale);
    guarded_free(g.sequence);
    guarded_free(g.feedback);
}

/* A cache of p's geometry whose memory holds exactly its tiles, filled with 0xFF: NaN or infinity, were it read. */
static guarded new_cache(ksort_cache *cache, ksort_format format, const problem *p) {
    size_t tile_bytes = 0, n_tiles = (p->n_slots + KSORT_TILE_TOKENS - 1) / KSORT_TILE_TOKENS;
    CHECK_OK(ksort_tile_bytes(&format, &tile_bytes));
    guarded g = guarded_new(n_tiles * p->n_kv_heads * tile_bytes, p->at_end);
    memset(g.data, 0xFF, n_tiles * p->n_kv_heads * tile_bytes);
    *cache = (ksort_cache){sizeof *cache, format,       g.data, p->n_kv_heads * tile_bytes,
                           tile_bytes,    p->n_slots, p->n_kv_heads};
    return g;
}

/* Packs n_slots random tokens in two calls and reads them back: finite, and off by at most one rounding step (where no
 * transform moves them further). */
static void pack_all(rng *r, const problem *p, const ksort_cache *cache, const ksort_rope *rope,
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
        ksort_pack_args args = {sizeof args, cache, rope ? &at_start : NULL, x.data, stride, start, transform,
                                end - start};
        for (uint32_t ith = 0; ith < p->nth; ith++) CHECK_OK(ksort_pack(&args, ith, p->nth));
        guarded back = guarded_new((end - start) * row * sizeof(float), p->at_end);
        CHECK_OK(ksort_unpack(cache, start, end - start, back.data));
        float limit = transform ? FLT_MAX : 2.01f;
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
    float limit = v_transform ? FLT_MAX : 1.001f;
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
    ksort_linear_args args = {sizeof args, weights.data, bias.data, x.data, y.data, x_stride, y_stride,
                              n_out, n_in, n_rows, type};
    for (uint32_t ith = 0; ith < nth; ith++) CHECK_OK(ksort_linear(&args, ith, nth));
    guarded_free(y);
    guarded_free(x);
    guarded_free(bias);
    guarded_free(weights);
}

int main(int argc, char **argv) {
    long n_iterations = argc > 1 ? atol(argv[1]) : 100;
    rng r = {argc > 2 ? strtoull(argv[2], NULL, 10) | 1 : 1};
    if (strcmp(ksort_kernels(), "unsupported") == 0) return SKIPPED;
    for (long i = 0; i < n_iterations; i++) {
        problem p = random_problem(&r);
        ksort_cache k, v;
        uint32_t highest_type = p.head_dim < 16 ? KSORT_BF16 : KSORT_BFP12;
        guarded k_memory = new_cache(&k, random_format(&r, KSORT_F32, highest_type, p.head_dim), &p);
        guarded v_memory = new_cache(&v, random_format(&r, KSORT_F32, highest_type, p.head_dim), &p);
        guarded_rope rope = random_rope(&r, &p);
        guarded_transform transform = random_transform(&r, &p);
        const ksort_transform *k_transform = k.format.type >= KSORT_BFP16 ? &transform.transform : NULL;
        const ksort_transform *v_transform = v.format.type >= KSORT_BFP16 ? &transform.transform : NULL;
        if (rng_next(&r) >> 63) k_transform = NULL;
        if (rng_next(&r) >> 63) v_transform = NULL;
        pack_all(&r, &p, &k, &rope.rope, k_transform);
        pack_all(&r, &p, &v, NULL, v_transform);
        attend(&r, &p, &k, &v, &rope.rope, k_transform, v_transform);
        free_transform(transform);
        free_rope(rope);
        guarded_free(v_memory);
        guarded_free(k_memory);
        multiply(&r);
    }
    printf("guard_pages: %ld problems, kernels %s\n", n_iterations, ksort_kernels());
    return 0;
}
