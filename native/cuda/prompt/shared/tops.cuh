/* Tops: by which power of two values of prompt attention are scaled, so that f16 holds them.
 *
 * Values stand in panels as v * 2^(UNIT_TOP - top), where top is at least the exponent (plus 127) of every value that
 * a CTA has seen: so below 2^8, whose products with what lifts bytes (value_pair) f16 still holds. A block 2^-25 of
 * the largest keeps all its bits; smaller ones may be lost. f16 values stay as they are: their top is UNIT_TOP. bf16
 * and BFP start at FIRST_TOP, so that a scale from exponent 0 is 0 and 2^(UNIT_TOP - top) a float32. Sums over exact
 * rows, which come first where there are any, are below 2^38 (values of f16, weights up to 2^15, 2^7 slots a lane and
 * tile): a float32 too, scaled from FIRST_EXACT_TOP.
 *
 * SBFP: scales with f16's exponent bits e are below 2^(e - 14), values below 2^(e - 11): their top is e + SCALED_TOP.
 * Up to FIRST_SCALED_TOP all scales there are, multiples of 2^-16, are exact in f16.
 */
#ifndef KSORT_CUDA_PROMPT_SHARED_TOPS_CUH
#define KSORT_CUDA_PROMPT_SHARED_TOPS_CUH

#include "prompt/shared/panels.cuh"

constexpr int UNIT_TOP = 127 + 7;
constexpr int FIRST_TOP = 32;
constexpr int FIRST_EXACT_TOP = 64;
constexpr int SCALED_TOP = 127 - 12;
constexpr int FIRST_SCALED_TOP = UNIT_TOP + 8;

/* Largest exponent byte of four channels of bf16 as two registers, or of four tokens: bytes, kept by __vmaxu4. */
__device__ inline uint32_t bf16_exponents(uint32_t pair_0, uint32_t pair_1)
{
    return __byte_perm(pair_0 << 1, pair_1 << 1, 0x7531);
}

__device__ inline int largest_byte(uint32_t bytes)
{
    bytes = __vmaxu4(bytes, bytes >> 16);
    bytes = __vmaxu4(bytes, bytes >> 8);
    return (int)__reduce_max_sync(~0u, bytes & 0xFF);
}

/* The top of a packed tile of BFP or SBFP values, of its first n_valid tokens. Every warp finds it alone: that is
 * shorter than a barrier. */
__device__ inline int top_of_blocks(const uint8_t *packed_smem, const head_layout &layout, uint32_t n_valid)
{
    constexpr uint32_t TOKENS = 4; /* of a word */
    const uint32_t *words = (const uint32_t *)(packed_smem + exponent_offset(&layout, 0, 0));
    uint32_t first = threadIdx.x % (TILE / TOKENS) * TOKENS; /* token of all the lane's words */
    uint32_t valid = n_valid >= first + TOKENS ? ~0u : n_valid <= first ? 0 : (1u << 8 * (n_valid - first)) - 1;
    valid &= layout.is_scaled ? 0x7F7F7F7F : ~0u; /* no signs */
    uint32_t even = 0, odd = 0;
#pragma unroll 2
    for (uint32_t i = threadIdx.x % WARP; i < layout.n_blocks * (TILE / TOKENS); i += WARP) {
        uint32_t exponents = words[i] & valid;
        even = __vmaxu2(even, exponents & 0x00FF00FF);
        odd = __vmaxu2(odd, exponents >> 8 & 0x00FF00FF);
    }
    uint32_t largest = __vmaxu2(even, odd);
    int exponent = (int)__reduce_max_sync(~0u, max(largest & 0xFFFF, largest >> 16));
    return layout.is_scaled ? max(exponent / 4 + SCALED_TOP, FIRST_SCALED_TOP) : exponent;
}

/* The same of bf16 rows, of which all values are looked through: those that are n_warps apart, from `warp` on. */
template <int HEAD_DIM>
__device__ inline int largest_row_exponent(const uint8_t *packed_smem, uint32_t n_valid, uint32_t warp,
                                           uint32_t n_warps)
{
    uint32_t largest = 0;
    for (uint32_t i = warp * WARP + threadIdx.x % WARP; i < n_valid * HEAD_DIM / CHUNK_CHANNELS; i += n_warps * WARP) {
        uint4 x = *(const uint4 *)(packed_smem + i * CHUNK_BYTES);
        largest = __vmaxu4(largest, __vmaxu4(bf16_exponents(x.x, x.y), bf16_exponents(x.z, x.w)));
    }
    return largest_byte(largest);
}

#endif /* KSORT_CUDA_PROMPT_SHARED_TOPS_CUH */
