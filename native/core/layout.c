#include "layout.h"

static uint32_t divide_up(uint32_t a, uint32_t b)
{
    return (a + b - 1) / b;
}

ksort_status ksort_check_block_size(uint32_t block_size, uint32_t head_dim)
{
    bool known = block_size == 16 || block_size == 32 || block_size == 64 || block_size == 128;
    return known && block_size <= head_dim ? KSORT_OK : KSORT_ERR_BLOCK_SIZE;
}

/* Mantissa bits, and the group of channels that fills whole words: see FORMAT.md, "Tiles". */
static void set_bfp(struct head_layout *layout, uint32_t mantissa_bits, uint32_t group_quads, uint32_t group_words)
{
    uint32_t n_groups = divide_up(layout->head_dim, group_quads * 4);
    layout->mantissa_bits = mantissa_bits;
    layout->n_blocks = divide_up(layout->head_dim, layout->block_size);
    layout->n_quads = n_groups * group_quads;
    layout->n_words = n_groups * group_words;
    layout->tile_bytes = (size_t)KSORT_TILE_TOKENS * (4 * layout->n_words + layout->n_blocks);
}

static void set_float(struct head_layout *layout, uint32_t value_bytes)
{
    layout->value_bytes = value_bytes;
    layout->tile_bytes = (size_t)KSORT_TILE_TOKENS * layout->head_dim * value_bytes;
}

ksort_status ksort_layout_of(const ksort_format *format, struct head_layout *layout)
{
    if (!format || !layout)
        return KSORT_ERR_ARGUMENT;
    if (format->struct_size != sizeof *format)
        return KSORT_ERR_STRUCT_SIZE;
    if (format->type > KSORT_SBFP11)
        return KSORT_ERR_TYPE;
    if (format->head_dim == 0 || format->head_dim % 2 || format->head_dim > KSORT_MAX_HEAD_DIM)
        return KSORT_ERR_HEAD_DIM;
    if (is_bfp(format->type)) {
        ksort_status status = ksort_check_block_size(format->block_size, format->head_dim);
        if (status != KSORT_OK)
            return status;
    }
    *layout =
        (struct head_layout){.type = format->type, .head_dim = format->head_dim, .block_size = format->block_size};
    switch (format->type) {
    case KSORT_F32: set_float(layout, 4); break;
    case KSORT_F16:
    case KSORT_BF16: set_float(layout, 2); break;
    case KSORT_BFP16: set_bfp(layout, 8, 1, 1); break;
    case KSORT_BFP14: set_bfp(layout, 6, 4, 3); break;
    case KSORT_BFP12:
    case KSORT_SBFP12: set_bfp(layout, 4, 2, 1); break;
    case KSORT_SBFP11: set_bfp(layout, 3, 8, 3); break;
    }
    layout->is_scaled = format->type == KSORT_SBFP12 || format->type == KSORT_SBFP11;
    return KSORT_OK;
}

struct head_layout ksort_exact_layout(uint32_t head_dim)
{
    struct head_layout layout = {.type = KSORT_F16, .head_dim = head_dim};
    set_float(&layout, 2);
    return layout;
}

/* Four low bits of each byte of two quads, side by side. */
static uint32_t nibbles(uint32_t low, uint32_t high)
{
    return (low & 0x0F0F0F0Fu) | (high & 0x0F0F0F0Fu) << 4;
}

/* Columns 0 .. n-1, a constant, of quads [n_quads][stride] -> words [n_words][n]: a column is a token. */
ALWAYS_INLINE void words_of_quads(const struct head_layout *layout, const uint32_t *restrict quads, size_t stride,
                                  uint32_t *restrict words, const uint32_t n)
{
    switch (layout->mantissa_bits) {
    case 8:
        for (uint32_t w = 0; w < layout->n_words; w++)
            memcpy(words + w * n, quads + w * stride, n * sizeof *words);
        break;
    case 4:
        for (uint32_t w = 0; w < layout->n_words; w++, quads += 2 * stride)
            for (uint32_t t = 0; t < n; t++)
                words[w * n + t] = nibbles(quads[t], quads[stride + t]);
        break;
    case 6:
        for (uint32_t w = 0; w < layout->n_words; w += 3, quads += 4 * stride)
            for (uint32_t t = 0; t < n; t++) {
                uint32_t *word = words + w * n + t, high = 0;
                word[0] = nibbles(quads[t], quads[stride + t]);
                word[n] = nibbles(quads[2 * stride + t], quads[3 * stride + t]);
#pragma GCC unroll 4
                for (uint32_t i = 0; i < 4; i++)
                    high |= (quads[i * stride + t] >> 4 & 0x03030303u) << 2 * i;
                word[2 * n] = high;
            }
        break;
    case 3:
        for (uint32_t w = 0; w < layout->n_words; w += 3, quads += 8 * stride)
            for (uint32_t t = 0; t < n; t++) {
                uint32_t *word = words + w * n + t, low[2] = {0}, high = 0;
#pragma GCC unroll 8
                for (uint32_t i = 0; i < 8; i++) {
                    low[i / 4] |= (quads[i * stride + t] & 0x03030303u) << 2 * (i % 4);
                    high |= (quads[i * stride + t] >> 2 & 0x01010101u) << i;
                }
                word[0] = low[0];
                word[n] = low[1];
                word[2 * n] = high;
            }
        break;
    }
}

/* Sign-extends the low `bits` bits of each byte. With h = 2^(bits-1): u ^ h is the value + h, so adding 0x80 - h gives
 * the value + 0x80 without a carry between bytes, and flipping the top bit takes the 0x80 away. */
static uint32_t sign_extend_bytes(uint32_t u, uint32_t bits)
{
    uint32_t h = 1u << (bits - 1);
    return ((u ^ h * 0x01010101u) + (0x80 - h) * 0x01010101u) ^ 0x80808080u;
}

static void quads_of_words(const struct head_layout *layout, const uint32_t *words, uint32_t *quads)
{
    switch (layout->mantissa_bits) {
    case 8: memcpy(quads, words, layout->n_words * sizeof *words); break;
    case 4:
        for (uint32_t w = 0; w < layout->n_words; w++) {
            quads[2 * w] = sign_extend_bytes(words[w] & 0x0F0F0F0Fu, 4);
            quads[2 * w + 1] = sign_extend_bytes(words[w] >> 4 & 0x0F0F0F0Fu, 4);
        }
        break;
    case 6:
        for (uint32_t group = 0; group < layout->n_words / 3; group++, quads += 4, words += 3)
            for (uint32_t i = 0; i < 4; i++) {
                uint32_t low = words[i / 2] >> 4 * (i % 2) & 0x0F0F0F0Fu;
                uint32_t high = words[2] >> 2 * i & 0x03030303u;
                quads[i] = sign_extend_bytes(low | high << 4, 6);
            }
        break;
    case 3:
        for (uint32_t group = 0; group < layout->n_words / 3; group++, quads += 8, words += 3)
            for (uint32_t i = 0; i < 8; i++) {
                uint32_t low = words[i / 4] >> 2 * (i % 4) & 0x03030303u;
                uint32_t high = words[2] >> i & 0x01010101u;
                quads[i] = sign_extend_bytes(low | high << 2, 3);
            }
        break;
    }
}

void ksort_store_mantissas(const struct head_layout *layout, const union token_mantissas *mantissas, uint8_t *tile,
                           uint32_t token)
{
    ksort_store_columns(layout, mantissas->quads, 1, 1, tile, token);
}

void ksort_store_columns(const struct head_layout *layout, const uint32_t *quads, size_t stride, uint32_t n_tokens,
                         uint8_t *tile, uint32_t token)
{
    uint32_t *strip = (uint32_t *)(tile + word_offset(layout, 0, token)); /* [n_words][STRIP_TOKENS] from a column on */
    if (n_tokens == STRIP_TOKENS) {
        words_of_quads(layout, quads, stride, strip, STRIP_TOKENS);
        return;
    }
    for (uint32_t t = 0; t < n_tokens; t++) {
        uint32_t words[MAX_QUADS];
        words_of_quads(layout, quads + t, stride, words, 1);
        for (uint32_t w = 0; w < layout->n_words; w++)
            strip[w * STRIP_TOKENS + t] = words[w];
    }
}

void ksort_load_mantissas(const struct head_layout *layout, const uint8_t *tile, uint32_t token,
                          union token_mantissas *mantissas)
{
    uint32_t words[MAX_QUADS];
    for (uint32_t w = 0; w < layout->n_words; w++)
        memcpy(&words[w], tile + word_offset(layout, w, token), sizeof words[w]);
    quads_of_words(layout, words, mantissas->quads);
}
