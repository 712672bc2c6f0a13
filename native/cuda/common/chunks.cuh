/* Chunks of eight neighbouring channels, each held by one lane: rounded to the nearest and stored. Packing by nearest
 * rounding and preparing queries share this.
 *
 * Operations are FORMAT.md's, each rounded on its own.
 */
#ifndef KSORT_CUDA_COMMON_CHUNKS_CUH
#define KSORT_CUDA_COMMON_CHUNKS_CUH

#include "common/encode.cuh"

constexpr int CHUNK = 8; /* channels */

/* Lanes of a head: those past its last chunk hold zeros. */
template <int HEAD_DIM>
constexpr int CHUNK_LANES = HEAD_DIM <= 64    ? 8
                            : HEAD_DIM <= 128 ? 16
                                              : WARP;

template <uint32_t X_TYPE>
constexpr uint32_t ELEMENT_BYTES = X_TYPE == KSORT_F32 ? 4 : 2;

/* Loads of 16 bytes that bring a chunk. */
template <uint32_t X_TYPE>
constexpr int CHUNK_PARTS = CHUNK * ELEMENT_BYTES<X_TYPE> / 16;

/* The two values of a word of f16 or bf16. */
template <uint32_t X_TYPE>
__device__ inline float2 pair_values(uint32_t word)
{
    if constexpr (X_TYPE == KSORT_F16)
        return make_float2(__half2float(__ushort_as_half((uint16_t)word)),
                           __half2float(__ushort_as_half((uint16_t)(word >> 16))));
    return make_float2(bits_float(word << 16), bits_float(word & 0xFFFF0000u));
}

/* The values of a chunk. */
template <uint32_t X_TYPE>
__device__ inline void chunk_values(const uint4 (&parts)[CHUNK_PARTS<X_TYPE>], float (&y)[CHUNK])
{
#pragma unroll
    for (int i = 0; i < CHUNK_PARTS<X_TYPE>; i++) {
        const uint32_t words[4] = {parts[i].x, parts[i].y, parts[i].z, parts[i].w};
#pragma unroll
        for (uint32_t j = 0; j < 4; j++) {
            if (X_TYPE == KSORT_F32) {
                y[4 * i + j] = bits_float(words[j]);
            } else {
                const float2 pair = pair_values<X_TYPE>(words[j]);
                y[2 * j] = pair.x;
                y[2 * j + 1] = pair.y;
            }
        }
    }
}

/* The chunk's largest magnitude as float bits; beyond infinity's where it holds NaN. */
template <int N>
__device__ inline uint32_t magnitude_of_chunk(const float (&y)[N])
{
    float largest = larger_magnitude(y[0], y[1]);
#pragma unroll
    for (int j = 2; j < N; j++)
        largest = larger_magnitude(largest, y[j]);
    return float_bits(largest);
}

/* The largest of a block's lanes, a power of two of them. */
__device__ inline uint32_t largest_of_block(uint32_t magnitude, uint32_t lanes)
{
    for (uint32_t apart = 1; apart < lanes; apart *= 2)
        magnitude = max(magnitude, __shfl_xor_sync(ALL_LANES, magnitude, apart));
    return magnitude;
}

/* The lanes of the head that this lane's chunk belongs to. */
template <int HEAD_DIM>
__device__ inline uint32_t lanes_of_head()
{
    constexpr int LANES = CHUNK_LANES<HEAD_DIM>;
    return ALL_LANES >> (WARP - LANES) << lane_of_thread() / LANES * LANES;
}

/* Rounds values of a block to units of its step, not clamped yet: float bits as UNITS has them. A block without an
 * exponent (zeros and subnormals) has zeros.
 *
 * Multiplying by 1 / step, a power of two, and adding UNITS is one operation with one rounding. Two operations give the
 * same: their product is exact but where it is below float32's normal range, and there both give 0. 1 / step is beyond
 * float32 for the smallest exponents: such blocks are first brought up. */
template <bool MAY_BE_TINY = true, int N>
__device__ inline void round_to_units(uint32_t exponent, uint32_t mantissa_bits, float (&y)[N], uint32_t (&rounded)[N])
{
    constexpr uint32_t RAISE = 16; /* exponents */
    const bool is_tiny = exponent > 0 && exponent < RAISE / 2;
    if (MAY_BE_TINY && __any_sync(ALL_LANES, is_tiny)) {
        const float raise = is_tiny ? (float)(1 << RAISE) : 1.0f;
        exponent += is_tiny ? RAISE : 0;
#pragma unroll
        for (int j = 0; j < N; j++)
            y[j] = __fmul_rn(y[j], raise);
    }
    /* step_inverse_of's power, and the bias */
    const float inverse = exponent == 0 ? 0.0f : bits_float((mantissa_bits - 2 + 127 - exponent + 127) << 23);
#pragma unroll
    for (int j = 0; j < N; j++)
        rounded[j] = float_bits(__fmaf_rn(y[j], inverse, UNITS));
}

/* Rounds a chunk to units of its block's step, in the low bytes of the result as UNITS has it. `limit`: the largest
 * mantissa; 0 makes zeros of anything. */
__device__ inline void round_chunk(uint32_t exponent, uint32_t mantissa_bits, int32_t limit, float (&y)[CHUNK],
                                   uint32_t (&mantissas)[CHUNK])
{
    const int32_t zero = (int32_t)float_bits(UNITS);
    round_to_units(exponent, mantissa_bits, y, mantissas);
#pragma unroll
    for (int j = 0; j < CHUNK; j++)
        mantissas[j] = (uint32_t)min(max((int32_t)mantissas[j], zero - limit), zero + limit);
}

/* Four mantissas, in their bytes. */
__device__ inline uint32_t quad_of(uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3)
{
    return __byte_perm(__byte_perm(m0, m1, 0x0040), __byte_perm(m2, m3, 0x0040), 0x5410);
}

/* The same of values as round_to_units leaves them: their low 16 bits are signed mantissas still to be clamped to
 * -limit .. limit. From sm_90 on one instruction does two of them. */
__device__ inline uint32_t clamped_quad(uint32_t u0, uint32_t u1, uint32_t u2, uint32_t u3, int32_t limit)
{
#if __CUDA_ARCH__ >= 900
    const uint32_t high = limit * 0x10001u, low = (uint32_t)-limit << 16 | (-limit & 0xFFFF);
    const uint32_t first = __vmaxs2(__vmins2(__byte_perm(u0, u1, 0x5410), high), low);
    const uint32_t second = __vmaxs2(__vmins2(__byte_perm(u2, u3, 0x5410), high), low);
    return __byte_perm(first, second, 0x6420);
#else
    const int32_t zero = (int32_t)float_bits(UNITS);
    const auto clamped = [&](uint32_t u) { return (uint32_t)min(max((int32_t)u, zero - limit), zero + limit); };
    return quad_of(clamped(u0), clamped(u1), clamped(u2), clamped(u3));
#endif
}

__device__ inline uint32_t bf16_pair(float low, float high)
{
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return __bfloat16_as_ushort(pair.x) | (uint32_t)__bfloat16_as_ushort(pair.y) << 16;
}

__device__ inline uint32_t f16_pair(float low, float high)
{
    const __half2 pair = __floats2half2_rn(low, high);
    return __half_as_ushort(pair.x) | (uint32_t)__half_as_ushort(pair.y) << 16;
}

/* A chunk of a row of f16 or bf16. */
__device__ inline void store_float_chunk(void *row, uint32_t type, uint32_t chunk, const float (&y)[CHUNK])
{
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        pairs[i] = type == KSORT_F16 ? f16_pair(y[2 * i], y[2 * i + 1]) : bf16_pair(y[2 * i], y[2 * i + 1]);
    static_cast<uint4 *>(row)[chunk] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

#endif /* KSORT_CUDA_COMMON_CHUNKS_CUH */
