/* Chunks on their way from a tile in device memory to a warp's shared memory, and where things are in them there.
 *
 * BFP:   words of strip 0, words of strip 1, then exponents [n_blocks][32 tokens]. A word of 16 tokens makes four
 *        16-byte pieces of 4 tokens. Keys read one piece of words w .. w+3, values one word's pieces in both strips.
 *        Pieces of a word are stored in another order, depending on the word and the strip, so that the eight lanes
 *        that shared memory serves at a time meet all banks either way.
 * float: rows of 32 tokens. ldmatrix reads the same piece of tokens t, t+1, t+8, t+9, ... t+25 at a time; pieces of a
 *        row are stored in another order, depending on the token, to the same end.
 */
#ifndef KSORT_CUDA_DECODE_CHUNK_CUH
#define KSORT_CUDA_DECODE_CHUNK_CUH

#include "decode/common.cuh"
#include "decode/mma.cuh"

/* Byte offset in a chunk of word w of tokens `token` .. token + 3; token is a multiple of 4. */
template <uint32_t N_WORDS>
__device__ inline uint32_t chunk_word_offset(uint32_t w, uint32_t token)
{
    uint32_t strip = token / STRIP_TOKENS, piece = token % STRIP_TOKENS / 4;
    uint32_t order = (w >> 1 & 1) << 1 ^ strip;
    return 16 * (4 * (strip * N_WORDS + w) + (piece ^ order));
}

/* Byte offset in a chunk of channels 8 * piece .. 8 * piece + 7 of a token; float types. Pieces change places within
 * eight, or what is left of eight: 2 or 4. */
template <uint32_t HEAD_DIM>
__device__ inline uint32_t chunk_piece_offset(uint32_t piece, uint32_t token)
{
    constexpr uint32_t N_PIECES = HEAD_DIM / 8, IN_EIGHTS = N_PIECES / 8 * 8;
    uint32_t order = (token & 1) | (token >> 3 & 3) << 1;
    uint32_t mask = piece < IN_EIGHTS ? 7 : N_PIECES % 8 - 1;
    return 16 * (token * N_PIECES + (piece ^ (order & mask)));
}

/* The exponents, [n_blocks][CHUNK_TOKENS], of a chunk. */
template <uint32_t N_WORDS>
__device__ inline uint8_t *chunk_exponents(uint8_t *chunk_smem)
{
    return chunk_smem + CHUNK_TOKENS * 4 * N_WORDS;
}

/* What layout.h needs for offsets of words, exponents and rows, known to the compiler. */
template <uint32_t TYPE, uint32_t HEAD_DIM>
__device__ inline head_layout known_layout()
{
    head_layout layout = {};
    layout.n_words = n_words_of(TYPE, HEAD_DIM);
    layout.head_dim = HEAD_DIM;
    layout.value_bytes = 2;
    return layout;
}

template <uint32_t TYPE, uint32_t HEAD_DIM>
__device__ inline void fetch_bfp(uint32_t n_blocks, const uint8_t *tile_gmem, uint32_t first_token, uint32_t lane,
                                 uint32_t chunk_smem)
{
    constexpr uint32_t N_WORDS = n_words_of(TYPE, HEAD_DIM), PIECES = CHUNK_TOKENS * N_WORDS / 4, IN_STRIP = PIECES / 2;
    const head_layout layout = known_layout<TYPE, HEAD_DIM>();
    const uint8_t *words_gmem = tile_gmem + word_offset(&layout, 0, first_token) + 16 * lane;
#pragma unroll
    for (uint32_t i = 0; i < PIECES; i += WARP) {
        uint32_t piece = i + lane, in_strip = piece % IN_STRIP;
        uint32_t token = piece / IN_STRIP * STRIP_TOKENS + in_strip % 4 * 4;
        if (PIECES % WARP == 0 || piece < PIECES)
            copy_16_async(chunk_smem + chunk_word_offset<N_WORDS>(in_strip / 4, token), words_gmem + 16 * i);
    }
    if (lane < 2 * n_blocks) /* at most MAX_BLOCKS: a piece of 16 tokens a lane */
        copy_16_async(chunk_smem + CHUNK_TOKENS * 4 * N_WORDS + 16 * lane,
                      tile_gmem + exponent_offset(&layout, lane / 2, first_token + lane % 2 * 16));
}

template <uint32_t TYPE, uint32_t HEAD_DIM>
__device__ inline void fetch_rows(const uint8_t *tile_gmem, uint32_t first_token, uint32_t lane, uint32_t chunk_smem)
{
    constexpr uint32_t IN_ROW = HEAD_DIM / 8;
    const head_layout layout = known_layout<TYPE, HEAD_DIM>();
    const uint8_t *rows_gmem = tile_gmem + row_offset(&layout, first_token) + 16 * lane;
#pragma unroll
    for (uint32_t i = 0; i < CHUNK_TOKENS * IN_ROW; i += WARP) {
        uint32_t piece = i + lane;
        copy_16_async(chunk_smem + chunk_piece_offset<HEAD_DIM>(piece % IN_ROW, piece / IN_ROW), rows_gmem + 16 * i);
    }
}

/* Asks for tokens first_token .. first_token + 31 of a tile (first_token 0 or 32). */
template <uint32_t TYPE, uint32_t HEAD_DIM>
__device__ inline void fetch_chunk(uint32_t n_blocks, const uint8_t *tile_gmem, uint32_t first_token, uint32_t lane,
                                   uint32_t chunk_smem)
{
    if constexpr (mantissa_bits_of(TYPE) != 0)
        fetch_bfp<TYPE, HEAD_DIM>(n_blocks, tile_gmem, first_token, lane, chunk_smem);
    else
        fetch_rows<TYPE, HEAD_DIM>(tile_gmem, first_token, lane, chunk_smem);
}

#endif /* KSORT_CUDA_DECODE_CHUNK_CUH */
