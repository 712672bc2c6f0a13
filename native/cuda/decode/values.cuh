/* Weighted values of a chunk: 8 rows of weights times 32 tokens, O += P V on tensor cores, in f16 or bf16 with float32
 * sums.
 *
 *     A = weights [16][16 tokens], twice           B = values [16 tokens][8 channels]
 *     rows 0 to 7: weights, rounded                k = 2j, 2j+1, 2j+8, 2j+9 of product s (0, 1):
 *     rows 8 to 15: what rounding left                 tokens 8j + 4s + 0, 1, 2, 3
 *
 * So a lane's weights are those of the scores it has, and what rounding left costs nothing but accumulators:
 * a row's output is values 0, 1 plus LEFT_SCALE times values 2, 3. Weights keep 22 bits (f16) or 16 (bf16).
 *
 * BFP and SBFP values become bf16, exactly: small integers made by setting bits of a larger float, times their scale.
 * So that no exponent of BFP overflows on the way they are smaller by 2^-12 until the end.
 */
#ifndef KSORT_CUDA_DECODE_VALUES_CUH
#define KSORT_CUDA_DECODE_VALUES_CUH

#include "decode/chunk.cuh"

/* A of both products. */
struct weight_fragments {
    uint32_t a[2][4];
};

/* Columns of a product that lie beyond the head have channels of head_dim and more. */
template <uint32_t TYPE, uint32_t HEAD_DIM>
struct chunk_values;

/* ---- f16 and bf16: column n of product i is channel 8i + n ---- */

template <uint32_t HEAD_DIM>
struct float_rows {
    static constexpr uint32_t N_PRODUCTS = HEAD_DIM / 8;
    static constexpr float OUT_SCALE = 1.0f;

    static __device__ uint32_t channel(uint32_t product, uint32_t column) { return 8 * product + column; }

    /* Stale rows may be NaN, which a weight of 0 does not stop. */
    static __device__ void clear_token(const head_layout &, uint8_t *chunk_smem, uint32_t token)
    {
        for (uint32_t piece = 0; piece < HEAD_DIM / 8; piece++) {
            uint8_t *piece_smem = chunk_smem + chunk_piece_offset<HEAD_DIM>(piece, token);
            *reinterpret_cast<uint4 *>(piece_smem) = make_uint4(0, 0, 0, 0);
        }
    }

    /* B of products 2 * pair and 2 * pair + 1: registers 0, 1 and 2, 3. s as above. */
    static __device__ void load_pair(const uint8_t *chunk_smem, uint32_t lane, uint32_t pair, uint32_t s,
                                     uint32_t (&b)[4])
    {
        const uint32_t row = lane % 8, token = row / 2 * 8 + 4 * s + row % 2 + (lane / 8 & 1) * 2;
        load_transposed(chunk_smem + chunk_piece_offset<HEAD_DIM>(2 * pair + lane / 16, token), b);
    }
};

template <uint32_t HEAD_DIM>
struct chunk_values<KSORT_F16, HEAD_DIM> : float_rows<HEAD_DIM> {
    static constexpr float LEFT_SCALE = 0x1p-11f; /* what is left is below 2^-11: scaled up it is no subnormal */

    static __device__ void weigh(const float (&weights)[8], weight_fragments &fragments)
    {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const __half2 rounded = __floats2half2_rn(weights[2 * i], weights[2 * i + 1]);
            const __half2 left = __floats2half2_rn((weights[2 * i] - __low2float(rounded)) * (1.0f / LEFT_SCALE),
                                                   (weights[2 * i + 1] - __high2float(rounded)) * (1.0f / LEFT_SCALE));
            memcpy(&fragments.a[i / 2][i % 2 * 2], &rounded, sizeof rounded);
            memcpy(&fragments.a[i / 2][i % 2 * 2 + 1], &left, sizeof left);
        }
    }

    static __device__ void accumulate(uint32_t, const uint8_t *chunk_smem, uint32_t lane,
                                      const weight_fragments &weights, float (&sums)[HEAD_DIM / 8][4])
    {
#pragma unroll
        for (uint32_t pair = 0; pair < HEAD_DIM / 16; pair++)
#pragma unroll
            for (uint32_t s = 0; s < 2; s++) {
                uint32_t b[4];
                float_rows<HEAD_DIM>::load_pair(chunk_smem, lane, pair, s, b);
                mma_f16(sums[2 * pair], weights.a[s], b[0], b[1]);
                mma_f16(sums[2 * pair + 1], weights.a[s], b[2], b[3]);
            }
    }
};

/* Weights of bf16 products, for bf16 and BFP values. */
struct bf16_weights {
    static constexpr float LEFT_SCALE = 1.0f;

    static __device__ void weigh(const float (&weights)[8], weight_fragments &fragments)
    {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t rounded = bits_of(__floats2bfloat162_rn(weights[2 * i], weights[2 * i + 1]));
            fragments.a[i / 2][i % 2 * 2] = rounded;
            fragments.a[i / 2][i % 2 * 2 + 1] = bits_of(__floats2bfloat162_rn(
                weights[2 * i] - bits_float(rounded << 16), weights[2 * i + 1] - bits_float(rounded & 0xFFFF0000)));
        }
    }
};

template <uint32_t HEAD_DIM>
struct chunk_values<KSORT_BF16, HEAD_DIM> : float_rows<HEAD_DIM>, bf16_weights {
    static __device__ void accumulate(uint32_t, const uint8_t *chunk_smem, uint32_t lane,
                                      const weight_fragments &weights, float (&sums)[HEAD_DIM / 8][4])
    {
#pragma unroll
        for (uint32_t pair = 0; pair < HEAD_DIM / 16; pair++)
#pragma unroll
            for (uint32_t s = 0; s < 2; s++) {
                uint32_t b[4];
                float_rows<HEAD_DIM>::load_pair(chunk_smem, lane, pair, s, b);
                mma_bf16(sums[2 * pair], weights.a[s], b[0], b[1]);
                mma_bf16(sums[2 * pair + 1], weights.a[s], b[2], b[3]);
            }
    }
};

/* ---- BFP and SBFP: column n of the products of set q is column n + 8q of the head, CHANNELS neighbouring channels:
 * a word of all types but SBFP11, of which two make eight channels ---- */

constexpr float VALUE_SHIFT_UP = 0x1p12f, SCALED_DOWN = 0x1p-112f;

/* 2^(exponent - 127) of bytes 0, 1 (half 0) or 2, 3 (half 1) of four exponents. */
__device__ inline __nv_bfloat162 scales_of_pair(uint32_t exponents, int half)
{
    return bf16_pair(__byte_perm(exponents, 0, half ? 0x4342 : 0x4140) << 7);
}

/* SBFP's scales times SCALED_DOWN of the same: f16's exponent bits in the place of bf16's, whose bias is larger by 112.
 * Bytes that no encoder makes have finite scales too. */
__device__ inline __nv_bfloat162 signed_scales_of_pair(uint32_t bytes, int half)
{
    const uint32_t pair = __byte_perm(bytes, 0, half ? 0x3424 : 0x1404);
    return bf16_pair((pair >> 3 & 0x0FE00FE0) | (pair & 0x80008000));
}

/* Byte i of two words, as the low bytes of two halves; the bytes beside them are of no meaning. */
__device__ inline uint32_t bytes_of_pair(uint32_t first, uint32_t second, uint32_t i)
{
    return __byte_perm(first, second, i | (4 + i) << 8);
}

template <uint32_t TYPE, uint32_t HEAD_DIM>
struct bfp_words : bf16_weights {
    static constexpr bool IS_SCALED = is_scaled_type(TYPE);
    static constexpr uint32_t N_WORDS = n_words_of(TYPE, HEAD_DIM), CHANNELS = TYPE == KSORT_BFP16 ? 4 : 8;
    static constexpr uint32_t N_COLUMNS = HEAD_DIM / CHANNELS, N_SETS = (N_COLUMNS + 7) / 8;
    static constexpr uint32_t N_PRODUCTS = N_SETS * CHANNELS;
    static constexpr float OUT_SCALE = IS_SCALED ? 1.0f : VALUE_SHIFT_UP / (1 << (mantissa_bits_of(TYPE) - 2));

    static __device__ uint32_t channel(uint32_t product, uint32_t column)
    {
        return CHANNELS * (product / CHANNELS * 8 + column) + product % CHANNELS;
    }

    /* A zero block has no bits that could hurt. */
    static __device__ void clear_token(const head_layout &layout, uint8_t *chunk_smem, uint32_t token)
    {
        for (uint32_t block = 0; block < layout.n_blocks; block++)
            chunk_exponents<N_WORDS>(chunk_smem)[block * CHUNK_TOKENS + token] = 0;
    }

    static __device__ void accumulate(uint32_t block_shift, uint8_t *chunk_smem, uint32_t lane,
                                      const weight_fragments &weights, float (&sums)[N_PRODUCTS][4]);
};

/* The mantissas of a column of four tokens: one word each, or as nibbles of it, channels as BFP12 has them. */
template <uint32_t TYPE, uint32_t N_WORDS>
__device__ inline uint4 load_column(const uint8_t *chunk_smem, uint32_t column, uint32_t token)
{
    auto load = [=](uint32_t w) {
        uint4 tokens = *reinterpret_cast<const uint4 *>(chunk_smem + chunk_word_offset<N_WORDS>(w, token));
        return tokens;
    };
    if constexpr (TYPE != KSORT_SBFP11) {
        return load(column);
    } else {
        const uint4 lows = load(3 * (column / 4) + column / 2 % 2), tops = load(3 * (column / 4) + 2);
        auto nibbles = [=](uint32_t low, uint32_t top) {
            low >>= 4 * (column % 2), top >>= 2 * (column % 4);
            return (low & 0x03030303) | (low << 2 & 0x30303030) | (top << 2 & 0x04040404) | (top << 5 & 0x40404040);
        };
        return make_uint4(nibbles(lows.x, tops.x), nibbles(lows.y, tops.y), nibbles(lows.z, tops.z),
                          nibbles(lows.w, tops.w));
    }
}

/* Nibbles at bits 0 .. 3 of each half are m & (2 h - 1), h = 2^(bits - 1): that ^ h = m + h, which is set under a bf16
 * of 128 units whose last place is a unit. A unit is 2^-12 of BFP, 1 / SCALED_DOWN of SBFP. */
template <uint32_t TYPE>
struct nibble_values {
    static constexpr uint32_t H = 1 << (mantissa_bits_of(TYPE) - 1);
    static constexpr float UNIT = 1.0f / (is_scaled_type(TYPE) ? SCALED_DOWN : VALUE_SHIFT_UP);
    static constexpr uint32_t BIASED = ((is_scaled_type(TYPE) ? 0x7B00 : 0x3D00) + H) * 0x00010001;
    static constexpr float MINUS_BIAS = -(128.0f + H) * UNIT;

    static __device__ __nv_bfloat162 of(uint32_t nibbles, __nv_bfloat162 scales, __nv_bfloat162 minus_bias)
    {
        return __hfma2(bf16_pair(and_xor(nibbles, (2 * H - 1) * 0x00010001, BIASED)), scales, minus_bias);
    }
};

/* Bytes at bits 0 .. 7 of each half are m = (m & 127) - (m & 128). */
__device__ inline __nv_bfloat162 values_of_bytes(uint32_t bytes, __nv_bfloat162 scales)
{
    constexpr uint32_t BIAS = 0x3D003D00; /* two of 2^-5 = 128 * 2^-12; bit 7 makes 256 * 2^-12 of it */
    const __nv_bfloat162 low = bf16_pair(and_xor(bytes, 0x007F007F, BIAS));
    const __nv_bfloat162 sign = bf16_pair(and_xor(bytes, 0x00800080, BIAS));
    return __hmul2(__hsub2(low, sign), scales);
}

template <uint32_t TYPE, uint32_t HEAD_DIM>
__device__ inline void bfp_words<TYPE, HEAD_DIM>::accumulate(uint32_t block_shift, uint8_t *chunk_smem, uint32_t lane,
                                                             const weight_fragments &weights,
                                                             float (&sums)[N_PRODUCTS][4])
{
    const uint32_t j = lane % 4;
    using nibbles = nibble_values<TYPE>;
    const __nv_bfloat162 minus_bias = __floats2bfloat162_rn(nibbles::MINUS_BIAS, nibbles::MINUS_BIAS);
#pragma unroll
    for (uint32_t set = 0; set < N_SETS; set++) {
        const uint32_t column = min(lane / 4 + 8 * set, N_COLUMNS - 1), block = CHANNELS * column >> block_shift;
        const uint2 exponents =
            *reinterpret_cast<const uint2 *>(chunk_exponents<N_WORDS>(chunk_smem) + block * CHUNK_TOKENS + 8 * j);
#pragma unroll
        for (uint32_t s = 0; s < 2; s++) {
            const uint4 words = load_column<TYPE, N_WORDS>(chunk_smem, column, 8 * j + 4 * s);
            const uint32_t four = s ? exponents.y : exponents.x;
            const __nv_bfloat162 first = IS_SCALED ? signed_scales_of_pair(four, 0) : scales_of_pair(four, 0);
            const __nv_bfloat162 second = IS_SCALED ? signed_scales_of_pair(four, 1) : scales_of_pair(four, 1);
            float (*of_set)[4] = &sums[CHANNELS * set];
            const __nv_bfloat162 first_bias = __hmul2(first, minus_bias), second_bias = __hmul2(second, minus_bias);
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) {
                const uint32_t x = bytes_of_pair(words.x, words.y, i), y = bytes_of_pair(words.z, words.w, i);
                if constexpr (TYPE != KSORT_BFP16) {
                    mma_bf16(of_set[i], weights.a[s], bits_of(nibbles::of(x, first, first_bias)),
                             bits_of(nibbles::of(y, second, second_bias)));
                    mma_bf16(of_set[4 + i], weights.a[s], bits_of(nibbles::of(x >> 4, first, first_bias)),
                             bits_of(nibbles::of(y >> 4, second, second_bias)));
                } else {
                    mma_bf16(of_set[i], weights.a[s], bits_of(values_of_bytes(x, first)),
                             bits_of(values_of_bytes(y, second)));
                }
            }
        }
    }
}

template <uint32_t HEAD_DIM>
struct chunk_values<KSORT_BFP12, HEAD_DIM> : bfp_words<KSORT_BFP12, HEAD_DIM> {};

template <uint32_t HEAD_DIM>
struct chunk_values<KSORT_BFP16, HEAD_DIM> : bfp_words<KSORT_BFP16, HEAD_DIM> {};

template <uint32_t HEAD_DIM>
struct chunk_values<KSORT_SBFP12, HEAD_DIM> : bfp_words<KSORT_SBFP12, HEAD_DIM> {};

template <uint32_t HEAD_DIM>
struct chunk_values<KSORT_SBFP11, HEAD_DIM> : bfp_words<KSORT_SBFP11, HEAD_DIM> {};

#endif /* KSORT_CUDA_DECODE_VALUES_CUH */
