/* Checks of arguments that several calls share. */
#ifndef KSORT_CHECK_H
#define KSORT_CHECK_H

#include "layout.h"

/* Checks a cache and derives its layout; its memory too unless with_memory is false.
 * Returns KSORT_OK, _ARGUMENT, _STRUCT_SIZE, _TYPE, _HEAD_DIM, _BLOCK_SIZE, _ALIGNMENT. */
ksort_status ksort_check_cache(const ksort_cache *cache, bool with_memory, struct head_layout *layout);

/* Checks that slots first_slot .. first_slot+n_tokens-1 exist and are at least one: KSORT_OK or _ARGUMENT. */
ksort_status ksort_check_slots(const ksort_cache *cache, size_t first_slot, uint32_t n_tokens);

/* Checks n_rows rows of floats: stride at least row_values, no size that overflows. KSORT_OK or _ARGUMENT. */
static inline ksort_status check_rows(uint32_t n_rows, size_t row_stride, size_t row_values)
{
    bool fits = row_stride >= row_values && row_stride <= PTRDIFF_MAX / sizeof(float) / n_rows;
    return fits ? KSORT_OK : KSORT_ERR_ARGUMENT;
}

/* Checks every table entry, and cos and sin [n_tokens, n_frequencies] to be finite. *growth becomes a bound of
 * |RoPE(x)[c]| / max|x|: at least 1, and max|cos| + max|sin| if that is more.
 * Returns KSORT_OK, _ARGUMENT, _STRUCT_SIZE, _ROPE, _KERNELS. */
ksort_status ksort_check_rope(const ksort_rope *rope, uint32_t n_kv_heads, uint32_t head_dim, uint32_t n_tokens,
                              double *growth);

static inline bool is_aligned(const void *p)
{
    return (uintptr_t)p % KSORT_ALIGNMENT == 0;
}

#endif /* KSORT_CHECK_H */
