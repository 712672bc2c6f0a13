/* Compares libksort_cuda with libksort through their public ABIs: packed bytes are equal, attention is within the bound
 * of double, every status is told, a captured step stays right while lengths grow.
 * usage: cuda_test [SEED] [PROBLEMS]     exit status 77: no CUDA device */
#include "cuda_exact.h"

/* Of the bound, which adds up worst cases (tests/native_support.py): held to this share of it, small mistakes show. */
static const double SHARE = 0.05;

static uint32_t n_failures = 0;

/* Unless `ok`, says which problem failed, and goes on: the others may tell more. */
static void expect(bool ok, const char *what, uint32_t index, const shape &p) {
    if (ok) return;
    n_failures++;
    fprintf(stderr,
            "failed: %s, problem %u: head_dim %u, %u/%u heads, k type %u blocks %u, v type %u blocks %u, x type %u, "
            "%u contexts of up to %u new tokens, %s\n",
            what, index, p.head_dim, p.n_heads, p.n_kv_heads, p.k.type, p.k.block_size, p.v.type, p.v.block_size,
            p.x_type, p.n_contexts, p.n_tokens, p.has_page_table ? "page table" : "no page table");
    for (uint32_t s = 0; s < p.n_contexts; s++) fprintf(stderr, "    cached %d, new %d\n", p.n_cached[s], p.n_new[s]);
}

static bool all_are_new(const shape &p) {
    return std::all_of(p.n_new.begin(), p.n_new.end(), [&p](int32_t n) { return n == (int32_t)p.n_tokens; });
}

/* Sets the heads of all tokens that count: each by fill(channels). */
template <typename F>
static void fill_rows(token_rows *x, const shape &p, uint32_t n_heads, F fill) {
    std::vector<float> head(p.head_dim);
    for (uint32_t s = 0; s < p.n_contexts; s++)
        for (int32_t t = 0; t < p.n_new[s]; t++)
            for (uint32_t h = 0; h < n_heads; h++) {
                fill(head);
                for (uint32_t c = 0; c < p.head_dim; c++) x->set(s, (uint32_t)t, (size_t)h * p.head_dim + c, head[c]);
            }
}

/* Heads that encoders get wrong: ties, outliers, all largest, subnormal, zero; now and then one that is refused. */
static void fill_nasty(rng *r, std::vector<float> &head, bool with_faults) {
    static const float factors[] = {1.0f, 1.0f, 300.0f, 1e-3f, 3e-6f, 1e30f, 1e-30f, 0x1p-126f, 0x1p-140f, 0.0f};
    uint32_t kind = rng_between(r, 0, 9);
    float factor = factors[rng_between(r, 0, sizeof factors / sizeof *factors - 1)];
    for (float &x : head) {
        if (kind < 6) x = rng_normal(r) * factor;
        else if (kind == 6) x = 0.25f * (float)((int)rng_between(r, 0, 64) - 32);
        else if (kind == 7) x = rng_normal(r) * (rng_between(r, 0, 19) ? 1.0f : 100.0f);
        else if (kind == 8) x = coin(r) ? 60000.0f : -60000.0f;
        else x = rng_between(r, 0, 9) ? 0.0f : rng_normal(r);
    }
    if (with_faults && rng_between(r, 0, 30) == 0)
        head[rng_between(r, 0, (uint32_t)head.size() - 1)] = coin(r) ? NAN : INFINITY;
}

/* One random problem of ksort_cuda_pack: all bytes of both caches, stale ones too, are those of ksort_pack, and those of
 * exact rows beside them what FORMAT.md says. */
static void compare_pack(rng *r, uint32_t index, uint32_t most_tokens) {
    shape p = random_shape(r, index, most_tokens);
    if (coin(r)) set_scaled_types(r, &p);
    paged_cache k(r, p, p.k), v(r, p, p.v);
    rope_tables rope(r, p, p.capacity());
    transform_tables k_tables(r, p), v_tables(r, p);
    steps k_steps = {coin(r) ? &rope : nullptr, coin(r) ? &k_tables : nullptr};
    steps v_steps = {nullptr, is_bfp(p.v.type) && coin(r) ? &v_tables : nullptr};
    row_strides strides(r, p, (size_t)p.n_kv_heads * p.head_dim);
    token_rows k_x(p, strides), v_x(p, strides);
    bool with_faults = rng_between(r, 0, 3) == 0;
    fill_rows(&k_x, p, p.n_kv_heads, [&](std::vector<float> &head) { fill_nasty(r, head, with_faults); });
    fill_rows(&v_x, p, p.n_kv_heads, [&](std::vector<float> &head) { fill_nasty(r, head, with_faults); });
    k.fill_any(r), v.fill_any(r);
    k.upload(), v.upload(), k_x.upload(), v_x.upload();
    exact_sizes sizes(r, p);
    exact_rows k_exact(r, p, sizes), v_exact(r, p, sizes);
    k_exact.upload(), v_exact.upload();
    if (coin(r)) k.cache.exact = &k_exact.exact;
    if (is_bfp(p.v.type) && coin(r)) v.cache.exact = &v_exact.exact;

    bool has_k = rng_between(r, 0, 5) > 0, has_v = !has_k || rng_between(r, 0, 5) > 0;
    int32_t k_status = has_k ? pack_all_on_cpu(k, p, k_steps, k_x) : KSORT_OK;
    int32_t v_status = has_v ? pack_all_on_cpu(v, p, v_steps, v_x) : KSORT_OK;
    int32_t status = std::max(k_status, v_status);
    if (has_k && k.cache.exact) status = std::max(status, pack_exact_on_cpu(&k_exact, sizes, p, k_steps, k_x));
    if (has_v && v.cache.exact) status = std::max(status, pack_exact_on_cpu(&v_exact, sizes, p, v_steps, v_x));
    device_tokens tokens(p);
    if (all_are_new(p)) tokens.tokens.n_new = nullptr;
    ksort_cuda_pack_args args = {sizeof args, &tokens.tokens};
    args.k = has_k ? &k.cache : nullptr, args.v = has_v ? &v.cache : nullptr;
    args.rope = k_steps.rope ? &rope.device : nullptr;
    args.k_transform = k_steps.transform ? &k_tables.device : nullptr;
    args.v_transform = v_steps.transform ? &v_tables.device : nullptr;
    args.k_x = k_x.device.data, args.v_x = v_x.device.data;
    args.token_stride = strides.token, args.context_stride = strides.context, args.x_type = p.x_type;
    CHECK_OK(ksort_cuda_pack(&args, nullptr));
    expect(tokens.read_status() == status, "pack: status", index, p);
    expect(k_exact.device_has_same_bytes(), "pack: exact rows of keys", index, p);
    expect(v_exact.device_has_same_bytes(), "pack: exact rows of values", index, p);
    expect(k.device_has_same_bytes(), "pack: bytes of keys", index, p);
    expect(v.device_has_same_bytes(), "pack: bytes of values", index, p);
}

/* The largest errors of compared rows, over their bounds. */
struct error_shares {
    double whole = 0, fine = 0; /* of rows whose weights have 11 bits; of all, less what such weights may add */
    uint32_t n_coarse = 0;      /* rows whose weights have 11 bits */

    void add(const error_shares &other) {
        whole = std::max(whole, other.whole), fine = std::max(fine, other.fine), n_coarse += other.n_coarse;
    }
};

/* Row (s, t, head) against double: the largest errors, but for that of storing the output, over their bounds. */
static error_shares shares_of_row(const attend_problem &a, uint32_t s, uint32_t t, uint32_t head,
                                  const std::vector<float> &k, const std::vector<float> &v) {
    const shape &p = a.p;
    seen_slots seen(a, s, t);
    bool is_coarse = has_coarse_weights(a, seen);
    uint32_t kv_head = head / (p.n_heads / p.n_kv_heads);
    expected_row expected = expected_of(a, s, t, head, k, v);
    if (a.v_steps.transform) restore(a.v_steps.transform->of_head(kv_head), &expected);
    std::vector<float> out = a.out.head(s, t, head, p.head_dim);
    error_shares shares;
    shares.n_coarse = is_coarse;
    for (uint32_t c = 0; c < p.head_dim; c++) {
        double stored = a.out.rounding_error() * std::fabs(expected.out[c]) + token_rows::SMALLEST;
        double error = std::fabs(out[c] - expected.out[c]) - stored;
        if (is_coarse) shares.whole = std::max(shares.whole, error / expected.bound[c]);
        shares.fine = std::max(shares.fine, (error - expected.coarse[c]) / expected.bound[c]);
    }
    return shares;
}

static bool all_are_finite(const token_rows &out, const shape &p) {
    for (uint32_t s = 0; s < p.n_contexts; s++)
        for (int32_t t = 0; t < p.n_new[s]; t++)
            for (size_t i = 0; i < (size_t)p.n_heads * p.head_dim; i++)
                if (!std::isfinite(out.get(s, (uint32_t)t, i))) return false;
    return true;
}

/* The first, the last and some other rows of each KV head. */
static error_shares compare_rows(rng *r, const attend_problem &a) {
    const shape &p = a.p;
    error_shares shares;
    for (uint32_t s = 0; s < p.n_contexts; s++)
        for (uint32_t h = 0; h < p.n_kv_heads && p.n_new[s] > 0; h++) {
            uint32_t n_slots = (uint32_t)(p.n_cached[s] + p.n_new[s]), group = p.n_heads / p.n_kv_heads;
            std::vector<float> k = unpack(a.k, s, h, n_slots), v = unpack(a.v, s, h, n_slots);
            uint32_t last = (uint32_t)p.n_new[s] * group - 1;
            for (uint32_t i = 0; i < 8 && i <= last; i++) {
                uint32_t row = i == 0 ? 0 : i == 1 ? last : rng_between(r, 0, last);
                shares.add(shares_of_row(a, s, row / group, h * group + row % group, k, v));
            }
        }
    return shares;
}

/* Lets the new tokens of a context begin with short rows and end with long ones, where its pages hold as many. */
static void cross_short_slots(rng *r, shape *p) {
    uint32_t s = rng_between(r, 0, p->n_contexts - 1), n_new = (uint32_t)p->n_new[s];
    uint32_t n_cached = SHORT_SLOTS - std::min(SHORT_SLOTS, rng_between(r, 0, n_new));
    if (n_cached + n_new <= p->capacity()) p->n_cached[s] = (int32_t)n_cached;
}

/* One random problem of ksort_cuda_attend. */
static error_shares compare_attend(rng *r, uint32_t index, uint32_t most_tokens) {
    shape p = random_shape(r, index, most_tokens);
    if (coin(r)) set_scaled_types(r, &p);
    bool has_exact = p.v.type != KSORT_BF16 && coin(r);
    if (most_tokens > 1 && coin(r)) cross_short_slots(r, &p);
    paged_cache k(r, p, p.k), v(r, p, p.v);
    rope_tables rope(r, p, p.capacity());
    transform_tables k_tables(r, p), v_tables(r, p);
    steps k_steps = {coin(r) ? &rope : nullptr, coin(r) ? &k_tables : nullptr};
    steps v_steps = {nullptr, is_bfp(p.v.type) && coin(r) ? &v_tables : nullptr};
    k.fill_ones(), v.fill_ones();
    fill_keys(r, k, p, k_steps), fill_values(r, v, p, v_steps);
    exact_sizes sizes(r, p);
    exact_rows k_exact(r, p, sizes), v_exact(r, p, sizes);
    if (has_exact) {
        k_exact.fill(r, p, 1.0f), v_exact.fill(r, p, coin(r) ? 1.0f : 100.0f);
        k_exact.upload(), v_exact.upload();
        k.cache.exact = &k_exact.exact;
        if (is_bfp(p.v.type)) v.cache.exact = &v_exact.exact;
    }
    row_strides q_strides(r, p, (size_t)p.n_heads * p.head_dim), out_strides(r, p, (size_t)p.n_heads * p.head_dim);
    token_rows q(p, q_strides), out(p, out_strides);
    fill_rows(&q, p, p.n_heads, [&](std::vector<float> &head) {
        for (float &x : head) x = rng_normal(r);
    });
    k.upload(), v.upload(), q.upload(), out.upload();

    device_tokens tokens(p);
    if (all_are_new(p)) tokens.tokens.n_new = nullptr;
    ksort_cuda_attend_args args = {sizeof args, &tokens.tokens, &k.cache, &v.cache};
    args.rope = k_steps.rope ? &rope.device : nullptr;
    args.k_transform = k_steps.transform ? &k_tables.device : nullptr;
    args.v_transform = v_steps.transform ? &v_tables.device : nullptr;
    args.q = q.device.data, args.out = out.device.data;
    args.q_token_stride = q_strides.token, args.q_context_stride = q_strides.context;
    args.out_token_stride = out_strides.token, args.out_context_stride = out_strides.context;
    args.x_type = p.x_type, args.n_heads = p.n_heads;
    args.window = coin(r) ? rng_between(r, 1, p.most_slots() + 10) : 0;
    args.max_slots = rng_between(r, p.most_slots(), p.capacity());
    args.scale = 1.0f / std::sqrt((float)p.head_dim);
    CHECK_OK(ksort_cuda_attend_workspace_bytes(&args, &args.workspace_bytes));
    device_array<uint8_t> workspace(std::vector<uint8_t>(args.workspace_bytes, 0xFF));
    args.workspace = workspace.data;
    CHECK_OK(ksort_cuda_attend(&args, nullptr));
    expect(tokens.read_status() == KSORT_OK, "attend: status", index, p);
    expect(k.device_has_same_bytes() && v.device_has_same_bytes(), "attend: caches are only read", index, p);
    out.download();
    expect(out.others_are_untouched(p), "attend: only rows that count are written", index, p);
    expect(all_are_finite(out, p), "attend: all rows that count are written, and finite", index, p);
    error_shares shares = compare_rows(r, {p, k, v, k_steps, v_steps, q, out, args.window, args.scale,
                                           has_exact ? &sizes : nullptr, k_exact, v_exact});
    bool within = shares.fine <= SHARE && shares.whole <= 1;
    if (!within)
        fprintf(stderr, "%.4f of the bound, %.4f with weights of 11 bits, window %u, max_slots %u\n", shares.fine,
                shares.whole, args.window, args.max_slots);
    expect(within, "attend: bound", index, p);
    return shares;
}

static error_shares compare_attends(rng *r, const char *name, uint32_t n_problems, uint32_t most_tokens) {
    error_shares shares;
    for (uint32_t i = 0; i < n_problems; i++) shares.add(compare_attend(r, i, most_tokens));
    printf("%s: %u problems, at most %.4f of the bound", name, n_problems, shares.fine);
    if (shares.n_coarse) printf(", %.4f in %u rows with weights of 11 bits", shares.whole, shares.n_coarse);
    printf("\n");
    return shares;
}

int main(int argc, char **argv) {
    rng r = {argc > 1 ? strtoull(argv[1], nullptr, 0) : 20240331};
    uint32_t n_problems = argc > 2 ? (uint32_t)strtoul(argv[2], nullptr, 0) : 120;
    setvbuf(stdout, nullptr, _IOLBF, 0);
    CHECK(r.state != 0);
    check_arguments();
    printf("arguments: every status\n");
    int n_devices = 0;
    if (cudaGetDeviceCount(&n_devices) != cudaSuccess || n_devices == 0) {
        printf("no CUDA device\n");
        return SKIPPED;
    }
    CHECK_OK(ksort_cuda_device_status());
    for (uint32_t i = 0; i < n_problems; i++) compare_pack(&r, i, rng_between(&r, 0, 2) ? 40 : 150);
    for (uint32_t i = 0; i < n_problems / 6; i++) compare_pack(&r, i * 8, 2304); /* all slots of its longest caches */
    printf("pack: %u problems, %u with many tokens\n", n_problems, n_problems / 6);
    compare_attends(&r, "decode", n_problems, 1);
    error_shares prompts = compare_attends(&r, "prompt", n_problems, 100);
    CHECK(prompts.n_coarse > 0 || n_problems < 20); /* else long rows were not looked at */
    compare_attends(&r, "long prompt", n_problems / 6, 1200); /* thread blocks that prepare queries of many tokens */
    check_device_statuses(&r);
    printf("device statuses: every one\n");
    compare_captured_steps(&r);
    printf("captured steps: as without a graph\n");
    printf("%u failures\n", n_failures);
    return n_failures > 0;
}
