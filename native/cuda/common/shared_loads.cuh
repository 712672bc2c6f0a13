/* Loads from shared memory by address. */
#ifndef KSORT_CUDA_COMMON_SHARED_LOADS_CUH
#define KSORT_CUDA_COMMON_SHARED_LOADS_CUH

#include "common/chunks.cuh"

/* Addresses in shared memory are taken as numbers: sums of a lane's and a channel's part stay single instructions. */
__device__ inline uint32_t shared_address(const void *pointer)
{
    return (uint32_t)__cvta_generic_to_shared(pointer);
}

__device__ inline float2 load_shared_float2(uint32_t address)
{
    float2 value;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "r"(address));
    return value;
}

__device__ inline uint4 load_shared_uint4(uint32_t address)
{
    uint4 value;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(address));
    return value;
}

/* A value of x, or two neighbouring ones. */
template <uint32_t X_TYPE>
__device__ inline float load_shared_value(uint32_t address)
{
    if constexpr (X_TYPE == KSORT_F32) {
        float value;
        asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address));
        return value;
    }
    uint16_t bits;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bits) : "r"(address));
    return X_TYPE == KSORT_F16 ? __half2float(__ushort_as_half(bits)) : bits_float((uint32_t)bits << 16);
}

template <uint32_t X_TYPE>
__device__ inline float2 load_shared_pair(uint32_t address)
{
    if constexpr (X_TYPE == KSORT_F32) /* rows have an odd number of words: not aligned to two */
        return make_float2(load_shared_value<X_TYPE>(address), load_shared_value<X_TYPE>(address + 4));
    uint32_t bits;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(bits) : "r"(address));
    return pair_values<X_TYPE>(bits);
}

#endif /* KSORT_CUDA_COMMON_SHARED_LOADS_CUH */
