/* The calls that need no kernels: version, texts, sizes, and the exact decoder. */
#include <math.h>

#include "check.h"
#include "half.h"

uint32_t ksort_abi_version(void)
{
    return KSORT_ABI_VERSION;
}

const char *ksort_status_text(ksort_status status)
{
    switch (status) {
    case KSORT_OK: return "ok";
    case KSORT_ERR_ARGUMENT:
        return "bad argument: null pointer, zero count, slots outside the cache, or part outside the partition";
    case KSORT_ERR_STRUCT_SIZE:
        return "struct_size is too small, or fields that this library does not know are not zero";
    case KSORT_ERR_TYPE: return "unknown cache type, or one not allowed here";
    case KSORT_ERR_HEAD_DIM: return "head dimension is odd, zero, too large, or not the same for keys and values";
    case KSORT_ERR_BLOCK_SIZE: return "block size is not 16, 32, 64 or 128, or larger than the head dimension";
    case KSORT_ERR_HEADS: return "query heads are not a multiple of key heads, or keys and values differ in heads";
    case KSORT_ERR_ALIGNMENT: return "cache, stride or workspace is not a multiple of 64 bytes";
    case KSORT_ERR_ROPE: return "a RoPE table entry is out of range, or partners do not pair up";
    case KSORT_ERR_NON_FINITE: return "NaN or infinity in a key, value or query, or in the scores they make";
    case KSORT_ERR_RANGE: return "a key or value is too large for the cache type";
    case KSORT_ERR_WORKSPACE: return "workspace is too small";
    case KSORT_ERR_KERNELS: return "unknown kernel level, or one that this CPU does not support";
    case KSORT_ERR_THREADS: return "the system refused memory or threads for the pool";
    case KSORT_ERR_TRANSFORM:
        return "a transform's shift is not finite, its scale not positive and finite, its rotate not 0 or 1, or its "
               "permutation repeats a channel";
    }
    return "unknown status";
}

ksort_status ksort_tile_bytes(const ksort_format *format, size_t *bytes)
{
    struct head_layout layout;
    if (!bytes)
        return KSORT_ERR_ARGUMENT;
    ksort_status status = ksort_layout_of(format, &layout);
    if (status == KSORT_OK)
        *bytes = layout.tile_bytes;
    return status;
}

static void unpack_bfp(const struct head_layout *layout, const uint8_t *tile, uint32_t token, float *out)
{
    union token_mantissas mantissas;
    ksort_load_mantissas(layout, tile, token, &mantissas);
    for (uint32_t c = 0; c < layout->head_dim; c++) {
        uint8_t code = tile[exponent_offset(layout, c / layout->block_size, token)];
        float mantissa = (float)mantissas.channels[c];
        int power = code - 127 - (int)(layout->mantissa_bits - 2);
        if (layout->is_scaled)
            out[c] = mantissa * float_of_scale(code);
        else
            out[c] = code ? ldexpf(mantissa, power) : 0.0f;
    }
}

ksort_status ksort_unpack(const ksort_cache *cache, size_t first_slot, uint32_t n_tokens, float *out)
{
    ksort_cache copy;
    struct head_layout layout;
    ksort_status status = ksort_read_cache(cache, true, &copy, &layout);
    if (status == KSORT_OK)
        status = out ? ksort_check_slots(&copy, first_slot, n_tokens) : KSORT_ERR_ARGUMENT;
    if (status != KSORT_OK)
        return status;
    for (size_t slot = first_slot; slot < first_slot + n_tokens; slot++)
        for (uint32_t head = 0; head < copy.n_kv_heads; head++, out += layout.head_dim) {
            const uint8_t *tile = tile_of(&copy, slot / KSORT_TILE_TOKENS, head);
            uint32_t token = slot % KSORT_TILE_TOKENS;
            if (is_bfp(layout.type)) {
                unpack_bfp(&layout, tile, token, out);
                continue;
            }
            for (uint32_t c = 0; c < layout.head_dim; c++)
                out[c] = load_value(tile + row_offset(&layout, token), layout.type, c);
        }
    return KSORT_OK;
}
