/* libksort_cuda: packed key/value caches and attention straight from packed blocks, on NVIDIA GPUs (sm_80 and later).
 *
 * Tiles are ksort.h's, byte for byte (ksort_gguf/FORMAT.md): a tile copied between host and device memory is valid in
 * both. Statuses, types, formats, RoPE and transforms are ksort.h's too. Conventions of every call here:
 *   - "device" pointers are of the current CUDA device; the caller owns all memory, and keeps it until the stream has
 *     passed the call. Structs themselves, and pointers not marked device, are read before the call returns.
 *   - Calls enqueue kernels on `stream` (a cudaStream_t) and return: they neither allocate, synchronize nor copy, so that
 *     they can be captured in a CUDA graph. What may change between replays (lengths, page tables, values) is read from
 *     device memory when the kernels run.
 *   - The returned status is that of the arguments, or KSORT_ERR_CUDA for a launch that CUDA refused; then nothing was
 *     enqueued that writes to caches or outputs. What kernels find on the way is written to *device_status, an int32 in
 *     device memory that the caller clears: the largest ksort_status found, left as it is where there is none.
 *   - struct_size is what the caller's header makes of sizeof. A shorter struct is accepted down to the last mandatory
 *     field, which each struct names; fields that it lacks are taken as 0 or NULL. A longer one is accepted where all
 *     that this library does not know is 0. Others are KSORT_ERR_STRUCT_SIZE.
 *   - Calls from several threads are safe where they touch different memory.
 */
#ifndef KSORT_CUDA_H
#define KSORT_CUDA_H

#include "ksort.h"

#ifdef __cplusplus
extern "C" {
#endif

#define KSORT_CUDA_ABI_VERSION 2
#define KSORT_ERR_CUDA 100 /* as a ksort_status: no device that runs the library's kernels, or CUDA refused a launch */

/* Exact rows beside a packed cache: ksort.h's (FORMAT.md), f16 tiles [64 tokens][head_dim] for each context. Tile t of KV
 * head h of context s starts at base + s * context_stride + t * tile_stride + h * head_stride: tile 0 has the sinks,
 * slots 0 .. n_sinks-1; tiles 1 .. n_tiles are a ring, slot s in its row s mod (64 n_tiles). Rows are heads as they are
 * before rounding: after RoPE and transform, without feedback.
 *
 * A query at slot p reads as exact the slots below n_sinks, and those from max(p + 1 - n_tail, begin) to p; all others
 * that it sees are read from the packed tiles. begin[s] is the first slot, sinks aside, whose row the ring holds. The
 * caller keeps it: before n tokens of context s are packed from first_slot on,
 *     begin = max(min(begin, first_slot), first_slot + n - 64 * n_tiles)
 */
typedef struct ksort_cuda_exact {
    size_t struct_size;
    void *base;            /* device, KSORT_ALIGNMENT-aligned; packing writes, attending only reads */
    size_t context_stride; /* bytes, a multiple of KSORT_ALIGNMENT; so are the two below */
    size_t tile_stride;
    size_t head_stride;
    uint32_t n_tiles;     /* of the ring, behind tile 0 */
    uint32_t n_tail;      /* slots that a query reads as exact, its own the last */
    uint32_t n_sinks;     /* at most KSORT_TILE_TOKENS */
    const int32_t *begin; /* device [n_contexts], each at least 0; read when kernels run. The last mandatory field */
} ksort_cuda_exact;

/* One cache (keys or values) of one layer for several contexts, in pages of whole tiles. Tile t of KV head h of
 * context s starts at
 *
 *     base + page * page_stride + (t % page_tiles) * tile_stride + h * head_stride
 *     page = page_table ? page_table[s * context_pages + t / page_tiles] : s * context_pages + t / page_tiles
 *
 * So without a table and with context_pages 1 every context is contiguous. Keys are BFP12, BFP14, BFP16, SBFP12 or SBFP11;
 * values f16, bf16, BFP16, BFP12, SBFP12 or SBFP11; head_dim 64, 80, 96, 128 or 256. */
typedef struct ksort_cuda_cache {
    size_t struct_size;
    ksort_format format;
    void *base;         /* device, KSORT_ALIGNMENT-aligned */
    size_t page_stride; /* bytes, a multiple of KSORT_ALIGNMENT; so are the two below */
    size_t tile_stride;
    size_t head_stride;
    const int32_t *page_table;     /* device [n_contexts, context_pages], or NULL. Entries of pages that a call does not
                                  reach are not read */
    uint32_t context_pages;        /* pages that a context may have, at least 1 */
    uint32_t page_tiles;           /* tiles a page, at least 1 */
    uint32_t n_contexts;           /* at most 65535 */
    uint32_t n_kv_heads;           /* at most 65535. The last mandatory field */
    const ksort_cuda_exact *exact; /* NULL: none. BFP and SBFP types only */
} ksort_cuda_cache;

/* The tokens of a call: rows of n_tokens new tokens for each context, of which the first n_new[s] count. They stand in
 * slots n_cached[s] onwards, which is their position for RoPE too. Slots beyond the cache's pages are KSORT_ERR_ARGUMENT
 * in *device_status: those tokens are skipped. */
typedef struct ksort_cuda_tokens {
    size_t struct_size;
    const int32_t *n_cached; /* device [n_contexts], each at least 0 */
    const int32_t *n_new;    /* device [n_contexts], each 0 to n_tokens; NULL: n_tokens each */
    uint32_t n_contexts;     /* as in the caches */
    uint32_t n_tokens;       /* at least 1 */
    uint32_t n_positions;   /* rows of cos and sin: tokens at positions from there on are KSORT_ERR_ROPE, and skipped */
    int32_t *device_status; /* device. The last mandatory field */
} ksort_cuda_tokens;

/* The ABI version of the loaded library. Thread-safe. */
uint32_t ksort_cuda_abi_version(void);

/* Whether the current device runs this library's kernels: KSORT_OK, or KSORT_ERR_CUDA. Thread-safe. */
ksort_status ksort_cuda_device_status(void);

/* Pack: RoPE, transform, round and store, in one launch or a few. The stored bytes are those of ksort_pack.
 * rope and the transforms are ksort.h's with device pointers; rope->cos and ->sin are [n_positions, n_frequencies], a row
 * for each position. Tables are trusted: what ksort_pack checks about them is not looked at. */
typedef struct ksort_cuda_pack_args {
    size_t struct_size;
    const ksort_cuda_tokens *tokens;
    const ksort_cuda_cache *k; /* NULL: no keys */
    const ksort_cuda_cache *v; /* NULL: no values */
    const void *k_x;           /* device [n_contexts, n_tokens, n_kv_heads, head_dim]; heads contiguous, aligned to 16
                                  bytes */
    const void *v_x;           /* likewise */
    size_t token_stride;       /* of k_x and v_x, in elements: a multiple of 8 */
    size_t context_stride;     /* likewise */
    uint32_t x_type;           /* of k_x and v_x: KSORT_F32, KSORT_F16 or KSORT_BF16. The last mandatory field */
    const ksort_rope *rope;    /* of keys; NULL: no RoPE */
    const ksort_transform *k_transform; /* NULL: none, as for float types */
    const ksort_transform *v_transform;
} ksort_cuda_pack_args;

/* A head with NaN or infinity is not written, and KSORT_ERR_NON_FINITE or KSORT_ERR_RANGE reported in *device_status. So
 * is an exact row with a value beyond 65504 (KSORT_ERR_RANGE). Of more tokens than a ring has rows it gets the newest.
 * Returns KSORT_OK, _ARGUMENT, _STRUCT_SIZE, _TYPE, _HEAD_DIM, _BLOCK_SIZE, _HEADS, _ALIGNMENT, _TRANSFORM (rotate is not
 * 0 or 1), KSORT_ERR_CUDA. */
ksort_status ksort_cuda_pack(const ksort_cuda_pack_args *args, void *stream);

/* Attend: softmax(scale * q k^T) v for the new tokens of every context, whose keys and values are packed before. Query i
 * of context s sees slots max(0, n_cached[s] + i + 1 - window) .. n_cached[s] + i (window 0: from slot 0). Queries are
 * rounded to BFP16 with k's block size, as ksort_attend does with query_type KSORT_BFP16. Arithmetic is within
 * ksort_attend's bound (native/README.md), to which outputs of 16 bits add what storing rounds. Where n_tokens is above
 * 1 weights have 22 bits, but 11 in rows of such outputs that see more than 512 slots: in the worst case these add
 * 2^-11 of the largest |value| seen, but errors of so many weights cancel, and all random problems were within the
 * bound.
 *
 * Exact rows are multiplied by queries that are not rounded (22 bits of them), within the same bound. Keys and values
 * have them together, with the same n_tail and n_sinks (begin is that of the keys), but values in f16, which are read as
 * they are, have none: else _ARGUMENT, or _TYPE for values in bf16. The ring must hold the tail of every query, n_tail +
 * n_tokens - 1 rows, or max_slots where that is less: else _ARGUMENT. */
typedef struct ksort_cuda_attend_args {
    size_t struct_size;
    const ksort_cuda_tokens *tokens;
    const ksort_cuda_cache *k;
    const ksort_cuda_cache *v; /* same head_dim, n_kv_heads and n_contexts as k */
    const void *q;             /* device [n_contexts, n_tokens, n_heads, head_dim]; heads contiguous, aligned to 16
                                  bytes */
    void *out;                 /* device, likewise. Rows of tokens that do not count are not written */
    size_t q_token_stride;     /* elements, a multiple of 8; so are the three below */
    size_t q_context_stride;
    size_t out_token_stride;
    size_t out_context_stride;
    uint32_t x_type;        /* of q and out: KSORT_F32, KSORT_F16 or KSORT_BF16 */
    uint32_t n_heads;       /* a multiple of n_kv_heads */
    uint32_t window;        /* 0: none */
    uint32_t max_slots;     /* the most slots that any context will have, its new tokens included: decides how the
                                  work is cut, so a captured call stays good up to there. At most what the caches'
                                  pages hold. Contexts with more are KSORT_ERR_ARGUMENT in *device_status */
    float scale;            /* usually 1/sqrt(head_dim) */
    void *workspace;        /* device, 256-byte-aligned; contents are private to the call */
    size_t workspace_bytes; /* The last mandatory field */
    const ksort_rope *rope; /* of queries, as for packing; NULL: no RoPE */
    const ksort_transform *k_transform; /* those that k and v were packed with */
    const ksort_transform *v_transform;
} ksort_cuda_attend_args;

/* Workspace that ksort_cuda_attend needs for these arguments (workspace and pointers to data aside), into *bytes.
 * Returns as ksort_cuda_attend. */
ksort_status ksort_cuda_attend_workspace_bytes(const ksort_cuda_attend_args *args, size_t *bytes);

/* Queries that are not finite are reported in *device_status (KSORT_ERR_NON_FINITE), and their outputs are undefined.
 * Returns KSORT_OK, _ARGUMENT, _STRUCT_SIZE, _TYPE, _HEAD_DIM, _BLOCK_SIZE, _HEADS, _ALIGNMENT, _WORKSPACE, _TRANSFORM,
 * KSORT_ERR_CUDA. */
ksort_status ksort_cuda_attend(const ksort_cuda_attend_args *args, void *stream);

#ifdef __cplusplus
}
#endif

#endif /* KSORT_CUDA_H */
