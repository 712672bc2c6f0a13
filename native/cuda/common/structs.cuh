/* Structs as callers hand them over: those of an older header are shorter, those of a newer one longer. A field that is
 * added goes to the end, never into padding, and 0 is what it means where a caller does not have it. Host code. */
#ifndef KSORT_CUDA_COMMON_STRUCTS_CUH
#define KSORT_CUDA_COMMON_STRUCTS_CUH

#include <stddef.h>
#include <string.h>

#include "ksort_cuda.h"

#define KSORT_END_OF(type, field) (offsetof(type, field) + sizeof(type::field))

/* Bytes up to the end of the last field that every caller has. */
template <typename STRUCT>
constexpr size_t LEAST_BYTES = sizeof(STRUCT);
template <>
constexpr size_t LEAST_BYTES<ksort_cuda_cache> = KSORT_END_OF(ksort_cuda_cache, n_kv_heads);
template <>
constexpr size_t LEAST_BYTES<ksort_cuda_exact> = KSORT_END_OF(ksort_cuda_exact, begin);
template <>
constexpr size_t LEAST_BYTES<ksort_cuda_tokens> = KSORT_END_OF(ksort_cuda_tokens, device_status);
template <>
constexpr size_t LEAST_BYTES<ksort_cuda_pack_args> = KSORT_END_OF(ksort_cuda_pack_args, x_type);
template <>
constexpr size_t LEAST_BYTES<ksort_cuda_attend_args> = KSORT_END_OF(ksort_cuda_attend_args, workspace_bytes);
template <>
constexpr size_t LEAST_BYTES<ksort_rope> = KSORT_END_OF(ksort_rope, sin);
template <>
constexpr size_t LEAST_BYTES<ksort_transform> = KSORT_END_OF(ksort_transform, rotate);

/* No version of a struct is as long: what a struct_size beyond would have read is not the caller's. */
constexpr size_t MOST_BYTES = 4096;

/* Copies a caller's struct: fields that it lacks become zeros, and what it has beyond ours must be zeros. Returns
 * KSORT_OK, _ARGUMENT for NULL, _STRUCT_SIZE. */
template <typename STRUCT>
ksort_status read_struct(const STRUCT *from, STRUCT *to)
{
    if (!from)
        return KSORT_ERR_ARGUMENT;
    const size_t size = from->struct_size;
    if (size < LEAST_BYTES<STRUCT> || size > MOST_BYTES || size % alignof(STRUCT) != 0)
        return KSORT_ERR_STRUCT_SIZE;
    const unsigned char *bytes = reinterpret_cast<const unsigned char *>(from);
    for (size_t i = sizeof *to; i < size; i++)
        if (bytes[i] != 0)
            return KSORT_ERR_STRUCT_SIZE;
    *to = STRUCT{};
    memcpy(to, from, size < sizeof *to ? size : sizeof *to);
    return KSORT_OK;
}

#endif /* KSORT_CUDA_COMMON_STRUCTS_CUH */
