/* Largest magnitudes of blocks whose chunks are held as they came: of f16 and bf16 two values at a time, first two
 * channels, then two tokens. */
#ifndef KSORT_CUDA_PACK_MAXIMA_CUH
#define KSORT_CUDA_PACK_MAXIMA_CUH

#include <type_traits>

#include "common/chunks.cuh"

/* The larger magnitude of each of two values of f16 or bf16; NaN where either is. */
template <uint32_t X_TYPE>
__device__ inline uint32_t larger_of_pairs(uint32_t a, uint32_t b)
{
    using pair_type = typename std::conditional<X_TYPE == KSORT_F16, __half2, __nv_bfloat162>::type;
    pair_type pairs[2];
    memcpy(&pairs[0], &a, sizeof a);
    memcpy(&pairs[1], &b, sizeof b);
    const pair_type larger = __hmax2_nan(__habs2(pairs[0]), __habs2(pairs[1]));
    uint32_t word;
    memcpy(&word, &larger, sizeof word);
    return word;
}

/* Largest magnitudes of the blocks of four tokens' chunks, as float bits, each block in a power of two of `lanes`. */
template <uint32_t X_TYPE>
__device__ inline void largest_of_blocks(const uint4 (&x)[4][CHUNK_PARTS<X_TYPE>], uint32_t lanes,
                                         uint32_t (&magnitudes)[4])
{
    if constexpr (X_TYPE == KSORT_F32) {
#pragma unroll
        for (int t = 0; t < 4; t++) {
            float y[CHUNK];
            chunk_values<X_TYPE>(x[t], y);
            magnitudes[t] = magnitude_of_chunk(y);
        }
        for (uint32_t apart = 1; apart < lanes; apart *= 2)
#pragma unroll
            for (int t = 0; t < 4; t++)
                magnitudes[t] = max(magnitudes[t], __shfl_xor_sync(ALL_LANES, magnitudes[t], apart));
    } else {
        uint32_t tokens[2];
#pragma unroll
        for (int t = 0; t < 4; t += 2) {
            uint32_t channels[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint4 pairs = x[t + i][0];
                channels[i] = larger_of_pairs<X_TYPE>(larger_of_pairs<X_TYPE>(pairs.x, pairs.y),
                                                      larger_of_pairs<X_TYPE>(pairs.z, pairs.w));
            }
            tokens[t / 2] = larger_of_pairs<X_TYPE>(__byte_perm(channels[0], channels[1], 0x5410),
                                                    __byte_perm(channels[0], channels[1], 0x7632));
        }
        for (uint32_t apart = 1; apart < lanes; apart *= 2)
#pragma unroll
            for (int i = 0; i < 2; i++)
                tokens[i] = larger_of_pairs<X_TYPE>(tokens[i], __shfl_xor_sync(ALL_LANES, tokens[i], apart));
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float2 pair = pair_values<X_TYPE>(tokens[i]);
            magnitudes[2 * i] = float_bits(pair.x);
            magnitudes[2 * i + 1] = float_bits(pair.y);
        }
    }
}

#endif /* KSORT_CUDA_PACK_MAXIMA_CUH */
