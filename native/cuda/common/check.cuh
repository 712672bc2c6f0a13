/* Checks of arguments that the calls of api.cu share; structs are copied as common/structs.cuh has it. What is in
 * device memory is not looked at. */
#ifndef KSORT_CUDA_COMMON_CHECK_CUH
#define KSORT_CUDA_COMMON_CHECK_CUH

#include "common/device.cuh"

/* Which pointers of the arguments must be there: all of them, or only those to structs, as for sizing a workspace. */
enum class memory { needed, aside };

/* Caches and what is derived from them. Return KSORT_OK, _ARGUMENT, _STRUCT_SIZE, _TYPE, _HEAD_DIM, _BLOCK_SIZE,
 * _ALIGNMENT. */
ksort_status check_k_cache(const ksort_cuda_cache *cache, memory memory, device_cache *checked);
ksort_status check_v_cache(const ksort_cuda_cache *cache, memory memory, device_cache *checked);

/* What keys and values of one call must have in common. Returns KSORT_OK, _ARGUMENT, _HEAD_DIM, _HEADS. */
ksort_status check_pair(const device_cache &k, const device_cache &v);

/* Exact rows of a call that attends. Returns KSORT_OK, _ARGUMENT, _TYPE. */
ksort_status check_exact_pair(const device_cache &k, const device_cache &v, uint32_t n_tokens, uint32_t max_slots);

/* Returns KSORT_OK, _ARGUMENT, _STRUCT_SIZE. */
ksort_status check_tokens(const ksort_cuda_tokens *tokens, const device_cache &cache, memory memory,
                          ksort_cuda_tokens *checked);

/* NULL is right for both, and becomes zeros. Return KSORT_OK, _STRUCT_SIZE, and _ARGUMENT, or _TYPE and _TRANSFORM. */
ksort_status check_rope(const ksort_rope *rope, const ksort_cuda_tokens &tokens, memory memory, ksort_rope *checked);
ksort_status check_transform(const ksort_transform *transform, const device_cache &cache, ksort_transform *checked);

/* x, q or out: rows [n_contexts, n_tokens] of row_elements of x_type each.
 * Returns KSORT_OK, _ARGUMENT, _TYPE, _ALIGNMENT. */
ksort_status check_rows(const ksort_cuda_tokens &tokens, uint32_t x_type, size_t token_stride, size_t context_stride,
                        size_t row_elements);

/* The memory of such rows. Returns KSORT_OK, _ARGUMENT, _ALIGNMENT. */
ksort_status check_data(const void *data);

inline bool is_aligned(const void *p, size_t alignment)
{
    return (uintptr_t)p % alignment == 0;
}

#endif /* KSORT_CUDA_COMMON_CHECK_CUH */
