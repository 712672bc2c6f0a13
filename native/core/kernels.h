/* The kernel table: everything that a level (scalar, AVX2, ...) may do in its own way, and the types it works on.
 *
 * A "unit" of attention is up to MAX_ROWS query rows that read the same KV head; a row is one query head of one token.
 */
#ifndef KSORT_KERNELS_H
#define KSORT_KERNELS_H

#include "layout.h"
#include "softmax.h"

#define MAX_ROWS 32 /* query rows that share each load of a K strip and a V tile */

/* RoPE tables of one head and one token. */
struct rope_row {
    const uint16_t *partner;   /* [head_dim] */
    const int8_t *sign;        /* [head_dim] */
    const uint16_t *frequency; /* [head_dim] */
    const float *cos;          /* [n_frequencies] */
    const float *sin;          /* [n_frequencies] */
    uint32_t n_frequencies;
};

/* The tables of KV head `head` and the call's token `token`. */
static inline struct rope_row rope_row_of(const ksort_rope *rope, uint32_t head_dim, uint32_t head, size_t token)
{
    size_t at = (size_t)head * head_dim, row = token * rope->n_frequencies;
    return (struct rope_row){rope->partner + at, rope->sign + at, rope->frequency + at,
                             rope->cos + row,    rope->sin + row, rope->n_frequencies};
}

/* The transform of one head; see ksort_transform. */
struct head_transform {
    const float *shift;    /* [head_dim], or NULL */
    const float *scale;    /* [head_dim], or NULL */
    const float *feedback; /* [head_dim][head_dim], or NULL */
    bool rotate;
    const uint16_t *permutation; /* [head_dim], or NULL */
};

#define GROUP_TOKENS 48 /* tokens of one head that are encoded by one call: three registers of any level's floats */

/* A head of some tokens as it is stored: a token is a column, as it is in a tile. */
struct encoded_tokens {
    _Alignas(64) uint32_t quads[MAX_QUADS][GROUP_TOKENS]; /* of all channels; not the padding quads behind */
    uint8_t exponents[MAX_BLOCKS][GROUP_TOKENS];
};

/* The query rows of a unit, ready to be multiplied with keys. */
struct query_rows {
    uint32_t n_rows;
    /* BFP16 rows for BFP keys. Score = sum over blocks b of
     *     (sum over the block of query mantissa * key mantissa) * factors[b] * the key's scale of block b,
     * which is 2^(key exponent - 127) or SBFP's own; so factors hold the query's step, the softmax scale and the key's
     * mantissa_unit. */
    _Alignas(64) int32_t quads[MAX_ROWS][MAX_QUADS]; /* [n_rows][n_quads]: four mantissas each, padding 0 */
    float factors[MAX_ROWS][MAX_BLOCKS];             /* [n_rows][n_blocks] */
    /* Kernels that multiply unsigned bytes use key mantissa + 2^(mantissa_bits-1) and start a block's sum here, at
     * -2^(mantissa_bits-1) * (sum of the block's query mantissas). */
    int32_t offsets[MAX_ROWS][MAX_BLOCKS]; /* [n_rows][n_blocks] */
    /* Float rows, for f32 queries or float keys. They hold the softmax scale; for BFP keys their mantissa_unit too,
     * and zeros up to the last quad. */
    _Alignas(64) float values[MAX_ROWS][KSORT_MAX_HEAD_DIM]; /* [n_rows][head_dim] */
};

/* Tokens begin .. end-1 of one tile. */
struct tile_span {
    const struct head_layout *layout;
    const uint8_t *tile;
    const uint8_t *next; /* the tile that comes after it, to be asked for ahead of its use; or the tile itself */
    uint32_t begin;
    uint32_t end; /* at most KSORT_TILE_TOKENS */
};

/* Asks for the share of the next tile that n of the tile's tokens have of this one. Kernels ask as they go along: a core
 * waits once some 20 lines are on their way. */
static inline void prefetch_share(const struct tile_span *span, uint32_t first_token, uint32_t n)
{
    const size_t a_token = span->layout->tile_bytes / KSORT_TILE_TOKENS;
    for (size_t i = first_token * a_token; i < (first_token + n) * a_token; i += CACHE_LINE)
        PREFETCH_NEXT(span->next + i);
}

/* Largest |x[i]| as float bits; FLOAT_MAGNITUDE_INF or more if any is infinite or NaN. */
typedef uint32_t max_magnitude_function(const float *x, size_t n);

/* y = RoPE(x), both [head_dim], not overlapping. The arithmetic is x * cos + (sign * partner) * sin, each operation
 * rounded on its own, so that every level gives the same bits. */
typedef void rope_function(const struct rope_row *rope, const float *x, uint32_t head_dim, float *y);

/* The nearest encoders of FORMAT.md, of BFP or of SBFP, over finite x [head_dim], which is in the type's range:
 * mantissas [head_dim], exponents (SBFP: scale bytes) [blocks]. */
typedef void round_function(const float *x, uint32_t head_dim, uint32_t block_size, uint32_t mantissa_bits,
                            int8_t *mantissas, uint8_t *exponents);

/* One head in place, at any alignment, with the operations of FORMAT.md section 3, each rounded on its own: every level
 * gives the same bits where they are finite. Of a key or value y [head_dim]: shift, scale, rotate and permutation, all
 * that comes before rounding. Of a query, which multiplies transformed keys: W (y / scale), permuted. */
typedef void transform_function(const struct head_transform *transform, uint32_t head_dim, float *y);

/* Likewise: an average of transformed values, out [head_dim], becomes that of the values: permuted back, then
 * (W out) / scale + shift. places [head_dim] is the inverse of the permutation, NULL where there is none. */
typedef void restore_function(const struct head_transform *transform, const uint16_t *places, uint32_t head_dim,
                              float *out);

/* Shift, scale, rotate, permutation and FORMAT.md's encoder of transformed heads, over heads [n_tokens][head_dim],
 * `stride` floats apart and at any alignment, n_tokens 1 to GROUP_TOKENS. Columns from n_tokens on may be overwritten. */
typedef void encode_function(const struct head_transform *transform, const struct head_layout *layout,
                             uint32_t n_tokens, const float *heads, size_t stride, struct encoded_tokens *encoded);

/* Stores x [n] as f16 or bf16, round to nearest even. x is finite and in the type's range. */
typedef void store_function(const float *x, uint32_t n, uint16_t *out);

/* scores[row][token] for at least the span's tokens (whole strips may be written). */
typedef void score_function(const struct tile_span *keys, const struct query_rows *queries,
                            float (*scores)[KSORT_TILE_TOKENS]);

/* One step of online softmax for n_rows rows that see the same tokens of a tile, begin .. end-1 (none if begin >= end).
 * Other scores are not looked at; all are replaced by weights, exp(score - the row's new maximum) inside and 0 outside.
 * rescale[row]: the factor for what was accumulated before. */
typedef void softmax_function(float (*scores)[KSORT_TILE_TOKENS], uint32_t n_rows, uint32_t begin, uint32_t end,
                              struct softmax_state *states, float *rescale);

/* accumulators[row] = rescale[row] * accumulators[row] + sum over the span's tokens of weights[row][token] * value.
 * Tokens outside the span may hold anything, such as infinity.
 * accumulators [n_rows][stride], stride = head_dim rounded up to 16; floats from head_dim on may change to anything. */
typedef void accumulate_function(const struct tile_span *values, uint32_t n_rows,
                                 const float (*weights)[KSORT_TILE_TOKENS], const float *rescale, float *accumulators,
                                 size_t stride);

struct kernels {
    const char *level;

    max_magnitude_function *max_magnitude;
    rope_function *rope;
    round_function *round_bfp; /* queries too */
    round_function *round_sbfp;
    transform_function *transform_key; /* values too */
    transform_function *transform_query;
    restore_function *restore_value;
    encode_function *encode_transformed;
    store_function *store_f16;
    store_function *store_bf16;

    score_function *scores_bfp_by_bfp; /* BFP keys, queries->quads */
    score_function *scores_bfp_by_f32; /* BFP keys, queries->values */
    score_function *scores_float;      /* f32, f16 or bf16 keys, queries->values */

    softmax_function *softmax_tile;

    accumulate_function *accumulate_float; /* f32, f16 or bf16 values */
    accumulate_function *accumulate_bfp;
};

/* The table in use, or NULL if KSORT_KERNELS asks for what this CPU does not have. */
const struct kernels *ksort_kernel_table(void);

#endif /* KSORT_KERNELS_H */
