/* Packed tiles of prompt attention are expanded within shared memory to 16-bit floats, for the tensor cores.
 *
 * Keys become bf16, where every mantissa times its step or scale is exact. Values become f16, whose 11 bits the weights
 * need (prompt/shared/softmax.cuh); f16 has little range, so values are scaled by a power of two
 * (prompt/shared/tops.cuh).
 */
#ifndef KSORT_CUDA_PROMPT_SHARED_EXPAND_CUH
#define KSORT_CUDA_PROMPT_SHARED_EXPAND_CUH

#include "prompt/shared/tops.cuh"

/* Bytes as numbers of a 16-bit float type: a byte u below 2^bits, set under the byte `magic`, reads as base + u.
 * offset_fits: base + u times any scale stays in range, so that one fused operation takes base away. */
struct key_pair {
    typedef __nv_bfloat162 type;
    static constexpr uint32_t magic = 0x43, bits = 7; /* bf16: 0x4300 is 128, its last place 1 */
    static constexpr float base = 128.0f;
    static constexpr bool offset_fits = false;
    __device__ static type splat(float x) { return __float2bfloat162_rn(x); }
};

struct value_pair {
    typedef __half2 type;
    static constexpr uint32_t magic = 0x64, bits = 10; /* f16: 0x6400 is 1024, its last place 1 */
    static constexpr float base = 1024.0f;
    static constexpr bool offset_fits = true;
    __device__ static type splat(float x) { return __float2half2_rn(x); }
};

/* What is added to mantissas of BITS bits, in each byte, to make them positive before they are lifted: nothing where
 * the type lacks the bits. */
template <typename PAIR, int BITS>
constexpr uint32_t BIAS = BITS <= PAIR::bits ? (1u << (BITS - 1)) * 0x01010101u : 0;

/* Two bytes of a biased quad of mantissas, as two numbers times `scale` (of at most three bits), exactly where the type
 * can hold them. */
template <typename PAIR, int BITS>
__device__ inline uint32_t scaled_pair(uint32_t quad, uint32_t selector, typename PAIR::type scale)
{
    typedef typename PAIR::type pair;
    uint32_t lifted = __byte_perm(quad, PAIR::magic, selector);
    if constexpr (BITS <= PAIR::bits) {
        pair offset = PAIR::splat(PAIR::base + (float)(1 << (BITS - 1)));
        if constexpr (PAIR::offset_fits)
            return as_bits(__hfma2(bits_as<pair>(lifted), scale, __hneg2(__hmul2(offset, scale))));
        else
            return as_bits(__hmul2(__hsub2(bits_as<pair>(lifted), offset), scale));
    } else {
        /* BFP16 in bf16: bit 7 of a byte falls on the exponent's last bit. The low seven bits read as 128 + low, bit 7
         * alone as 256 for a negative mantissa and 128 for others: their difference is the mantissa. */
        constexpr uint32_t SIGNS = 0x00800080, MAGIC = PAIR::magic * 0x01000100u;
        pair low = bits_as<pair>(lifted & ~SIGNS), sign = bits_as<pair>(lifted & (MAGIC | SIGNS));
        return as_bits(__hmul2(__hsub2(low, sign), scale));
    }
}

/* Eight channels, from two biased quads. */
template <typename PAIR, int BITS>
__device__ inline uint4 scaled_chunk(uint32_t quad_0, uint32_t quad_1, typename PAIR::type scale)
{
    return make_uint4(scaled_pair<PAIR, BITS>(quad_0, 0x4140, scale), scaled_pair<PAIR, BITS>(quad_0, 0x4342, scale),
                      scaled_pair<PAIR, BITS>(quad_1, 0x4140, scale), scaled_pair<PAIR, BITS>(quad_1, 0x4342, scale));
}

/* Words that an item is made of: one of 4-bit mantissas or two of BFP16 make a chunk, three of BFP14 make two, as do
 * two of SBFP11: one of low bits, and one of high bits, half of which are another item's. */
template <int BITS>
constexpr uint32_t ITEM_WORDS = BITS == 4   ? 1
                                : BITS == 6 ? 3
                                            : 2;
template <int BITS>
constexpr uint32_t ITEM_CHUNKS = BITS == 6 || BITS == 3 ? 2 : 1;

/* Word `w` of an item, of a token's. */
template <int BITS>
__device__ inline uint32_t word_of_item(uint32_t item, uint32_t w)
{
    return BITS == 3 ? item / 2 * 3 + (w == 0 ? item % 2 : 2) : item * ITEM_WORDS<BITS> + w;
}

/* Chunks of one token from its `words`; SBFP11's high bits start at bit 0. */
template <typename PAIR, int BITS, int WORDS>
__device__ inline void store_chunks(uint8_t *panels_smem, uint32_t token, uint32_t chunk,
                                    const uint32_t (&words)[WORDS], typename PAIR::type scale)
{
    constexpr uint32_t bias = BIAS<PAIR, BITS>;
    auto store = [=](uint32_t place, uint32_t quad_0, uint32_t quad_1) {
        uint4 *out = (uint4 *)(panels_smem + chunk_offset(TILE, token, place));
        *out = scaled_chunk<PAIR, BITS>(quad_0 ^ bias, quad_1 ^ bias, scale);
    };
    constexpr uint32_t LOW = 0x0F0F0F0F, HIGH = 0x30303030;
    if constexpr (BITS == 4) {
        store(chunk, words[0] & LOW, words[0] >> 4 & LOW);
    } else if constexpr (BITS == 3) {
        constexpr uint32_t TWO = 0x03030303, TOP = 0x04040404;
        store(chunk, (words[0] & TWO) | (words[1] << 2 & TOP), (words[0] >> 2 & TWO) | (words[1] << 1 & TOP));
        store(chunk + 1, (words[0] >> 4 & TWO) | (words[1] & TOP), (words[0] >> 6 & TWO) | (words[1] >> 1 & TOP));
    } else if constexpr (BITS == 6) {
        store(chunk, (words[0] & LOW) | (words[2] << 4 & HIGH), (words[0] >> 4 & LOW) | (words[2] << 2 & HIGH));
        store(chunk + 1, (words[1] & LOW) | (words[2] & HIGH), (words[1] >> 4 & LOW) | (words[2] >> 2 & HIGH));
    } else {
        store(chunk, words[0], words[1]);
    }
}

/* Walks over a packed tile of BITS-bit mantissas. scale_of(exponent byte, token) gives a pair of equal scales. 16 threads
 * are a worker: a token of a strip each, so that neither reads nor writes meet in a bank. A worker takes an item (words
 * of whole chunks) in all strips, whose addresses differ by constants; where items are few, in a part of the strips. */
template <typename PAIR, int BITS, int HEAD_DIM, int THREADS, typename SCALE_OF>
__device__ inline void expand_mantissas(uint8_t *panels_smem, const uint8_t *packed_smem, uint32_t block_size,
                                        SCALE_OF scale_of)
{
    constexpr uint32_t CHUNKS = ITEM_CHUNKS<BITS>, WORDS = ITEM_WORDS<BITS>;
    constexpr uint32_t ITEMS = HEAD_DIM / CHUNK_CHANNELS / CHUNKS;
    constexpr uint32_t WORKERS = THREADS / STRIP_TOKENS;
    constexpr uint32_t SHARES = WORKERS >= 4 * ITEMS ? 4 : WORKERS >= 2 * ITEMS ? 2 : 1; /* of the strips */
    constexpr uint32_t STRIPS = STRIPS_PER_TILE / SHARES;
    head_layout known = {}; /* offsets of which the compiler knows all but the block */
    known.n_words = BITS == 3 ? (ITEMS + 1) / 2 * 3 : ITEMS * WORDS;
    const uint32_t block_shift = __ffs(block_size) - 1, worker = threadIdx.x % THREADS / STRIP_TOKENS;
    const uint32_t share = SHARES == 1 ? 0 : worker / ITEMS;
    if (share >= SHARES)
        return;
#pragma unroll
    for (uint32_t item = worker - share * ITEMS; item < ITEMS; item += WORKERS) {
        uint32_t block = item * CHUNKS * CHUNK_CHANNELS >> block_shift;
        uint32_t first_token = share * STRIPS * STRIP_TOKENS + threadIdx.x % STRIP_TOKENS;
        uint32_t words[STRIPS][WORDS];
        typename PAIR::type scales[STRIPS];
#pragma unroll
        for (uint32_t strip = 0; strip < STRIPS; strip++) {
            uint32_t token = first_token + strip * STRIP_TOKENS;
            scales[strip] = scale_of(packed_smem[exponent_offset(&known, block, token)], token);
#pragma unroll
            for (uint32_t w = 0; w < WORDS; w++)
                words[strip][w] =
                    *(const uint32_t *)(packed_smem + word_offset(&known, word_of_item<BITS>(item, w), token));
            if (BITS == 3)
                words[strip][1] >>= item % 2 * 4;
        }
#pragma unroll
        for (uint32_t strip = 0; strip < STRIPS; strip++)
            store_chunks<PAIR, BITS>(panels_smem, first_token + strip * STRIP_TOKENS, item * CHUNKS, words[strip],
                                     scales[strip]);
    }
}

/* 2^(exponent - 127 - (BITS - 2)), subnormal where it must be; 0 for 0: the byte is bf16's own exponent. */
template <int BITS>
__device__ inline __nv_bfloat162 key_scale(uint8_t exponent)
{
    return __hmul2(bits_as<__nv_bfloat162>(exponent * 0x00800080u), key_pair::splat(1.0f / (1 << (BITS - 2))));
}

/* The scale of SBFP, exactly. */
__device__ inline __nv_bfloat162 scaled_key_scale(uint8_t scale, uint32_t)
{
    return key_pair::splat(__half2float(__ushort_as_half((uint16_t)(scale << 8))));
}

template <int HEAD_DIM, int THREADS>
__device__ void expand_keys(uint8_t *panels_smem, const uint8_t *packed_smem, const head_layout &layout)
{
    if (layout.type == KSORT_BFP12)
        expand_mantissas<key_pair, 4, HEAD_DIM, THREADS>(
            panels_smem, packed_smem, layout.block_size,
            [](uint8_t exponent, uint32_t) { return key_scale<4>(exponent); });
    else if (layout.type == KSORT_BFP14)
        expand_mantissas<key_pair, 6, HEAD_DIM, THREADS>(
            panels_smem, packed_smem, layout.block_size,
            [](uint8_t exponent, uint32_t) { return key_scale<6>(exponent); });
    else if (layout.type == KSORT_SBFP12)
        expand_mantissas<key_pair, 4, HEAD_DIM, THREADS>(panels_smem, packed_smem, layout.block_size, scaled_key_scale);
    else if (layout.type == KSORT_SBFP11)
        expand_mantissas<key_pair, 3, HEAD_DIM, THREADS>(panels_smem, packed_smem, layout.block_size, scaled_key_scale);
    else
        expand_mantissas<key_pair, 8, HEAD_DIM, THREADS>(
            panels_smem, packed_smem, layout.block_size,
            [](uint8_t exponent, uint32_t) { return key_scale<8>(exponent); });
}

/* 2^(exponent - 127 - (BITS - 2)) * 2^(UNIT_TOP - top), subnormal where it must be, 0 below: as 2^(exponent - top)
 * times f16's 2^15, whose exponent field is 30, times the rest. Stale exponents above top make a finite scale too. */
template <int BITS>
__device__ inline __half2 value_scale(uint8_t exponent, int top)
{
    uint32_t field = max(min((int)exponent - top, 0) + 30, 0);
    constexpr int REST = 15 - (UNIT_TOP - 127) + BITS - 2;
    return __hmul2(bits_as<__half2>(field * 0x04000400u), value_pair::splat(1.0f / (1 << REST)));
}

/* The same of SBFP, whose scales up to `top` make finite values. */
__device__ inline __half2 scaled_value_scale(uint8_t scale, int top)
{
    constexpr int BIAS = 15;
    const __half2 unit = bits_as<__half2>((uint32_t)(BIAS + UNIT_TOP - top) * 0x04000400u);
    return __hmul2(bits_as<__half2>(scale * 0x01000100u), unit);
}

__device__ inline uint32_t half_of_bf16(uint32_t pair, float scale)
{
    return as_bits(__floats2half2_rn(bits_float(pair << 16) * scale, bits_float(pair & 0xFFFF0000) * scale));
}

/* bf16 rows (scaled), or f16 rows as they are. */
template <int HEAD_DIM, int THREADS>
__device__ inline void expand_rows(uint8_t *panels_smem, const uint8_t *packed_smem, bool is_bf16, int top,
                                   uint32_t n_valid)
{
    constexpr uint32_t ROW_CHUNKS = HEAD_DIM / CHUNK_CHANNELS;
    float scale = exponent_scale((uint8_t)(UNIT_TOP + 127 - top));
    for (uint32_t i = threadIdx.x % THREADS; i < TILE * ROW_CHUNKS; i += THREADS) {
        uint32_t token = i / ROW_CHUNKS;
        uint4 x = make_uint4(0, 0, 0, 0);
        if (token < n_valid)
            x = *(const uint4 *)(packed_smem + i * CHUNK_BYTES);
        if (is_bf16)
            x = make_uint4(half_of_bf16(x.x, scale), half_of_bf16(x.y, scale), half_of_bf16(x.z, scale),
                           half_of_bf16(x.w, scale));
        *(uint4 *)(panels_smem + chunk_offset(TILE, token, i % ROW_CHUNKS)) = x;
    }
}

/* Expands a staged tile of values, scaled by `top`. Bytes of tokens from n_valid on are stale: they become finite
 * numbers, whose weights are 0. */
template <int HEAD_DIM, int THREADS>
__device__ void expand_values(uint8_t *panels_smem, const uint8_t *packed_smem, const head_layout &layout, int top,
                              uint32_t n_valid)
{
    auto scale_of_valid = [=](uint8_t scale, uint32_t token) {
        return scaled_value_scale(token < n_valid ? scale : 0, top);
    };
    if (layout.type == KSORT_BFP12)
        expand_mantissas<value_pair, 4, HEAD_DIM, THREADS>(
            panels_smem, packed_smem, layout.block_size,
            [=](uint8_t exponent, uint32_t) { return value_scale<4>(exponent, top); });
    else if (layout.type == KSORT_BFP16)
        expand_mantissas<value_pair, 8, HEAD_DIM, THREADS>(
            panels_smem, packed_smem, layout.block_size,
            [=](uint8_t exponent, uint32_t) { return value_scale<8>(exponent, top); });
    else if (layout.type == KSORT_SBFP12)
        expand_mantissas<value_pair, 4, HEAD_DIM, THREADS>(panels_smem, packed_smem, layout.block_size, scale_of_valid);
    else if (layout.type == KSORT_SBFP11)
        expand_mantissas<value_pair, 3, HEAD_DIM, THREADS>(panels_smem, packed_smem, layout.block_size, scale_of_valid);
    else
        expand_rows<HEAD_DIM, THREADS>(panels_smem, packed_smem, layout.type == KSORT_BF16, top, n_valid);
}

#endif /* KSORT_CUDA_PROMPT_SHARED_EXPAND_CUH */
