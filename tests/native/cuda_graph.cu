/* A decode step, pack and attend, captured once in a CUDA graph and replayed while the lengths in device memory grow:
 * over tile and page ends, and from fewer slots than the work was cut for. */
#include "cuda_reference.h"

namespace {

constexpr int N_STEPS = 150;

/* Everything that one step reads and writes; the graph is made of its addresses. */
struct captured_step {
    captured_step(rng *r, const shape &p)
        : k(r, p, p.k), v(r, p, p.v), rope(r, p, p.capacity()), k_tables(r, p),
          x_strides(r, p, (size_t)p.n_kv_heads * p.head_dim), q_strides(r, p, (size_t)p.n_heads * p.head_dim),
          k_x(p, x_strides), v_x(p, x_strides), q(p, q_strides), out(p, q_strides), tokens(p) {
        k.fill_ones(), v.fill_ones();
        k.upload(), v.upload(), k_x.upload(), v_x.upload(), q.upload(), out.upload();
        pack = {sizeof pack, &tokens.tokens, &k.cache, &v.cache};
        pack.rope = &rope.device, pack.k_transform = &k_tables.device;
        pack.k_x = k_x.device.data, pack.v_x = v_x.device.data;
        pack.token_stride = x_strides.token, pack.context_stride = x_strides.context, pack.x_type = p.x_type;
        attend = {sizeof attend, &tokens.tokens, &k.cache, &v.cache};
        attend.rope = &rope.device, attend.k_transform = &k_tables.device;
        attend.q = q.device.data, attend.out = out.device.data;
        attend.q_token_stride = attend.out_token_stride = q_strides.token;
        attend.q_context_stride = attend.out_context_stride = q_strides.context;
        attend.x_type = p.x_type, attend.n_heads = p.n_heads, attend.max_slots = p.capacity(), attend.scale = 0.1f;
        CHECK_OK(ksort_cuda_attend_workspace_bytes(&attend, &attend.workspace_bytes));
        workspace = device_array<uint8_t>(std::vector<uint8_t>(attend.workspace_bytes, 0xFF));
        attend.workspace = workspace.data;
    }

    paged_cache k, v;
    rope_tables rope;
    transform_tables k_tables;
    row_strides x_strides, q_strides;
    token_rows k_x, v_x, q, out;
    device_tokens tokens;
    device_array<uint8_t> workspace;
    ksort_cuda_pack_args pack;
    ksort_cuda_attend_args attend;
};

cudaGraphExec_t capture(const captured_step &step, cudaStream_t stream) {
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    CHECK_OK(ksort_cuda_pack(&step.pack, stream));
    CHECK_OK(ksort_cuda_attend(&step.attend, stream));
    CUDA_OK(cudaStreamEndCapture(stream, &graph));
    CUDA_OK(cudaGraphInstantiate(&executable, graph, 0));
    CUDA_OK(cudaGraphDestroy(graph));
    return executable;
}

/* New keys, values and queries for every context; the host's caches get what the CPU library packs. */
void next_tokens(rng *r, const shape &p, captured_step *step) {
    for (uint32_t s = 0; s < p.n_contexts; s++) {
        for (size_t i = 0; i < (size_t)p.n_kv_heads * p.head_dim; i++)
            step->k_x.set(s, 0, i, rng_normal(r)), step->v_x.set(s, 0, i, rng_normal(r));
        for (size_t i = 0; i < (size_t)p.n_heads * p.head_dim; i++) step->q.set(s, 0, i, rng_normal(r));
    }
    CHECK(pack_all_on_cpu(step->k, p, {&step->rope, &step->k_tables}, step->k_x) == KSORT_OK);
    CHECK(pack_all_on_cpu(step->v, p, {nullptr, nullptr}, step->v_x) == KSORT_OK);
    step->k_x.write(), step->v_x.write(), step->q.write();
    step->tokens.n_cached.write(p.n_cached.data());
}

/* One query head of every context against double. */
void compare_step(rng *r, const shape &p, const captured_step &step) {
    for (uint32_t s = 0; s < p.n_contexts; s++) {
        uint32_t head = rng_between(r, 0, p.n_heads - 1), kv_head = head / (p.n_heads / p.n_kv_heads);
        uint32_t n_slots = (uint32_t)p.n_cached[s] + 1;
        std::vector<float> q = prepared_query(step.q.head(s, 0, head, p.head_dim), {&step.rope, &step.k_tables},
                                              kv_head, n_slots - 1, p.k.block_size);
        std::vector<float> k = unpack_on_cpu(step.k, s, kv_head, n_slots);
        std::vector<float> v = unpack_on_cpu(step.v, s, kv_head, n_slots);
        auto query_of = [&q](size_t) -> const std::vector<float> & { return q; };
        expected_row expected = attend_in_double(query_of, k, v, 0, n_slots, step.attend.scale);
        std::vector<float> out = step.out.head(s, 0, head, p.head_dim);
        for (uint32_t c = 0; c < p.head_dim; c++)
            CHECK(std::fabs(out[c] - expected.out[c]) <= expected.bound[c] + 0x1p-24 * std::fabs(expected.out[c]));
    }
}

} // namespace

void compare_captured_steps(rng *r) {
    shape p;
    p.head_dim = 128, p.n_heads = 8, p.n_kv_heads = 2, p.n_contexts = 3, p.n_tokens = 1;
    p.page_tiles = 1, p.context_pages = 8, p.x_type = KSORT_F32, p.has_page_table = true;
    p.k = {sizeof p.k, KSORT_BFP12, p.head_dim, 32}, p.v = {sizeof p.v, KSORT_F16, p.head_dim, 16};
    p.n_cached.assign(3, N_STEPS), p.n_new.assign(3, 1); /* the page table's reach */
    captured_step step(r, p);
    p.n_cached = {0, 0, 0};
    cudaStream_t stream;
    CUDA_OK(cudaStreamCreate(&stream));
    cudaGraphExec_t graph = capture(step, stream);
    for (int i = 0; i < N_STEPS; i++) {
        next_tokens(r, p, &step);
        CUDA_OK(cudaGraphLaunch(graph, stream));
        CHECK(step.tokens.read_status() == KSORT_OK);
        step.out.download();
        compare_step(r, p, step);
        for (uint32_t s = 0; s <= 2; s++) p.n_cached[s]++;
    }
    CHECK(step.k.device_has_same_bytes());
    CHECK(step.v.device_has_same_bytes());
    CUDA_OK(cudaGraphExecDestroy(graph));
    CUDA_OK(cudaStreamDestroy(stream));
}
