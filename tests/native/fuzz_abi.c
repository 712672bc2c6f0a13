/* Argument checks under fuzzing: structs whose fields come from the input. Whatever they hold, no call may touch memory
 * outside the buffers, and a refused call may not change the cache or the output.
 *
 * The library cannot know how large the caller's buffers are, so calls whose accepted arguments would reach beyond ours
 * are the caller's fault and are not made: reach() works that out, in 128 bits, apart from the library's checks.
 * Entry: LLVMFuzzerTestOneInput (clang -fsanitize=fuzzer); fuzz_main.c feeds it random inputs under any compiler. */
#include <math.h>

#include "ksort_run.h"
#include "support.h"

typedef unsigned __int128 wide;

enum { CACHE_BYTES = 1 << 16, EXACT_BYTES = 1 << 17, N_FLOATS = 1 << 13, N_TABLE = 1 << 10, WORKSPACE_BYTES = 1 << 21 };
enum { N_FEEDBACK = 3 * 80 * 80 }; /* of the most heads and the largest head_dim that are not mutated */

/* Memory that the calls may touch, and copies of what a refused call must leave as it was. */
static _Alignas(64) unsigned char k_memory[CACHE_BYTES + 64], v_memory[CACHE_BYTES + 64], before[CACHE_BYTES + 64];
static _Alignas(64) unsigned char k_rows[EXACT_BYTES + 64], v_rows[EXACT_BYTES + 64], rows_before[EXACT_BYTES + 64];
static _Alignas(64) unsigned char workspace[WORKSPACE_BYTES + 64];
static float x[N_FLOATS], out[N_FLOATS], out_before[N_FLOATS];
static uint16_t partner[N_TABLE], frequency[N_TABLE];
static int8_t sign[N_TABLE];
static uint16_t permutation[N_TABLE];
static float shift[N_TABLE], scale[N_TABLE], feedback[N_FEEDBACK];

/* Structs as the calls see them: their sizes are mutated too, and a struct may be followed by bytes that the library does
 * not know. It reads none beyond ROOM_BYTES. */
enum { ROOM_BYTES = 4096 };
enum { ROOM_ARGS, ROOM_K, ROOM_V, ROOM_K_EXACT, ROOM_V_EXACT, ROOM_ROPE, ROOM_K_TRANSFORM, ROOM_V_TRANSFORM, N_ROOMS };
static _Alignas(64) unsigned char rooms[N_ROOMS][ROOM_BYTES];

/* The input, read from the front; zeros once it is used up. */
typedef struct input {
    const uint8_t *data;
    size_t size;
} input;

static uint8_t next_byte(input *in) {
    if (in->size == 0) return 0;
    in->size--;
    return *in->data++;
}

/* `valid` most of the time; otherwise a value at some limit. */
static uint64_t mutated(input *in, uint64_t valid) {
    static const uint64_t limits[] = {
        0,     1,          2,          3,          7,           16,       63,            64,          65, 127, 128, 255,
        65535, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x100000000, SIZE_MAX, SIZE_MAX - 63, SIZE_MAX / 2,
    };
    uint8_t choice = next_byte(in);
    if (choice < 224) return valid;
    if (choice < 240) return valid + (int8_t)next_byte(in);
    return limits[next_byte(in) % (sizeof limits / sizeof *limits)];
}

static void *mutated_pointer(input *in, void *valid) {
    uint8_t choice = next_byte(in);
    if (choice < 248) return valid;
    return choice < 252 ? NULL : (char *)valid + 4;
}

/* A copy of the struct with zeros behind it, or now and then ones; NULL for NULL. */
static void *in_room(input *in, int room, const void *bytes, size_t n_bytes) {
    memset(rooms[room], next_byte(in) > 224, ROOM_BYTES);
    return bytes ? memcpy(rooms[room], bytes, n_bytes) : NULL;
}

static ksort_format random_fuzz_format(input *in, uint32_t n_types) {
    uint32_t head_dim = 2u * (1u + next_byte(in) % 40u);
    ksort_format f = {mutated(in, sizeof f), (uint32_t)mutated(in, next_byte(in) % n_types),
                      (uint32_t)mutated(in, head_dim), (uint32_t)mutated(in, 16u << next_byte(in) % 3)};
    return f;
}

static ksort_cache random_cache(input *in, ksort_format format, void *memory, uint32_t n_kv_heads) {
    size_t tile_bytes = 64;
    if (ksort_tile_bytes(&format, &tile_bytes) != KSORT_OK) tile_bytes = 64;
    ksort_cache c = {mutated(in, sizeof c), format, mutated_pointer(in, memory), mutated(in, n_kv_heads * tile_bytes),
                     mutated(in, tile_bytes), mutated(in, 128), (uint32_t)mutated(in, n_kv_heads), NULL};
    return c;
}

/* In two of three caches; cuts are alike in k and v, but for mutations. */
static void add_exact(input *in, ksort_cache *c, void *memory, ksort_exact *exact, int room) {
    size_t tile_bytes = (size_t)KSORT_TILE_TOKENS * 2 * c->format.head_dim;
    *exact = (ksort_exact){mutated(in, sizeof *exact), mutated_pointer(in, memory), mutated(in, c->n_kv_heads * tile_bytes),
                           mutated(in, tile_bytes), (uint32_t)mutated(in, 3), (uint32_t)mutated(in, 50),
                           (uint32_t)mutated(in, 6), mutated(in, 20)};
    void *given = in_room(in, room, exact, sizeof *exact);
    c->exact = next_byte(in) % 3 ? given : NULL;
}

/* Whether tiles 0 .. n_tiles of accepted exact rows are in our buffers. */
static int exact_fits(const ksort_cache *c, const ksort_exact *exact) {
    wide heads = c->n_kv_heads ? c->n_kv_heads - 1u : 0, tile_bytes = (wide)KSORT_TILE_TOKENS * 2 * c->format.head_dim;
    return !c->exact || (wide)exact->n_tiles * exact->tile_stride + heads * exact->head_stride + tile_bytes <= EXACT_BYTES;
}

/* Bytes behind base that slots 0 .. last_slot of the cache may take; all of them if the format is not valid. */
static wide reach(const ksort_cache *c, wide last_slot) {
    size_t tile_bytes = 0;
    if (ksort_tile_bytes(&c->format, &tile_bytes) != KSORT_OK) return 0; /* the call must refuse it */
    wide tiles = last_slot / KSORT_TILE_TOKENS, heads = c->n_kv_heads ? c->n_kv_heads - 1u : 0;
    return tiles * c->tile_stride + heads * c->head_stride + tile_bytes;
}

static int rows_fit(uint32_t n_rows, size_t stride, wide row, size_t n_available) {
    return n_rows == 0 || (wide)(n_rows - 1) * stride + row <= n_available;
}

/* Whether an accepted call would stay inside our buffers. Slots past n_slots must be refused, so they do not count. */
static int cache_fits(const ksort_cache *c, size_t first_slot, uint32_t n_tokens) {
    wide end = (wide)first_slot + n_tokens;
    return end > c->n_slots || n_tokens == 0 || reach(c, end - 1) <= CACHE_BYTES;
}

static int rope_fits(const ksort_rope *rope, const ksort_cache *c, uint32_t n_tokens) {
    return !rope || ((wide)c->n_kv_heads * c->format.head_dim <= N_TABLE &&
                     (wide)n_tokens * rope->n_frequencies <= N_FLOATS - 1);
}

static ksort_rope random_rope(input *in, uint32_t n_kv_heads, uint32_t head_dim) {
    uint32_t n_rot = next_byte(in) & ~1u;
    if (n_rot > head_dim) n_rot = head_dim & ~1u;
    if ((wide)n_kv_heads * head_dim <= N_TABLE) fill_rope_tables(partner, sign, frequency, n_kv_heads, head_dim, n_rot);
    uint8_t place = next_byte(in);
    partner[place] = (uint16_t)mutated(in, partner[place]);
    sign[place] = (int8_t)mutated(in, (uint8_t)sign[place]);
    frequency[place] = (uint16_t)mutated(in, frequency[place]);
    ksort_rope rope = {mutated(in, sizeof rope), (uint32_t)mutated(in, n_rot / 2 + 1), partner, sign, frequency, x,
                       mutated_pointer(in, x)};
    return rope;
}

static int transform_fits(const ksort_transform *transform, const ksort_cache *c) {
    wide heads = (wide)c->n_kv_heads * c->format.head_dim;
    return !transform || (heads <= N_TABLE && (!transform->feedback || heads * c->format.head_dim <= N_FEEDBACK));
}

/* Tables with now and then a bad entry. */
static ksort_transform random_transform(input *in, rng *r, uint32_t head_dim) {
    for (int i = 0; i < N_TABLE; i++) scale[i] = 1.0f + 0.5f * (shift[i] = rng_float(r));
    rng_floats(r, feedback, N_FEEDBACK);
    uint8_t choice = next_byte(in), place = next_byte(in);
    if (choice > 250) shift[place] = INFINITY;
    if (choice < 5) scale[place] = choice < 3 ? 0.0f : NAN;
    if (choice == 128) feedback[place] = NAN;
    for (uint32_t i = 0; i < N_TABLE; i++) permutation[i] = (uint16_t)(head_dim ? (i + 3) % head_dim : 0);
    permutation[place] = (uint16_t)mutated(in, permutation[place]);
    ksort_transform transform = {mutated(in, sizeof transform), (uint32_t)mutated(in, next_byte(in) & 1),
                                 next_byte(in) & 1 ? shift : NULL, next_byte(in) & 1 ? scale : NULL,
                                 next_byte(in) & 1 ? feedback : NULL, next_byte(in) & 1 ? permutation : NULL};
    return transform;
}

static void fuzz_pack(input *in, const ksort_cache *c, const ksort_exact *exact, const ksort_rope *rope,
                      const ksort_transform *transform) {
    uint32_t row = c->n_kv_heads * c->format.head_dim;
    const ksort_cache *cache = in_room(in, ROOM_K, c, sizeof *c);
    ksort_pack_args args = {mutated(in, sizeof args), cache, mutated_pointer(in, x), mutated(in, row),
                            mutated(in, next_byte(in) % 120), (uint32_t)mutated(in, 1 + next_byte(in) % 8),
                            in_room(in, ROOM_ROPE, rope, sizeof *rope),
                            in_room(in, ROOM_K_TRANSFORM, transform, sizeof *transform)};
    if (!transform_fits(transform, c) || !exact_fits(c, exact) || !cache_fits(c, args.first_slot, args.n_tokens) ||
        !rope_fits(rope, c, args.n_tokens) ||
        !rows_fit(args.n_tokens, args.x_token_stride, (wide)c->n_kv_heads * c->format.head_dim, N_FLOATS - 1))
        return;
    memcpy(before, k_memory, sizeof before);
    uint32_t nth = 1 + next_byte(in) % 3, ith = (uint32_t)mutated(in, 0);
    memcpy(rows_before, k_rows, sizeof rows_before);
    if (ksort_pack(in_room(in, ROOM_ARGS, &args, sizeof args), ith, nth) != KSORT_OK) {
        CHECK(memcmp(before, k_memory, sizeof before) == 0);
        CHECK(memcmp(rows_before, k_rows, sizeof rows_before) == 0);
    }
    memcpy(before, k_memory, sizeof before);
    if ((wide)args.n_tokens * c->n_kv_heads * c->format.head_dim <= N_FLOATS)
        ksort_unpack(cache, args.first_slot, args.n_tokens, out);
    CHECK(memcmp(before, k_memory, sizeof before) == 0);
}

static void fuzz_attend(input *in, const ksort_cache *k, const ksort_cache *v, const ksort_rope *rope,
                        const ksort_transform *k_transform, const ksort_transform *v_transform) {
    uint32_t n_heads = k->n_kv_heads * (1u + next_byte(in) % 3u), row = n_heads * k->format.head_dim;
    ksort_attend_args args = {.struct_size = mutated(in, sizeof args),
                              .k = in_room(in, ROOM_K, k, sizeof *k), .v = in_room(in, ROOM_V, v, sizeof *v),
                              .rope = in_room(in, ROOM_ROPE, rope, sizeof *rope),
                              .k_transform = in_room(in, ROOM_K_TRANSFORM, k_transform, sizeof *k_transform),
                              .v_transform = in_room(in, ROOM_V_TRANSFORM, v_transform, sizeof *v_transform),
                              .q = mutated_pointer(in, x), .q_token_stride = mutated(in, row),
                              .out = mutated_pointer(in, out), .out_token_stride = mutated(in, row),
                              .first_slot = mutated(in, next_byte(in) % 120),
                              .n_queries = (uint32_t)mutated(in, 1 + next_byte(in) % 8),
                              .n_heads = (uint32_t)mutated(in, n_heads), .window = (uint32_t)mutated(in, 0),
                              .query_type = (uint32_t)mutated(in, next_byte(in) % 2 ? KSORT_BFP16 : KSORT_F32),
                              .scale = 0.25f};
    uint32_t nth = 1 + next_byte(in) % 3;
    const ksort_attend_args *given = in_room(in, ROOM_ARGS, &args, sizeof args);
    ksort_attend_workspace_bytes(given, nth, &args.workspace_bytes);
    args.workspace = mutated_pointer(in, workspace);
    args.workspace_bytes = mutated(in, args.workspace_bytes);
    given = in_room(in, ROOM_ARGS, &args, sizeof args);
    wide q_row = (wide)args.n_heads * k->format.head_dim;
    if (!transform_fits(k_transform, k) || !transform_fits(v_transform, v) || args.workspace_bytes > WORKSPACE_BYTES ||
        !cache_fits(k, args.first_slot, args.n_queries) ||
        !cache_fits(v, args.first_slot, args.n_queries) || !rope_fits(rope, k, args.n_queries) ||
        !rows_fit(args.n_queries, args.q_token_stride, q_row, N_FLOATS - 1) ||
        !rows_fit(args.n_queries, args.out_token_stride, q_row, N_FLOATS - 1))
        return;
    memcpy(out_before, out, sizeof out);
    ksort_status status = KSORT_OK;
    for (uint32_t ith = 0; ith < nth && status == KSORT_OK; ith++) status = ksort_attend(given, ith, nth);
    if (status != KSORT_OK && status != KSORT_ERR_NON_FINITE) CHECK(memcmp(out_before, out, sizeof out) == 0);
    for (uint32_t ith = 0; ith < nth && status == KSORT_OK; ith++) status = ksort_attend_merge(given, ith, nth);
}

/* What the calls around attention share: accepted arguments run, refused ones leave `out` as it was. */
static void check_refused(ksort_status status) {
    if (status != KSORT_OK) CHECK(memcmp(out_before, out, sizeof out) == 0);
}

static void fuzz_linear(input *in) {
    size_t n_out = 1u + next_byte(in) % 40u, n_in = 1u + next_byte(in) % 60u;
    ksort_linear_args args = {mutated(in, sizeof args), mutated_pointer(in, feedback), mutated_pointer(in, x),
                              mutated_pointer(in, out), mutated(in, n_in), mutated(in, n_out), mutated(in, n_out),
                              mutated(in, n_in), (uint32_t)mutated(in, 1u + next_byte(in) % 30u),
                              (uint32_t)mutated(in, next_byte(in) % 3u), next_byte(in) & 1 ? shift : NULL};
    if ((wide)args.n_out * args.n_in > N_FEEDBACK - 1 || args.n_out > N_TABLE ||
        !rows_fit(args.n_rows, args.x_row_stride, args.n_in, N_FLOATS - 1) ||
        !rows_fit(args.n_rows, args.y_row_stride, args.n_out, N_FLOATS - 1))
        return;
    memcpy(out_before, out, sizeof out);
    const ksort_linear_args *given = in_room(in, ROOM_ARGS, &args, sizeof args);
    check_refused(ksort_linear(given, (uint32_t)mutated(in, 0), 1u + next_byte(in) % 3u));
}

static void fuzz_rows(input *in) {
    uint32_t n = 1u + next_byte(in) % 200u, n_rows = (uint32_t)mutated(in, 1u + next_byte(in) % 9u);
    uint32_t nth = 1u + next_byte(in) % 3u, ith = (uint32_t)mutated(in, 0);
    ksort_rms_norm_args norm = {mutated(in, sizeof norm), mutated_pointer(in, out), mutated_pointer(in, feedback),
                                mutated_pointer(in, out), mutated(in, n), mutated(in, n), (uint32_t)mutated(in, n),
                                n_rows, 1e-5f, (uint32_t)mutated(in, next_byte(in) % 4u),
                                next_byte(in) & 1 ? mutated_pointer(in, x) : NULL, mutated(in, n), 0.5f};
    memcpy(out_before, out, sizeof out);
    wide row = (wide)norm.n * (norm.heads ? norm.heads : 1);
    if (norm.n < N_FEEDBACK && rows_fit(n_rows, norm.x_row_stride, row, N_FLOATS - 1) &&
        rows_fit(n_rows, norm.added_row_stride, row, N_FLOATS - 1) &&
        rows_fit(n_rows, norm.y_row_stride, row, N_FLOATS - 1))
        check_refused(ksort_rms_norm(in_room(in, ROOM_ARGS, &norm, sizeof norm), ith, nth));
    ksort_swiglu_args swiglu = {mutated(in, sizeof swiglu), mutated_pointer(in, x), mutated_pointer(in, x),
                                mutated_pointer(in, out), mutated(in, n), mutated(in, n), (uint32_t)mutated(in, n), n_rows};
    memcpy(out_before, out, sizeof out);
    if (rows_fit(n_rows, swiglu.row_stride, swiglu.n, N_FLOATS - 1) &&
        rows_fit(n_rows, swiglu.y_row_stride, swiglu.n, N_FLOATS - 1))
        check_refused(ksort_swiglu(in_room(in, ROOM_ARGS, &swiglu, sizeof swiglu), ith, nth));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    input in = {data, size};
    rng r = {size + 1};
    rng_floats(&r, x, N_FLOATS);
    if (next_byte(&in) > 250) x[next_byte(&in)] = next_byte(&in) & 1 ? NAN : INFINITY;
    for (size_t i = 0; i < CACHE_BYTES; i++) k_memory[i] = v_memory[i] = (unsigned char)(i * 7 + size);
    uint32_t n_kv_heads = 1u + next_byte(&in) % 3u;
    ksort_format k_format = random_fuzz_format(&in, 9), v_format = random_fuzz_format(&in, 9);
    v_format.head_dim = (uint32_t)mutated(&in, k_format.head_dim);
    ksort_cache k = random_cache(&in, k_format, k_memory, n_kv_heads);
    ksort_cache v = random_cache(&in, v_format, v_memory, n_kv_heads);
    ksort_rope rope = random_rope(&in, k.n_kv_heads, k.format.head_dim);
    const ksort_rope *rope_or_null = next_byte(&in) & 1 ? &rope : NULL;
    ksort_transform transform = random_transform(&in, &r, k.format.head_dim);
    uint8_t uses = next_byte(&in);
    ksort_exact k_exact, v_exact;
    add_exact(&in, &k, k_rows, &k_exact, ROOM_K_EXACT);
    add_exact(&in, &v, v_rows, &v_exact, ROOM_V_EXACT);
    fuzz_pack(&in, &k, &k_exact, rope_or_null, uses & 1 ? &transform : NULL);
    if (exact_fits(&k, &k_exact) && exact_fits(&v, &v_exact))
        fuzz_attend(&in, &k, &v, rope_or_null, uses & 2 ? &transform : NULL, uses & 4 ? &transform : NULL);
    fuzz_linear(&in);
    fuzz_rows(&in);
    return 0;
}
