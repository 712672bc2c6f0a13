/* Checks of arguments that several calls share. */
#ifndef KSORT_CHECK_H
#define KSORT_CHECK_H

#include "layout.h"
#include "structs.h"

/* Reads a caller's cache, checks it, its memory too unless with_memory is false, and derives its layout.
 * Returns KSORT_OK, _ARGUMENT, _STRUCT_SIZE, _TYPE, _HEAD_DIM, _BLOCK_SIZE, _ALIGNMENT. */
ksort_status ksort_read_cache(const ksort_cache *from, bool with_memory, ksort_cache *cache,
                              struct head_layout *layout);

/* Reads the exact rows of a cache that was read, and checks them, their memory too unless with_memory is false; cache->exact
 * becomes `exact`. Nothing to do where the cache has none.
 * Returns KSORT_OK, _ARGUMENT, _STRUCT_SIZE, _TYPE, _ALIGNMENT. */
ksort_status ksort_read_exact(ksort_cache *cache, bool with_memory, ksort_exact *exact);

/* Checks that slots first_slot .. first_slot+n_tokens-1 exist and are at least one: KSORT_OK or _ARGUMENT. */
ksort_status ksort_check_slots(const ksort_cache *cache, size_t first_slot, uint32_t n_tokens);

/* Checks n_rows rows of floats: stride at least row_values, no size that overflows. KSORT_OK or _ARGUMENT. */
static inline ksort_status check_rows(uint32_t n_rows, size_t row_stride, size_t row_values)
{
    bool fits = row_stride >= row_values && row_stride <= PTRDIFF_MAX / sizeof(float) / n_rows;
    return fits ? KSORT_OK : KSORT_ERR_ARGUMENT;
}

/* Reads a caller's RoPE and checks every table entry, and cos and sin [n_tokens, n_frequencies] to be finite. *growth becomes a bound of
 * |RoPE(x)[c]| / max|x|: at least 1, and max|cos| + max|sin| if that is more.
 * Returns KSORT_OK, _ARGUMENT, _STRUCT_SIZE, _ROPE, _KERNELS. */
ksort_status ksort_read_rope(const ksort_rope *from, uint32_t n_kv_heads, uint32_t head_dim, uint32_t n_tokens,
                             ksort_rope *rope, double *growth);

static inline bool is_aligned(const void *p)
{
    return (uintptr_t)p % KSORT_ALIGNMENT == 0;
}

#endif /* KSORT_CHECK_H */
