/* Largest magnitudes of blocks whose chunks are held as they came: of f16 and bf16 two values at a time, first two
 * channels, then two tokens. */
#ifndef KSORT_PACK_MAXIMA_CUH
#define KSORT_PACK_MAXIMA_CUH

#include <type_traits>

#include "pack_chunks.cuh"

/* Halves of a pair, and pairs of the low and the high halves of two. */
__device__ inline float low_of(__half2 pair)
{
    return __low2float(pair);
}

__device__ inline float high_of(__half2 pair)
{
    return __high2float(pair);
}

__device__ inline __half2 lows_of(__half2 a, __half2 b)
{
    return __lows2half2(a, b);
}

__device__ inline __half2 highs_of(__half2 a, __half2 b)
{
    return __highs2half2(a, b);
}

__device__ inline float low_of(__nv_bfloat162 pair)
{
    return __low2float(pair);
}

__device__ inline float high_of(__nv_bfloat162 pair)
{
    return __high2float(pair);
}

__device__ inline __nv_bfloat162 lows_of(__nv_bfloat162 a, __nv_bfloat162 b)
{
    return __lows2bfloat162(a, b);
}

__device__ inline __nv_bfloat162 highs_of(__nv_bfloat162 a, __nv_bfloat162 b)
{
    return __highs2bfloat162(a, b);
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
        using pair_type = typename std::conditional<X_TYPE == KSORT_F16, __half2, __nv_bfloat162>::type;
        const auto larger = [](pair_type a, pair_type b) { return __hmax2_nan(a, b); };
        pair_type tokens[2];
#pragma unroll
        for (int t = 0; t < 4; t += 2) {
            pair_type channels[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const pair_type *pairs = reinterpret_cast<const pair_type *>(x[t + i]);
                channels[i] = larger(larger(__habs2(pairs[0]), __habs2(pairs[1])),
                                     larger(__habs2(pairs[2]), __habs2(pairs[3])));
            }
            tokens[t / 2] = larger(lows_of(channels[0], channels[1]), highs_of(channels[0], channels[1]));
        }
        for (uint32_t apart = 1; apart < lanes; apart *= 2)
#pragma unroll
            for (int i = 0; i < 2; i++)
                tokens[i] = larger(tokens[i], __shfl_xor_sync(ALL_LANES, tokens[i], apart));
#pragma unroll
        for (int i = 0; i < 2; i++) {
            magnitudes[2 * i] = float_bits(low_of(tokens[i]));
            magnitudes[2 * i + 1] = float_bits(high_of(tokens[i]));
        }
    }
}

#endif /* KSORT_PACK_MAXIMA_CUH */
