/* Steps and products of random sizes on pools of 1 to 4 threads, each compared with the same parts run one after another.
 * Built with ThreadSanitizer it finds unsynchronized hand-overs; without, lost parts and lost wake-ups.
 * usage: pool_race STEPS */
#include <unistd.h>

#include "ksort_run.h"
#include "support.h"

enum { N_HEADS = 4, N_KV_HEADS = 2, HEAD_DIM = 32, N_SLOTS = 2048, MAX_STEP = 40 };
enum { ROW = (N_HEADS + 2 * N_KV_HEADS) * HEAD_DIM, OUT_ROW = N_HEADS * HEAD_DIM };

/* One layer's caches, tables and argument structs. `out` is what the last step gave. */
typedef struct layer {
    ksort_cache k, v;
    uint16_t partner[N_KV_HEADS * HEAD_DIM], frequency[N_KV_HEADS * HEAD_DIM];
    int8_t sign[N_KV_HEADS * HEAD_DIM];
    ksort_rope rope;
    float feedback[N_KV_HEADS * HEAD_DIM * HEAD_DIM];
    ksort_transform transform;
    ksort_pack_args pack_k, pack_v;
    ksort_attend_args attend;
    float out[MAX_STEP * OUT_ROW];
} layer;

static ksort_cache new_cache(uint32_t type) {
    ksort_cache cache = {sizeof cache, {sizeof cache.format, type, HEAD_DIM, 32}, NULL, 0, 0, N_SLOTS, N_KV_HEADS, NULL};
    CHECK_OK(ksort_tile_bytes(&cache.format, &cache.head_stride));
    cache.tile_stride = N_KV_HEADS * cache.head_stride;
    cache.base = aligned_alloc(KSORT_ALIGNMENT, N_SLOTS / KSORT_TILE_TOKENS * cache.tile_stride);
    CHECK(cache.base != NULL);
    return cache;
}

static layer *new_layer(void) {
    layer *l = calloc(1, sizeof *l);
    CHECK(l != NULL);
    l->k = new_cache(KSORT_BFP12);
    l->v = new_cache(KSORT_BFP14);
    fill_rope_tables(l->partner, l->sign, l->frequency, N_KV_HEADS, HEAD_DIM, HEAD_DIM);
    l->rope = (ksort_rope){sizeof l->rope, HEAD_DIM / 2, l->partner, l->sign, l->frequency, NULL, NULL};
    for (int i = 0; i < N_KV_HEADS * HEAD_DIM * HEAD_DIM; i++) l->feedback[i] = 0.01f * (float)(i % 7 - 3);
    l->transform = (ksort_transform){.struct_size = sizeof l->transform, .feedback = l->feedback, .rotate = 1};
    l->pack_k = (ksort_pack_args){sizeof l->pack_k, &l->k, NULL, ROW, 0, 0, &l->rope, &l->transform};
    l->pack_v = (ksort_pack_args){sizeof l->pack_v, &l->v, NULL, ROW, 0, 0, NULL, &l->transform};
    l->attend = (ksort_attend_args){.struct_size = sizeof l->attend, .k = &l->k, .v = &l->v, .rope = &l->rope,
                                    .k_transform = &l->transform, .v_transform = &l->transform,
                                    .q_token_stride = ROW, .out = l->out, .out_token_stride = OUT_ROW,
                                    .n_heads = N_HEADS, .query_type = KSORT_BFP16, .scale = 0.2f};
    return l;
}

static void free_layer(layer *l) {
    free(l->k.base);
    free(l->v.base);
    free(l);
}

/* Points the layer's structs to a step's tokens: qkv rows are [q | k | v], rope_table [n_tokens, HEAD_DIM / 2]. */
static void aim(layer *l, const float *qkv, const float *rope_table, size_t first_slot, uint32_t n_tokens) {
    l->rope.cos = rope_table;
    l->rope.sin = rope_table;
    l->attend.q = qkv;
    l->pack_k.x = qkv + N_HEADS * HEAD_DIM;
    l->pack_v.x = l->pack_k.x + N_KV_HEADS * HEAD_DIM;
    l->pack_k.first_slot = l->pack_v.first_slot = l->attend.first_slot = first_slot;
    l->pack_k.n_tokens = l->pack_v.n_tokens = l->attend.n_queries = n_tokens;
}

static void give_workspace(layer *l, uint32_t nth) {
    CHECK_OK(ksort_attend_workspace_bytes(&l->attend, nth, &l->attend.workspace_bytes));
    size_t aligned = (l->attend.workspace_bytes / KSORT_ALIGNMENT + 1) * KSORT_ALIGNMENT;
    l->attend.workspace = aligned_alloc(KSORT_ALIGNMENT, aligned);
    CHECK(l->attend.workspace != NULL);
}

static void step_without_pool(layer *l, uint32_t nth) {
    for (uint32_t ith = 0; ith < nth; ith++) CHECK_OK(ksort_pack(&l->pack_k, ith, nth));
    for (uint32_t ith = 0; ith < nth; ith++) CHECK_OK(ksort_pack(&l->pack_v, ith, nth));
    for (uint32_t ith = 0; ith < nth; ith++) CHECK_OK(ksort_attend(&l->attend, ith, nth));
    for (uint32_t ith = 0; ith < nth; ith++) CHECK_OK(ksort_attend_merge(&l->attend, ith, nth));
}

/* A matrix product on the pool against the same in one part; large enough for several parts now and then. */
static void multiply(rng *r, ksort_pool *pool) {
    enum { MAX_OUT = 900, N_IN = 130 };
    static float weights[MAX_OUT * N_IN], x[N_IN], pooled[MAX_OUT], plain[MAX_OUT];
    size_t n_out = rng_between(r, 1, MAX_OUT);
    rng_floats(r, weights, n_out * N_IN);
    rng_floats(r, x, N_IN);
    ksort_linear_args args = {sizeof args, weights, x, pooled, N_IN, MAX_OUT, n_out, N_IN, 1, KSORT_F32, NULL};
    CHECK_OK(ksort_pool_linear(pool, &args));
    args.y = plain;
    CHECK_OK(ksort_linear(&args, 0, 1));
    CHECK(memcmp(pooled, plain, n_out * sizeof(float)) == 0);
}

static void run_steps(rng *r, uint32_t n_threads, long n_steps) {
    static float qkv[MAX_STEP * ROW], rope_table[MAX_STEP * HEAD_DIM / 2];
    ksort_pool *pool = NULL;
    CHECK_OK(ksort_pool_create(n_threads, &pool));
    layer *pooled = new_layer(), *plain = new_layer();
    size_t slot = 0;
    for (long step = 0; step < n_steps; step++) {
        uint32_t n_tokens = rng_between(r, 0, 3) ? 1 : rng_between(r, 1, MAX_STEP);
        if (slot + n_tokens > N_SLOTS) slot = 0;
        if (step % 50 == 49) usleep(2000); /* long enough for waiting threads to stop spinning and sleep */
        rng_floats(r, qkv, (size_t)n_tokens * ROW);
        rng_floats(r, rope_table, (size_t)n_tokens * HEAD_DIM / 2);
        layer *layers[] = {pooled, plain};
        for (int i = 0; i < 2; i++) {
            aim(layers[i], qkv, rope_table, slot, n_tokens);
            give_workspace(layers[i], n_threads);
        }
        multiply(r, pool);
        CHECK_OK(ksort_pool_step(pool, &pooled->pack_k, &pooled->pack_v, &pooled->attend));
        step_without_pool(plain, n_threads);
        CHECK(memcmp(pooled->out, plain->out, (size_t)n_tokens * OUT_ROW * sizeof(float)) == 0);
        free(pooled->attend.workspace);
        free(plain->attend.workspace);
        slot += n_tokens;
    }
    ksort_pool_destroy(pool);
    free_layer(pooled);
    free_layer(plain);
}

int main(int argc, char **argv) {
    long n_steps = argc > 1 ? atol(argv[1]) : 100;
    rng r = {7};
    for (uint32_t n_threads = 1; n_threads <= 4; n_threads++) run_steps(&r, n_threads, n_steps);
    printf("pool_race: %ld steps on pools of 1 to 4 threads\n", n_steps);
    return 0;
}
