/* Where everything is in a tile: the one place that knows offsets. Bytes are specified in ksort_gguf/FORMAT.md.
 *
 * A "quad" is four neighbouring channels of one token, one byte each: the unit in which kernels see mantissas. Stored
 * words turn into quads by shifts and masks within bytes:
 *   BFP16: word  -> quad              BFP12: word -> quads 0, 1 (low and high four bits of each byte)
 *   BFP14: words 0, 1, 2 -> quads 0..3: low four bits as BFP12, high two bits from word 2
 *   SBFP12: as BFP12         SBFP11: words 0, 1, 2 -> quads 0..7: low two bits from words 0 and 1, high bit from word 2
 * "BFP" stands for all types with blocks here, "exponents" for their scale bytes, unless SBFP is told apart.
 */
#ifndef KSORT_LAYOUT_H
#define KSORT_LAYOUT_H

#include "common.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "words and float rows are stored as they are in registers: the format is little-endian"
#endif

#define STRIP_TOKENS 16
#define STRIPS_PER_TILE (KSORT_TILE_TOKENS / STRIP_TOKENS)
#define MAX_QUADS (KSORT_MAX_HEAD_DIM / 4)
#define MAX_BLOCKS (KSORT_MAX_HEAD_DIM / 16)

/* How a head is stored; derived from a ksort_format. */
struct head_layout {
    uint32_t type; /* ksort_type */
    uint32_t head_dim;
    uint32_t block_size;    /* BFP */
    uint32_t mantissa_bits; /* BFP: 3, 4, 6 or 8; 0 for float types */
    bool is_scaled;         /* SBFP: scale bytes are e5m2, mantissas whole numbers */
    uint32_t n_blocks;      /* BFP */
    uint32_t n_words;       /* BFP: stored words a token, padding included */
    uint32_t n_quads;       /* BFP: quads a token, padding included */
    uint32_t value_bytes;   /* float types */
    size_t tile_bytes;
};

/* Returns KSORT_OK, _ARGUMENT, _STRUCT_SIZE, _TYPE, _HEAD_DIM, _BLOCK_SIZE. */
ksort_status ksort_layout_of(const ksort_format *format, struct head_layout *layout);

/* The layout of exact rows of heads of head_dim channels: f16 tiles. */
struct head_layout ksort_exact_layout(uint32_t head_dim);

/* KSORT_OK if blocks of block_size channels are allowed in a head, else KSORT_ERR_BLOCK_SIZE. */
ksort_status ksort_check_block_size(uint32_t block_size, uint32_t head_dim);

/* Mantissas of one token, two's complement bytes; channels from head_dim to 4 * n_quads are padding. */
union token_mantissas {
    uint32_t quads[MAX_QUADS];
    int8_t channels[KSORT_MAX_HEAD_DIM];
};

/* Stores the mantissas of the token at `token` (0..63) of a tile. Padding must be 0. */
void ksort_store_mantissas(const struct head_layout *layout, const union token_mantissas *mantissas, uint8_t *tile,
                           uint32_t token);

/* The same of n_tokens neighbouring tokens that lie in one strip, `token` being the first of them; each is a column of
 * quads [n_quads][stride]. */
void ksort_store_columns(const struct head_layout *layout, const uint32_t *quads, size_t stride, uint32_t n_tokens,
                         uint8_t *tile, uint32_t token);

/* Reads them back, sign-extended to bytes. */
void ksort_load_mantissas(const struct head_layout *layout, const uint8_t *tile, uint32_t token,
                          union token_mantissas *mantissas);

static inline HOST_DEVICE bool is_bfp(uint32_t type)
{
    return type >= KSORT_BFP16;
}

/* What mantissas times the block's scale, 2^(exponent - 127) or SBFP's own, are to be multiplied with. */
static inline HOST_DEVICE float mantissa_unit(const struct head_layout *layout)
{
    return layout->is_scaled ? 1.0f : 1.0f / (float)(1u << (layout->mantissa_bits - 2));
}

static inline HOST_DEVICE size_t strip_bytes(const struct head_layout *layout)
{
    return (size_t)layout->n_words * STRIP_TOKENS * 4;
}

/* Byte offset in its tile of word w of the token at `token` (0..63). */
static inline HOST_DEVICE size_t word_offset(const struct head_layout *layout, uint32_t w, uint32_t token)
{
    return token / STRIP_TOKENS * strip_bytes(layout) + ((size_t)w * STRIP_TOKENS + token % STRIP_TOKENS) * 4;
}

/* Byte offset in its tile of the exponent of block `block` of the token at `token` (0..63). */
static inline HOST_DEVICE size_t exponent_offset(const struct head_layout *layout, uint32_t block, uint32_t token)
{
    return STRIPS_PER_TILE * strip_bytes(layout) + (size_t)block * KSORT_TILE_TOKENS + token;
}

/* Byte offset in its tile of the row of the token at `token` (0..63); float types. */
static inline HOST_DEVICE size_t row_offset(const struct head_layout *layout, uint32_t token)
{
    return (size_t)token * layout->head_dim * layout->value_bytes;
}

static inline uint8_t *tile_of(const ksort_cache *cache, size_t tile, uint32_t kv_head)
{
    return (uint8_t *)cache->base + tile * cache->tile_stride + kv_head * cache->head_stride;
}

/* Tile 0, the sinks', or that of the ring where slots of `tile` are. */
static inline uint8_t *exact_sinks(const ksort_exact *exact, uint32_t kv_head)
{
    return (uint8_t *)exact->base + kv_head * exact->head_stride;
}

static inline uint8_t *exact_tile(const ksort_exact *exact, size_t tile, uint32_t kv_head)
{
    return exact_sinks(exact, kv_head) + (1 + tile % exact->n_tiles) * exact->tile_stride;
}

#endif /* KSORT_LAYOUT_H */
