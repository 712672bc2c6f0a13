/* Scores of a chunk: 8 query rows times 32 tokens, S = Q K^T in int8 on tensor cores.
 *
 *     A = queries [8 rows][32 channels]            B = keys [32 channels][8 tokens], four times
 *     register 0: channels 8j .. 8j+3              column n of product i: token 4n + i
 *     register 2: channels 8j+4 .. 8j+7            -> one 16-byte load brings a word to all four products
 *
 * Key bytes are mantissas of m bits moved to the top of a byte, which also keeps their sign. So a key is byte *
 * 2^(exponent - 127 - 6) for every BFP type, byte * scale * 2^(m - 8) for SBFP. A product's values 0 and 1 are then row
 * n of tokens 8j + i and 8j + 4 + i: a lane has the scores of tokens 8j .. 8j+7, as values need their weights.
 *
 * Sums over one block are scaled by the exponents of key and query before they are added. Blocks of 32 and more are
 * whole steps of 32 channels. With blocks of 16, rows 0 to 7 of A keep the step's first block and rows 8 to 15 the
 * second (zero in larger blocks), so that one product gives both sums.
 */
#ifndef KSORT_CUDA_DECODE_KEYS_CUH
#define KSORT_CUDA_DECODE_KEYS_CUH

#include "decode/chunk.cuh"

/* Sums start here: as float bits, 0x4B400000 + x is 12582912 + x for |x| < 2^22. A sum is at most 32 * 2^14 = 2^19. */
constexpr int32_t SUM_START = 0x4B400000;
constexpr float SUM_START_VALUE = 12582912.0f;

/* The block's queries in shared memory. */
template <uint32_t HEAD_DIM>
struct query_smem {
    uint4 fragments[n_channel_steps(HEAD_DIM)][WARP];   /* A of each step */
    float factors[2 * n_channel_steps(HEAD_DIM)][ROWS]; /* of block b, 0 beyond the last: the query's step, the constant
                                                          of keys, the softmax scale, and log2(e) */
};

/* Channels 32 step + 8j .. + 3 (`low`) and + 4 .. + 7 (`high`) of tokens 4n + i, as bytes. */
template <uint32_t TYPE, uint32_t HEAD_DIM>
__device__ inline void load_key_quads(const uint8_t *chunk_smem, uint32_t step, uint32_t lane, uint32_t (&low)[4],
                                      uint32_t (&high)[4])
{
    constexpr uint32_t N_WORDS = n_words_of(TYPE, HEAD_DIM);
    const uint32_t token = lane / 4 * 4, j = lane % 4;
    /* Words beyond the last meet channels that queries have zero in. */
    auto load = [=](uint32_t w) {
        uint4 tokens =
            *reinterpret_cast<const uint4 *>(chunk_smem + chunk_word_offset<N_WORDS>(min(w, N_WORDS - 1), token));
        return tokens;
    };
    if constexpr (mantissa_bits_of(TYPE) == 4) {
        const uint4 words = load(4 * step + j);
        const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            low[i] = word[i] << 4 & 0xF0F0F0F0;
            high[i] = word[i] & 0xF0F0F0F0;
        }
    } else if constexpr (TYPE == KSORT_BFP16) {
        const uint4 first = load(8 * step + 2 * j), second = load(8 * step + 2 * j + 1);
        low[0] = first.x, low[1] = first.y, low[2] = first.z, low[3] = first.w;
        high[0] = second.x, high[1] = second.y, high[2] = second.z, high[3] = second.w;
    } else if constexpr (TYPE == KSORT_SBFP11) {
        /* A group of 32 channels: two words of low bits, two of them for each quad, one of high bits. */
        const uint4 words = load(3 * step + j / 2), tops = load(3 * step + 2);
        const uint32_t word[4] = {words.x, words.y, words.z, words.w}, top[4] = {tops.x, tops.y, tops.z, tops.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t lows = word[i] >> 4 * (j % 2), bits = top[i] >> 2 * j;
            low[i] = (lows << 5 & 0x60606060) | (bits << 7 & 0x80808080);
            high[i] = (lows << 3 & 0x60606060) | (bits << 6 & 0x80808080);
        }
    } else {
        /* A group of 16 channels: two words of low bits, one of high bits, two of them for each quad. */
        const uint32_t group = 3 * (2 * step + j / 2);
        const uint4 words = load(group + j % 2), tops = load(group + 2);
        const uint32_t word[4] = {words.x, words.y, words.z, words.w}, top[4] = {tops.x, tops.y, tops.z, tops.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint32_t bits = top[i] >> 4 * (j % 2);
            low[i] = (word[i] << 2 & 0x3C3C3C3C) | (bits << 6 & 0xC0C0C0C0);
            high[i] = (word[i] >> 2 & 0x3C3C3C3C) | (bits << 4 & 0xC0C0C0C0);
        }
    }
}

/* 2^(exponent - 127) of byte i of four, as exponent_scale. */
__device__ inline float scale_of_byte(uint32_t exponents, int i)
{
    uint32_t bits = i < 3 ? exponents << (23 - 8 * i) : exponents >> 1;
    return bits_float(bits & 0x7F800000);
}

/* The f16 whose upper byte is byte i of four: SBFP's scale. */
__device__ inline float f16_scale(uint32_t bytes, int i)
{
    const uint32_t pair = __byte_perm(bytes, 0, i / 2 ? 0x3424 : 0x1404); /* of two bytes: the compiler makes it once */
    return __half2float(__ushort_as_half((uint16_t)(i % 2 ? pair >> 16 : pair)));
}

/* What the scale bytes of tokens stand for, but for a constant of the type. */
template <uint32_t TYPE>
__device__ inline void scales_of_bytes(uint32_t bytes, float (&scales)[4])
{
#pragma unroll
    for (int i = 0; i < 4; i++)
        scales[i] = is_scaled_type(TYPE) ? f16_scale(bytes, i) : scale_of_byte(bytes, i);
}

/* Adds a block's sums of tokens 8j .. 8j+7, values `first` and first + 1 of the four products, to the scores.
 * exponents_smem [CHUNK_TOKENS] and factor are of the block. */
template <uint32_t TYPE>
__device__ inline void add_block(const int32_t (&sums)[4][4], int first, const uint8_t *exponents_smem, float factor,
                                 uint32_t lane, float (&scores)[8])
{
    const uint2 exponents = *reinterpret_cast<const uint2 *>(exponents_smem + 8 * (lane % 4));
    float scales[4], later_scales[4];
    scales_of_bytes<TYPE>(exponents.x, scales);
    scales_of_bytes<TYPE>(exponents.y, later_scales);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float sum = __int_as_float(sums[i][first]) - SUM_START_VALUE;
        const float later = __int_as_float(sums[i][first + 1]) - SUM_START_VALUE;
        scores[i] += sum * (scales[i] * factor);
        scores[4 + i] += later * (later_scales[i] * factor);
    }
}

/* Scores, in units of log2, of row lane / 4 and tokens 8j .. 8j+7. Blocks are of 2^block_shift channels. */
template <uint32_t TYPE, uint32_t HEAD_DIM, bool BLOCKS_OF_16>
__device__ inline void score_chunk(const head_layout &layout, uint32_t block_shift, const query_smem<HEAD_DIM> &queries,
                                   uint8_t *chunk_smem, uint32_t lane, float (&scores)[8])
{
    /* More steps of BFP14 and SBFP11 side by side don't fit the registers. */
    constexpr int SIDE_BY_SIDE = TYPE == KSORT_BFP14 || TYPE == KSORT_SBFP11 ? 2 : n_channel_steps(HEAD_DIM);
    const uint8_t *exponents_smem = chunk_exponents<n_words_of(TYPE, HEAD_DIM)>(chunk_smem);
#pragma unroll
    for (int i = 0; i < 8; i++)
        scores[i] = 0.0f;
#pragma unroll SIDE_BY_SIDE
    for (uint32_t step = 0; step < n_channel_steps(HEAD_DIM); step++) {
        uint32_t low[4], high[4];
        load_key_quads<TYPE, HEAD_DIM>(chunk_smem, step, lane, low, high);
        const uint4 a = queries.fragments[step][lane];
        int32_t sums[4][4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = SUM_START;
            mma_int8(sums[i], a, low[i], high[i]);
        }
        const uint32_t block = BLOCKS_OF_16 ? 2 * step : 32 * step >> block_shift;
        add_block<TYPE>(sums, 0, exponents_smem + block * CHUNK_TOKENS, queries.factors[block][lane / 4], lane, scores);
        if (BLOCKS_OF_16) {
            const uint32_t second = min(block + 1, layout.n_blocks - 1); /* of head_dim 80: sums of 0, factor 0 */
            add_block<TYPE>(sums, 2, exponents_smem + second * CHUNK_TOKENS, queries.factors[block + 1][lane / 4], lane,
                            scores);
        }
    }
}

/* Queries of heads first_head .. first_head + n_rows-1 of a context into shared memory, by all threads of a block.
 * Rows beyond n_rows are zero. */
template <uint32_t TYPE, uint32_t HEAD_DIM>
__device__ inline void load_queries(const attend_job &job, uint32_t context, uint32_t first_head, uint32_t n_rows,
                                    query_smem<HEAD_DIM> &queries)
{
    constexpr uint32_t N_STEPS = n_channel_steps(HEAD_DIM);
    constexpr float LOG2_E = 1.44269504f, QUERY = 0x1p-6f; /* of a mantissa */
    constexpr float KEY = is_scaled_type(TYPE) ? 1.0f / (1 << (8 - mantissa_bits_of(TYPE))) : 0x1p-6f; /* of a byte */
    const head_layout &layout = job.k.layout;
    const size_t first_row = (size_t)context * job.tokens.n_tokens * job.n_heads + first_head;
    const bool blocks_of_16 = layout.block_size == 16;
    /* Both loads of a thread before its first store, so that they are under way together. */
    for (uint32_t at = threadIdx.x; at < N_STEPS * WARP; at += blockDim.x) {
        const uint32_t step = at / WARP, lane = at % WARP, row = lane / 4, j = lane % 4;
        uint2 channels = make_uint2(0, 0);
        if (row < n_rows)
            channels = *reinterpret_cast<const uint2 *>(job.mantissas + (first_row + row) * job.query_stride +
                                                        32 * step + 8 * j);
        const uint32_t block = at / ROWS, row_of_factor = at % ROWS; /* of the first 2 * N_STEPS * ROWS */
        uint8_t exponent = 0;
        if (row_of_factor < n_rows && block < layout.n_blocks)
            exponent = job.exponents[(first_row + row_of_factor) * MAX_BLOCKS + block];
        const bool second_block = blocks_of_16 && j >= 2;
        queries.fragments[step][lane] =
            second_block ? make_uint4(0, channels.x, 0, channels.y) : make_uint4(channels.x, 0, channels.y, 0);
        if (block < 2 * N_STEPS)
            queries.factors[block][row_of_factor] = exponent_scale(exponent) * (job.scale * LOG2_E * (KEY * QUERY));
    }
}

#endif /* KSORT_CUDA_DECODE_KEYS_CUH */
