/* Structs of programs that were built with an older or a newer header: shorter ones lack their last fields, which count as
 * zero; longer ones are taken if what the library does not know is zero. Catches fields read beyond a short struct,
 * fields that are ignored without a word, and sizes that make the library read anything. */
#include "ksort_run.h"
#include "support.h"

enum { HEAD_DIM = 32, N_KV_HEADS = 2, N_SLOTS = 64, ROW = N_KV_HEADS * HEAD_DIM, ROOM = 4096 };

#define END_OF(type, field) (offsetof(type, field) + sizeof ((type *)0)->field)

/* What is given to a call: the struct, and bytes behind it that are no part of it. */
static _Alignas(64) unsigned char room[ROOM];

/* The first n_bytes of a struct, which says that it has so many; all else is `rest`. */
static const void *cut(const void *whole, size_t n_bytes, size_t sizeof_whole, int rest) {
    memset(room, rest, ROOM);
    memcpy(room, whole, n_bytes < sizeof_whole ? n_bytes : sizeof_whole);
    memcpy(room, &n_bytes, sizeof n_bytes);
    return room;
}

/* A call that is given the struct at `room`. */
typedef ksort_status call(const void *given);

/* Every size of a struct. Whole sizes that reach mandatory_end are taken with zeros behind the struct's own fields; where the
 * bytes beyond the library's struct are not zero they are refused. */
static void check_sizes(call *of, const void *whole, size_t sizeof_whole, size_t mandatory_end) {
    for (size_t n_bytes = 0; n_bytes <= ROOM; n_bytes++) {
        int is_sizeof = n_bytes >= mandatory_end && n_bytes % sizeof(size_t) == 0;
        ksort_status expected = is_sizeof ? KSORT_OK : KSORT_ERR_STRUCT_SIZE;
        CHECK(of(cut(whole, n_bytes, sizeof_whole, 0)) == expected);
        if (n_bytes > sizeof_whole) expected = KSORT_ERR_STRUCT_SIZE; /* 0xFF behind a shorter one is not its own */
        CHECK(of(cut(whole, n_bytes, sizeof_whole, 0xFF)) == expected);
    }
    static const size_t absurd[] = {ROOM + 8, 1 << 16, SIZE_MAX / 16 * 8, SIZE_MAX - 7};
    for (size_t i = 0; i < sizeof absurd / sizeof *absurd; i++)
        CHECK(of(cut(whole, absurd[i], sizeof_whole, 0)) == KSORT_ERR_STRUCT_SIZE);
}

static _Alignas(64) unsigned char k_tiles[N_KV_HEADS * 64 * HEAD_DIM], v_tiles[N_KV_HEADS * 64 * HEAD_DIM];
static _Alignas(64) unsigned char workspace[1 << 20];
static float x[ROW], out[ROW], cosines[HEAD_DIM / 2], sines[HEAD_DIM / 2];
static uint16_t partner[ROW], frequency[ROW], permutation[ROW];
static int8_t sign[ROW];
static _Alignas(64) unsigned char exact_rows[2 * N_KV_HEADS * 64 * HEAD_DIM * 2]; /* the sinks' tile and a ring of one */
static ksort_exact exact;
static ksort_cache k, v;
static ksort_rope rope = {sizeof rope, HEAD_DIM / 2, partner, sign, frequency, cosines, sines};
static ksort_transform transform = {.struct_size = sizeof transform, .rotate = 1, .permutation = permutation};
static ksort_pack_args pack_args;
static ksort_attend_args attend_args;

static ksort_cache new_cache(void *base) {
    ksort_cache cache = {sizeof cache, {sizeof cache.format, KSORT_BFP12, HEAD_DIM, 16}, base, 0, 0, N_SLOTS, N_KV_HEADS, NULL};
    CHECK_OK(ksort_tile_bytes(&cache.format, &cache.head_stride));
    cache.tile_stride = N_KV_HEADS * cache.head_stride;
    CHECK(cache.tile_stride <= sizeof k_tiles);
    return cache;
}

static ksort_status pack_with(const void *given) { return ksort_pack(given, 0, 1); }

static ksort_status attend_with(const void *given) {
    ksort_status status = ksort_attend(given, 0, 1);
    return status == KSORT_OK ? ksort_attend_merge(given, 0, 1) : status;
}

static ksort_status pack_cache(const void *given) {
    ksort_pack_args args = pack_args;
    args.cache = given;
    return ksort_pack(&args, 0, 1);
}

static ksort_status pack_exact(const void *given) {
    ksort_cache cache = k;
    cache.exact = given;
    return pack_cache(&cache);
}

static ksort_status pack_rope(const void *given) {
    ksort_pack_args args = pack_args;
    args.rope = given;
    return ksort_pack(&args, 0, 1);
}

static ksort_status pack_transform(const void *given) {
    ksort_pack_args args = pack_args;
    args.transform = given;
    return ksort_pack(&args, 0, 1);
}

static ksort_status unpack_cache(const void *given) {
    static float rows[ROW];
    return ksort_unpack(given, 0, 1, rows);
}

static ksort_status multiply_with(const void *given) { return ksort_linear(given, 0, 1); }
static ksort_status normalize_with(const void *given) { return ksort_rms_norm(given, 0, 1); }
static ksort_status gate_with(const void *given) { return ksort_swiglu(given, 0, 1); }

/* An older pack call without RoPE and transform stores what one with NULL for them does, whatever lies behind it. */
static void check_missing_fields(void) {
    unsigned char expected[sizeof k_tiles];
    ksort_pack_args plain = pack_args;
    plain.rope = NULL, plain.transform = NULL;
    CHECK_OK(ksort_pack(&plain, 0, 1));
    memcpy(expected, k_tiles, sizeof expected);
    CHECK_OK(ksort_pack(&pack_args, 0, 1));
    CHECK(memcmp(expected, k_tiles, sizeof expected) != 0);
    CHECK_OK(pack_with(cut(&pack_args, offsetof(ksort_pack_args, rope), sizeof pack_args, 0xFF)));
    CHECK(memcmp(expected, k_tiles, sizeof expected) == 0);
}

/* The embedded format has one size. */
static void check_format(void) {
    size_t bytes;
    for (size_t n_bytes = 0; n_bytes < 100; n_bytes++) {
        ksort_format format = k.format;
        format.struct_size = n_bytes;
        CHECK(ksort_tile_bytes(&format, &bytes) == (n_bytes == sizeof format ? KSORT_OK : KSORT_ERR_STRUCT_SIZE));
    }
}

int main(void) {
    rng r = {5};
    rng_floats(&r, x, ROW);
    rng_floats(&r, cosines, HEAD_DIM / 2);
    rng_floats(&r, sines, HEAD_DIM / 2);
    fill_rope_tables(partner, sign, frequency, N_KV_HEADS, HEAD_DIM, HEAD_DIM);
    for (int i = 0; i < ROW; i++) permutation[i] = (uint16_t)((i + 5) % HEAD_DIM);
    k = new_cache(k_tiles), v = new_cache(v_tiles);
    exact = (ksort_exact){sizeof exact, exact_rows, sizeof exact_rows / 2, sizeof exact_rows / 2 / N_KV_HEADS, 1, 9, 4, 0};
    k.exact = &exact;
    ksort_pack_args pack_v = {sizeof pack_v, &v, x, ROW, 0, 1, NULL, NULL};
    CHECK_OK(ksort_pack(&pack_v, 0, 1));
    pack_args = (ksort_pack_args){sizeof pack_args, &k, x, ROW, 0, 1, &rope, &transform};
    check_sizes(pack_with, &pack_args, sizeof pack_args, END_OF(ksort_pack_args, n_tokens));
    check_missing_fields();
    check_sizes(pack_cache, &k, sizeof k, END_OF(ksort_cache, n_kv_heads));
    check_sizes(pack_exact, &exact, sizeof exact, END_OF(ksort_exact, begin));
    check_sizes(unpack_cache, &k, sizeof k, END_OF(ksort_cache, n_kv_heads));
    check_sizes(pack_rope, &rope, sizeof rope, END_OF(ksort_rope, sin));
    check_sizes(pack_transform, &transform, sizeof transform, END_OF(ksort_transform, rotate));
    CHECK_OK(ksort_pack(&pack_args, 0, 1));
    attend_args = (ksort_attend_args){.struct_size = sizeof attend_args, .k = &k, .v = &v, .q = x, .q_token_stride = ROW,
                                      .out = out, .out_token_stride = ROW, .workspace = workspace,
                                      .workspace_bytes = sizeof workspace, .n_queries = 1, .n_heads = N_KV_HEADS,
                                      .query_type = KSORT_BFP16, .scale = 0.2f, .rope = &rope,
                                      .k_transform = &transform};
    check_sizes(attend_with, &attend_args, sizeof attend_args, END_OF(ksort_attend_args, scale));
    ksort_linear_args linear = {sizeof linear, x, x, out, ROW, 1, 1, ROW, 1, KSORT_F32, x};
    check_sizes(multiply_with, &linear, sizeof linear, END_OF(ksort_linear_args, type));
    ksort_rms_norm_args norm = {sizeof norm, x, x, out, ROW, ROW, HEAD_DIM, 1, 1e-5f, N_KV_HEADS, NULL, 0, 0};
    check_sizes(normalize_with, &norm, sizeof norm, END_OF(ksort_rms_norm_args, epsilon));
    ksort_swiglu_args swiglu = {sizeof swiglu, x, x, out, ROW, ROW, ROW, 1};
    check_sizes(gate_with, &swiglu, sizeof swiglu, END_OF(ksort_swiglu_args, n_rows));
    check_format();
    printf("struct_sizes: every size from 0 to %d\n", ROOM);
    return 0;
}
