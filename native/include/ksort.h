/* libksort: packed key/value caches and attention straight from packed blocks, on the CPU.
 *
 * The bytes of a tile are specified in ksort_gguf/FORMAT.md. Conventions of every call here:
 *   - The caller owns all memory. No call keeps a pointer after it returns.
 *   - Calls that take (ith, nth) do part ith of nth of the work, 0 <= ith < nth; every part must run, in any order and
 *     on any threads, before the result is complete. Parts write disjoint bytes. They neither allocate, lock nor start
 *     threads. Different parts of one call, and calls on disjoint memory, may run at the same time.
 *   - Structs begin with struct_size, set by the caller to sizeof(the struct). One from an older header may be shorter
 *     than this library's, if it reaches the end of its last mandatory field, which each struct names: the fields that
 *     it lacks count as zero. One from a newer header may be longer, up to 4096 bytes, if all that this library does not
 *     know is zero. Otherwise KSORT_ERR_STRUCT_SIZE.
 *   - A status other than KSORT_OK means that this part wrote nothing to the cache or the output; the one exception is
 *     said at ksort_attend.
 *   - The floating-point environment is C's default: round to nearest, subnormal numbers kept.
 *   - "slot" is a token's place in the cache, counted from 0; "channel" is a place within a head, in folded order.
 */
#ifndef KSORT_H
#define KSORT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define KSORT_ABI_VERSION 2
#define KSORT_TILE_TOKENS 64 /* tokens of one head stored together */
#define KSORT_ALIGNMENT 64   /* bytes; of cache memory, tile and head strides, and workspace */
#define KSORT_MAX_HEAD_DIM 256
#define KSORT_MAX_SINKS 1024

typedef enum ksort_status {
    KSORT_OK = 0,
    KSORT_ERR_ARGUMENT = 1,    /* null pointer, zero count, overflowing size, strides that make tiles overlap, slots
                                  past n_slots, a scale that is not finite, or ith >= nth */
    KSORT_ERR_STRUCT_SIZE = 2, /* struct_size ends before a mandatory field, or fields that this library does not know
                                  are not zero */
    KSORT_ERR_TYPE = 3,        /* unknown ksort_type, or one not allowed in that place */
    KSORT_ERR_HEAD_DIM = 4,    /* odd, zero, above KSORT_MAX_HEAD_DIM, or not the same for k and v */
    KSORT_ERR_BLOCK_SIZE = 5,  /* not 16, 32, 64 or 128, or larger than head_dim */
    KSORT_ERR_HEADS = 6,       /* n_heads is not a multiple of n_kv_heads, or k and v differ in n_kv_heads */
    KSORT_ERR_ALIGNMENT = 7,   /* cache, stride or workspace is not a multiple of KSORT_ALIGNMENT */
    KSORT_ERR_ROPE = 8,        /* a table entry is out of range, cos or sin is not finite, or partners do not pair up */
    KSORT_ERR_NON_FINITE = 9,  /* NaN or infinity in a key, value or query, or in the scores or sums they make */
    KSORT_ERR_RANGE = 10,      /* a finite key or value, after RoPE, is too large for the cache type (f16: beyond 65504,
                                  bf16: beyond 0x7F7F as bits, SBFP12: beyond 7 * 57344, SBFP11: beyond 3 * 57344, with
                                  a transform after it; others: beyond float32, or after a transform 2^120 or more; where the cache
                                  has exact rows also beyond 65504) */
    KSORT_ERR_WORKSPACE = 11,  /* workspace is smaller than ksort_attend_workspace_bytes asks for */
    KSORT_ERR_KERNELS = 12,    /* unknown kernel level, or one that this CPU does not support */
    KSORT_ERR_THREADS = 13,    /* the system refused memory or threads for the pool */
    KSORT_ERR_TRANSFORM = 14   /* a shift is not finite, a scale is not positive and finite, rotate is not 0 or 1, or a
                                  permutation repeats a channel */
} ksort_status;

typedef enum ksort_type {
    KSORT_F32 = 0,
    KSORT_F16 = 1,
    KSORT_BF16 = 2,
    KSORT_BFP16 = 3,  /* 8-bit mantissas */
    KSORT_BFP14 = 4,  /* 6-bit mantissas */
    KSORT_BFP12 = 5,  /* 4-bit mantissas */
    KSORT_SBFP12 = 6, /* 4-bit mantissas, signed scales (FORMAT.md section 1.2) */
    KSORT_SBFP11 = 7  /* 3-bit mantissas, signed scales */
} ksort_type;

/* How the heads of one cache are stored. Its size is always the same, as it stands within ksort_cache. */
typedef struct ksort_format {
    size_t struct_size;
    uint32_t type;       /* ksort_type */
    uint32_t head_dim;   /* channels a head: even, 2 to KSORT_MAX_HEAD_DIM */
    uint32_t block_size; /* channels that share an exponent: 16, 32, 64, 128, at most head_dim. Where it does not divide
                            head_dim the last block is shorter. Float types ignore it, but for BFP16 queries on float
                            keys: they are rounded in blocks of this size. */
} ksort_format;

/* Rotary position embedding in folded order. For channel c of a head x:
 *   sign[c] = 0:  y[c] = x[c]
 *   otherwise:    y[c] = x[c] * cos[t][frequency[c]] + sign[c] * x[partner[c]] * sin[t][frequency[c]]
 * partner is an involution without fixed points on the rotated channels; of each pair, one sign is -1 and the other
 * +1. cos and sin are finite. All fields are mandatory: the last is sin. */
typedef struct ksort_rope {
    size_t struct_size;
    uint32_t n_frequencies;    /* columns of cos and sin, at least 1 */
    const uint16_t *partner;   /* [n_kv_heads, head_dim], each < head_dim */
    const int8_t *sign;        /* [n_kv_heads, head_dim], each -1, 0 or +1 */
    const uint16_t *frequency; /* [n_kv_heads, head_dim], each < n_frequencies where sign is not 0 */
    const float *cos;          /* [n_tokens, n_frequencies]: one row for each token of the call, contiguous */
    const float *sin;          /* as cos */
} ksort_rope;

/* What a K plan does to every head of a layer between RoPE and storing, in this order; FORMAT.md section 3 has the
 * arithmetic, which is the same to the bit at every kernel level:
 *   shift:    y[c] = x[c] - shift[c]
 *   scale:    y[c] = y[c] * scale[c]
 *   rotate:   y = W y, W the orthonormal Walsh-Hadamard matrix (blocks of powers of two along the diagonal where
 *             head_dim is none)
 *   permutation: y[i] = y[permutation[i]]
 *   rounding: exponents by least squared error, the whole mantissa range; with feedback, each channel's rounding error
 *             times feedback[c][j] is taken from every later channel j before that one is rounded
 * BFP and SBFP cache types only. Attention undoes it: queries become W (q / scale), permuted, and the softmax does not see the
 * shift of keys; of values, out, permuted back, becomes (W out) / scale + shift. The last mandatory field is rotate. */
typedef struct ksort_transform {
    size_t struct_size;
    uint32_t rotate;             /* 0 or 1 */
    const float *shift;          /* [n_kv_heads, head_dim], or NULL */
    const float *scale;          /* [n_kv_heads, head_dim], or NULL */
    const float *feedback;       /* [n_kv_heads, head_dim, head_dim], or NULL. [h][c][j] is read for j > c only; entries
                                    are trusted: any that are not finite make mantissas arbitrary, and harm nothing
                                    else. */
    const uint16_t *permutation; /* [n_kv_heads, head_dim], each channel once in each head, or NULL */
} ksort_transform;

/* Exact rows beside a packed cache: the newest slots and the first ones as f16 heads, as they are before rounding (after
 * RoPE and transform, without feedback). The caller owns their memory, as a cache's. They lie in f16 tiles of FORMAT.md,
 * tile t of KV head h at base + t * tile_stride + h * head_stride: first the sinks, slots 0 .. n_sinks-1, in ceil(n_sinks /
 * 64) tiles, at least one; then a ring of n_tiles, slot s in its row s mod (64 n_tiles).
 * ksort_pack writes both beside the packed tiles; where one call brings more than the ring holds, the newest. A query at
 * slot p reads as exact the slots below n_sinks, and those from max(p + 1 - n_tail, begin) to p; all others that it sees
 * are read from the packed tiles. So what it reads does not depend on the calls that a text came in, if the ring holds
 * the tail of every query of a call: min(n_tail + n_queries - 1, first_slot + n_queries) rows (where n_tail is not 0), or
 * attending is _ARGUMENT.
 * begin is the first slot, sinks aside, whose row the ring holds, and the caller's to keep. Before n tokens are packed
 * from first_slot on:
 *     if (first_slot < begin) begin = first_slot;
 *     begin = max(begin, first_slot + n - 64 * n_tiles), if that is not negative
 * Slots that are forgotten and written anew need nothing else. All fields are mandatory: the last is begin. */
typedef struct ksort_exact {
    size_t struct_size;
    void *base;         /* KSORT_ALIGNMENT-aligned; packing writes, attending only reads */
    size_t tile_stride; /* bytes, a multiple of KSORT_ALIGNMENT */
    size_t head_stride; /* bytes, a multiple of KSORT_ALIGNMENT */
    uint32_t n_tiles;   /* of the ring, behind the sinks' */
    uint32_t n_tail;    /* slots that a query reads as exact, its own the last */
    uint32_t n_sinks;   /* at most KSORT_MAX_SINKS */
    size_t begin;
} ksort_exact;

/* One cache of one layer: tile t of KV head h starts at base + t * tile_stride + h * head_stride. The last mandatory
 * field is n_kv_heads. */
typedef struct ksort_cache {
    size_t struct_size;
    ksort_format format;
    void *base;         /* KSORT_ALIGNMENT-aligned; packing writes, attending and unpacking only read */
    size_t tile_stride; /* bytes, a multiple of KSORT_ALIGNMENT */
    size_t head_stride; /* bytes, a multiple of KSORT_ALIGNMENT */
    size_t n_slots;     /* capacity in tokens: slots 0 .. n_slots-1 are backed by memory (whole tiles) */
    uint32_t n_kv_heads;
    const ksort_exact *exact; /* NULL: none. BFP and SBFP types only */
} ksort_cache;

/* The ABI version of the loaded library: equals KSORT_ABI_VERSION of the header it was built with. Thread-safe. */
uint32_t ksort_abi_version(void);

/* A short English text for a status; for an unknown one "unknown status". Static storage. Thread-safe. */
const char *ksort_status_text(ksort_status status);

/* The kernel level in use, each faster than the one before: "scalar", "avx2", "avx512bw" (AVX-512 F, BW, VL and DQ),
 * "avx512" (and VNNI); or "scalar", "neon" (AArch64 with the dot product). Static storage.
 * On first use the best level that the CPU supports is chosen, or the one that the environment variable KSORT_KERNELS
 * names ("avx512" there means with VNNI where present); if that is unknown or unsupported, every call that needs kernels
 * returns KSORT_ERR_KERNELS and this returns "unsupported". Thread-safe. */
const char *ksort_kernels(void);

/* Chooses a level by name, or the automatic choice for NULL. For tests and benchmarks.
 * Not safe while another thread is inside the library.
 * Returns KSORT_OK or KSORT_ERR_KERNELS (the level in use stays as it was). */
ksort_status ksort_select_kernels(const char *level);

/* Bytes of one tile (KSORT_TILE_TOKENS tokens of one head) into *bytes. Thread-safe.
 * Returns KSORT_OK, _ARGUMENT, _STRUCT_SIZE, _TYPE, _HEAD_DIM, _BLOCK_SIZE. */
ksort_status ksort_tile_bytes(const ksort_format *format, size_t *bytes);

/* Pack: RoPE, transform, round and store n_tokens tokens of all KV heads into slots first_slot onwards. Without a
 * transform rounding is nearest. The last mandatory field is n_tokens. */
typedef struct ksort_pack_args {
    size_t struct_size;
    const ksort_cache *cache;
    const float *x;        /* [n_tokens, n_kv_heads, head_dim]; heads contiguous */
    size_t x_token_stride; /* floats between tokens, at least n_kv_heads * head_dim */
    size_t first_slot;
    uint32_t n_tokens;
    const ksort_rope *rope;           /* NULL: no RoPE (values) */
    const ksort_transform *transform; /* NULL: none */
} ksort_pack_args;

/* Every part checks all of x first, so with a bad value no part writes anything. Other slots keep their bytes.
 * Returns KSORT_OK, _ARGUMENT, _STRUCT_SIZE, _TYPE, _HEAD_DIM, _BLOCK_SIZE, _ALIGNMENT, _ROPE, _NON_FINITE, _RANGE,
 * _KERNELS, _TRANSFORM. A transform, or exact rows, with a float cache type is _TYPE. With exact rows a head beyond
 * f16's range is _RANGE, whichever of the call's tokens has it. */
ksort_status ksort_pack(const ksort_pack_args *args, uint32_t ith, uint32_t nth);

/* Unpack slots first_slot .. first_slot+n_tokens-1 to out [n_tokens, n_kv_heads, head_dim], contiguous float32,
 * exactly (blocks that no encoder makes, of a BFP exponent of 255 or an SBFP scale that is f16's infinity or NaN, are not
 * finite, and attend says _NON_FINITE).
 * For tests and tools: attention never needs it. Exact rows are not looked at.
 * Returns KSORT_OK, _ARGUMENT, _STRUCT_SIZE, _TYPE, _HEAD_DIM, _BLOCK_SIZE, _ALIGNMENT. */
ksort_status ksort_unpack(const ksort_cache *cache, size_t first_slot, uint32_t n_tokens, float *out);

/* Attend: softmax(scale * q k^T) v for n_queries tokens, the first of which is in slot first_slot.
 * Query i sees slots max(0, first_slot+i+1-window) .. first_slot+i (window 0: from slot 0): causal, so its own key and
 * value must be packed before. Query head g reads KV head g / (n_heads / n_kv_heads) and is rotated with its tables.
 * The last mandatory field is scale. */
typedef struct ksort_attend_args {
    size_t struct_size;
    const ksort_cache *k;
    const ksort_cache *v;    /* same head_dim and n_kv_heads as k; type and block size may differ. One may have exact
                                rows and the other none; where both have, n_tail, n_sinks and begin are equal */
    const float *q;          /* [n_queries, n_heads, head_dim]; heads contiguous, before RoPE */
    size_t q_token_stride;   /* floats between tokens, at least n_heads * head_dim */
    float *out;              /* [n_queries, n_heads, head_dim]; heads contiguous */
    size_t out_token_stride; /* floats between tokens, at least n_heads * head_dim */
    void *workspace;         /* KSORT_ALIGNMENT-aligned; contents are private between the parts of attend and merge */
    size_t workspace_bytes;
    size_t first_slot;
    uint32_t n_queries;
    uint32_t n_heads;
    uint32_t query_type;    /* KSORT_F32, or KSORT_BFP16: queries are rounded to BFP16 with k's block size and the dot
                               products are of integer mantissas (BFP keys only; with float keys it means the same
                               rounding, then float products) */
    float scale;            /* usually 1/sqrt(head_dim) */
    uint32_t window;        /* 0: none */
    const ksort_rope *rope; /* for the queries; cos and sin rows are the query tokens'. NULL: no RoPE */
    const ksort_transform *k_transform; /* those that k and v were packed with. NULL: none */
    const ksort_transform *v_transform;
} ksort_attend_args;

/* Workspace that ksort_attend and ksort_attend_merge need for these arguments (its pointers, workspace and
 * workspace_bytes aside) and nth parts, into *bytes. Grows with n_queries at most up to a fixed bound a part.
 * Returns KSORT_OK, _ARGUMENT, _STRUCT_SIZE, _TYPE, _HEAD_DIM, _BLOCK_SIZE, _HEADS, _ALIGNMENT (of strides),
 * _KERNELS. */
ksort_status ksort_attend_workspace_bytes(const ksort_attend_args *args, uint32_t nth, size_t *bytes);

/* All parts of ksort_attend, then all parts of ksort_attend_merge (with the same args and nth) give out. Long caches
 * are split over tokens as well as heads, so that one KV head still uses every part; merge joins the splits.
 * Every part checks all of q first. Finite inputs so large that RoPE of a query, a score or a sum of values overflows
 * float32 are found on the way: then the status (of attend or merge) is KSORT_ERR_NON_FINITE and the contents of out
 * are undefined.
 * Returns KSORT_OK, _ARGUMENT, _STRUCT_SIZE, _TYPE, _HEAD_DIM, _BLOCK_SIZE, _HEADS, _ALIGNMENT, _ROPE, _NON_FINITE,
 * _WORKSPACE, _KERNELS, _TRANSFORM. */
ksort_status ksort_attend(const ksort_attend_args *args, uint32_t ith, uint32_t nth);
ksort_status ksort_attend_merge(const ksort_attend_args *args, uint32_t ith, uint32_t nth);

#ifdef __cplusplus
}
#endif

#endif /* KSORT_H */
