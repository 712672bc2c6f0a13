/* What the kernels of libksort_cuda tell in *device_status, and that they leave out what they tell. */
#include "cuda_reference.h"

namespace {

constexpr uint32_t N_TOKENS = 3;

/* Two contexts of up to four tiles, two KV heads, keys and values in BFP12; n_tokens new tokens each. */
shape small_shape(uint32_t n_tokens) {
    shape p;
    p.head_dim = 64, p.n_heads = 6, p.n_kv_heads = 2, p.n_contexts = 2, p.n_tokens = n_tokens;
    p.page_tiles = 2, p.context_pages = 2, p.x_type = KSORT_F32, p.has_page_table = false;
    p.k = {sizeof p.k, KSORT_BFP12, p.head_dim, 32}, p.v = p.k;
    p.n_cached = {100, 30}, p.n_new.assign(2, (int32_t)n_tokens);
    return p;
}

void fill_normal(rng *r, token_rows *x, const shape &p, uint32_t n_heads) {
    for (uint32_t s = 0; s < p.n_contexts; s++)
        for (uint32_t t = 0; t < p.n_tokens; t++)
            for (size_t i = 0; i < (size_t)n_heads * p.head_dim; i++) x->set(s, t, i, rng_normal(r));
}

/* Packing of keys alone. The host's cache gets what the CPU library packs of the tokens that `counts` says. */
template <typename F>
void check_pack(rng *r, const shape &p, token_rows *x, const row_strides &strides, uint32_t n_positions,
                int32_t status_before, int32_t expected, F counts) {
    paged_cache k(r, p, p.k);
    rope_tables rope(r, p, p.capacity());
    k.fill_any(r);
    k.upload(), x->upload();
    for (uint32_t s = 0; s < p.n_contexts; s++)
        for (uint32_t t = 0; t < p.n_tokens; t++)
            for (uint32_t h = 0; h < p.n_kv_heads; h++)
                if (counts(s, t, h))
                    CHECK_OK(pack_on_cpu(k, {&rope, nullptr}, x->head(s, t, h, p.head_dim), s,
                                         (uint32_t)p.n_cached[s] + t, h));
    device_tokens tokens(p);
    tokens.tokens.n_positions = n_positions;
    tokens.status.write(&status_before);
    ksort_cuda_pack_args args = {sizeof args, &tokens.tokens, &k.cache};
    args.rope = &rope.device, args.k_x = x->device.data, args.x_type = p.x_type;
    args.token_stride = strides.token, args.context_stride = strides.context;
    CHECK_OK(ksort_cuda_pack(&args, nullptr));
    CHECK(tokens.read_status() == expected);
    CHECK(k.device_has_same_bytes());
}

void check_pack_statuses(rng *r) {
    shape p = small_shape(N_TOKENS);
    row_strides strides(r, p, (size_t)p.n_kv_heads * p.head_dim);
    token_rows x(p, strides);
    fill_normal(r, &x, p, p.n_kv_heads);
    auto all = [](uint32_t, uint32_t, uint32_t) { return true; };
    check_pack(r, p, &x, strides, 1000, KSORT_OK, KSORT_OK, all);
    check_pack(r, p, &x, strides, 1000, KSORT_ERR_TRANSFORM, KSORT_ERR_TRANSFORM, all); /* nothing found: left alone */
    check_pack(r, p, &x, strides, 101, KSORT_OK, KSORT_ERR_ROPE,
               [](uint32_t s, uint32_t t, uint32_t) { return s == 1 || t == 0; });
    shape full = p;
    full.n_cached[0] = (int32_t)p.capacity() - 1;
    check_pack(r, full, &x, strides, 1000, KSORT_OK, KSORT_ERR_ARGUMENT,
               [](uint32_t s, uint32_t t, uint32_t) { return s == 1 || t == 0; });
    x.set(1, 2, p.head_dim + 5, NAN);
    auto not_nan = [](uint32_t s, uint32_t t, uint32_t h) { return s != 1 || t != 2 || h != 1; };
    check_pack(r, p, &x, strides, 1000, KSORT_OK, KSORT_ERR_NON_FINITE, not_nan);
    check_pack(r, p, &x, strides, 1000, KSORT_ERR_TRANSFORM, KSORT_ERR_TRANSFORM, not_nan); /* the larger one stays */
}

/* What attention over zeros tells; q is normal but for one channel. */
int32_t attend_status(rng *r, const shape &p, uint32_t max_slots, uint32_t n_positions, float channel) {
    paged_cache k(r, p, p.k), v(r, p, p.v);
    rope_tables rope(r, p, p.capacity());
    row_strides strides(r, p, (size_t)p.n_heads * p.head_dim);
    token_rows q(p, strides), out(p, strides);
    fill_normal(r, &q, p, p.n_heads);
    q.set(1, p.n_tokens - 1, 70, channel);
    k.fill_zeros(), v.fill_zeros();
    k.upload(), v.upload(), q.upload(), out.upload();
    device_tokens tokens(p);
    tokens.tokens.n_positions = n_positions;
    ksort_cuda_attend_args args = {sizeof args, &tokens.tokens, &k.cache, &v.cache};
    args.rope = &rope.device;
    args.q = q.device.data, args.out = out.device.data;
    args.q_token_stride = args.out_token_stride = strides.token;
    args.q_context_stride = args.out_context_stride = strides.context;
    args.x_type = p.x_type, args.n_heads = p.n_heads, args.max_slots = max_slots, args.scale = 0.125f;
    CHECK_OK(ksort_cuda_attend_workspace_bytes(&args, &args.workspace_bytes));
    device_array<uint8_t> workspace(std::vector<uint8_t>(args.workspace_bytes, 0xFF));
    args.workspace = workspace.data;
    CHECK_OK(ksort_cuda_attend(&args, nullptr));
    return tokens.read_status();
}

void check_attend_statuses(rng *r, uint32_t n_tokens) {
    shape p = small_shape(n_tokens);
    uint32_t n_slots = p.most_slots();
    CHECK(attend_status(r, p, n_slots, n_slots, 1.0f) == KSORT_OK);
    CHECK(attend_status(r, p, n_slots - 1, n_slots, 1.0f) == KSORT_ERR_ARGUMENT);
    CHECK(attend_status(r, p, n_slots, n_slots - 1, 1.0f) == KSORT_ERR_ROPE);
    CHECK(attend_status(r, p, n_slots, n_slots, NAN) == KSORT_ERR_NON_FINITE);
    CHECK(attend_status(r, p, n_slots, n_slots, -INFINITY) == KSORT_ERR_NON_FINITE);
}

} // namespace

void check_device_statuses(rng *r) {
    check_pack_statuses(r);
    check_attend_statuses(r, 1);
    check_attend_statuses(r, N_TOKENS);
}
