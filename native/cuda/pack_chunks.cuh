/* Chunks of eight neighbouring channels with nearest rounding: loaded, turned, packed into quads or stored. */
#ifndef KSORT_PACK_CHUNKS_CUH
#define KSORT_PACK_CHUNKS_CUH

#include "pack_strip.cuh"

/* RoPE of one channel in a word: bits 0 to 14 the partner, 16 to 31 the frequency, bit 15 whether the partner is
 * subtracted. A channel that is not turned is turned with itself by the angle `no_turn`, (1, 0): which gives itself. */
__device__ inline uint32_t packed_turn(const ksort_rope &rope, size_t at, uint32_t channel, uint32_t no_turn)
{
    const int sign = rope.sign[at];
    return sign == 0 ? channel | no_turn << 16
                     : rope.partner[at] | (uint32_t)rope.frequency[at] << 16 | (sign < 0 ? 1u << 15 : 0u);
}

/* The eight elements of x from `at`, which is a multiple of eight. */
__device__ inline void load_chunk(const void *x, uint32_t type, size_t at, float (&y)[CHUNK])
{
    if (type == KSORT_F32) {
        const float4 *from = reinterpret_cast<const float4 *>(static_cast<const float *>(x) + at);
        float4 low = from[0], high = from[1];
        y[0] = low.x, y[1] = low.y, y[2] = low.z, y[3] = low.w;
        y[4] = high.x, y[5] = high.y, y[6] = high.z, y[7] = high.w;
        return;
    }
    uint4 raw = *reinterpret_cast<const uint4 *>(static_cast<const uint16_t *>(x) + at);
    const uint32_t pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (type == KSORT_F16) {
            y[2 * i] = __half2float(__ushort_as_half((uint16_t)pairs[i]));
            y[2 * i + 1] = __half2float(__ushort_as_half((uint16_t)(pairs[i] >> 16)));
        } else {
            y[2 * i] = bits_float(pairs[i] << 16);
            y[2 * i + 1] = bits_float(pairs[i] & 0xFFFF0000u);
        }
    }
}

/* RoPE of channels first .. first + 7 of a row of x; angle(f) is cos and sin of frequency f. */
template <uint32_t X_TYPE, class Angle>
__device__ inline void rope_chunk(const uint8_t *row, const uint32_t *turns, uint32_t first, Angle angle,
                                  float (&y)[CHUNK])
{
    const uint4 *from = reinterpret_cast<const uint4 *>(turns + first);
    const uint4 low = from[0], high = from[1];
    const uint32_t words[CHUNK] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int j = 0; j < CHUNK; j++) {
        const float partner = load_float(row, X_TYPE, words[j] & 0x7FFFu);
        const float turned = bits_float(float_bits(partner) ^ (words[j] << 16 & 1u << 31));
        const float2 at = angle(words[j] >> 16);
        y[j] = __fadd_rn(__fmul_rn(y[j], at.x), __fmul_rn(turned, at.y));
    }
}

/* Four mantissas, in their bytes. */
__device__ inline uint32_t quad_of(const uint32_t (&mantissas)[4])
{
    uint32_t low = __byte_perm(mantissas[0], mantissas[1], 0x0040);
    uint32_t high = __byte_perm(mantissas[2], mantissas[3], 0x0040);
    return __byte_perm(low, high, 0x5410);
}

/* A chunk of a float row. */
__device__ inline void store_float_chunk(uint8_t *row, uint32_t type, uint32_t chunk, const float (&y)[CHUNK])
{
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t low, high;
        if (type == KSORT_F16) {
            low = __half_as_ushort(__float2half_rn(y[2 * i]));
            high = __half_as_ushort(__float2half_rn(y[2 * i + 1]));
        } else {
            low = __bfloat16_as_ushort(__float2bfloat16_rn(y[2 * i]));
            high = __bfloat16_as_ushort(__float2bfloat16_rn(y[2 * i + 1]));
        }
        pairs[i] = low | high << 16;
    }
    reinterpret_cast<uint4 *>(row)[chunk] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

#endif /* KSORT_PACK_CHUNKS_CUH */
