/* Tiles of prompt attention in shared memory: how expanded ones lie there, and what is fetched.
 *
 * An expanded tile is cut into panels of 64 channels; a panel is rows of 128 bytes, one a token, whose eight 16-byte
 * chunks (8 channels each) are swapped about so that eight tokens' chunks of the same channels lie in different banks:
 *
 *     panel 0                          panel 1
 *     token 0: chunk 0 1 2 3 4 5 6 7   ...           chunk c of row r is at place c ^ (r % 8) of its row;
 *     token 1: chunk 1 0 3 2 5 4 7 6                 this is also wgmma's "128-byte swizzle" (panels start at
 *     token 2: chunk 2 3 0 1 6 7 4 5                 multiples of 1024 bytes)
 */
#ifndef KSORT_CUDA_PROMPT_SHARED_PANELS_CUH
#define KSORT_CUDA_PROMPT_SHARED_PANELS_CUH

#include "common/device.cuh"

constexpr int TILE = KSORT_TILE_TOKENS;
constexpr int CHUNK_CHANNELS = 8;
constexpr int CHUNK_BYTES = 16;
constexpr int PANEL_CHUNKS = 8;
constexpr int PANEL_ROW_BYTES = PANEL_CHUNKS * CHUNK_BYTES;

/* Bytes of n_rows rows of a head in panels. */
template <int HEAD_DIM>
constexpr int panel_bytes(int n_rows)
{
    return (HEAD_DIM + PANEL_CHUNKS * CHUNK_CHANNELS - 1) / (PANEL_CHUNKS * CHUNK_CHANNELS) * n_rows * PANEL_ROW_BYTES;
}

/* Byte offset of a chunk of a row in panels of n_rows rows. */
__device__ inline uint32_t chunk_offset(uint32_t n_rows, uint32_t row, uint32_t chunk)
{
    return (chunk / PANEL_CHUNKS * n_rows + row) * PANEL_ROW_BYTES + (chunk ^ row) % PANEL_CHUNKS * CHUNK_BYTES;
}

/* A register as a pair of 16-bit floats, and back. */
template <typename T>
__device__ inline T bits_as(uint32_t bits)
{
    static_assert(sizeof(T) == sizeof bits, "a pair fills a register");
    T x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

template <typename T>
__device__ inline uint32_t as_bits(T x)
{
    static_assert(sizeof(T) == sizeof(uint32_t), "a pair fills a register");
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

__device__ inline uint32_t smem_address(const void *smem)
{
    return (uint32_t)__cvta_generic_to_shared(smem);
}

/* Starts copying 16 bytes; zeros where `real` is false (gmem must be readable all the same). */
__device__ inline void copy_16_async(uint8_t *smem, const void *gmem, bool real)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_address(smem)), "l"(gmem),
                 "r"(real ? 16 : 0)
                 : "memory");
}

__device__ inline void wait_for_copies()
{
    asm volatile("cp.async.wait_all;" ::: "memory");
}

/* Ends a group of copies: those started since the one before. */
__device__ inline void group_copies()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* Waits for all groups but the last PENDING. */
template <int PENDING>
__device__ inline void wait_for_copies()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

/* A packed tile as it is, by THREADS threads of which this is `thread`. tile_bytes is a multiple of 64. */
template <int THREADS>
__device__ inline void fetch_packed(uint8_t *stage_smem, const uint8_t *tile_gmem, uint32_t tile_bytes, uint32_t thread)
{
#pragma unroll 1
    for (uint32_t byte = thread * CHUNK_BYTES; byte < tile_bytes; byte += THREADS * CHUNK_BYTES)
        copy_16_async(stage_smem + byte, tile_gmem + byte, true);
}

/* A tile of f16 rows straight into panels, with zeros for tokens from n_valid on. Eight threads take a row of a panel,
 * and the same chunk of it in all steps: addresses differ by constants. */
template <int HEAD_DIM, int THREADS>
__device__ inline void fetch_f16(uint8_t *panels_smem, const uint8_t *tile_gmem, uint32_t n_valid, uint32_t thread)
{
    constexpr uint32_t ROW_CHUNKS = HEAD_DIM / CHUNK_CHANNELS, ROW_BYTES = HEAD_DIM * 2;
    constexpr uint32_t STEP_ROWS = THREADS / PANEL_CHUNKS;
    uint32_t row = thread / PANEL_CHUNKS, chunk = thread % PANEL_CHUNKS;
    uint8_t *smem = panels_smem + chunk_offset(TILE, row, chunk);
    const uint8_t *gmem = tile_gmem + row * ROW_BYTES + chunk * CHUNK_BYTES;
#pragma unroll
    for (uint32_t panel = 0; panel * PANEL_CHUNKS < ROW_CHUNKS; panel++)
        if (panel * PANEL_CHUNKS + chunk < ROW_CHUNKS)
#pragma unroll
            for (uint32_t step = 0; step < TILE; step += STEP_ROWS)
                copy_16_async(smem + (panel * TILE + step) * PANEL_ROW_BYTES,
                              gmem + step * ROW_BYTES + panel * PANEL_ROW_BYTES, row + step < n_valid);
}

#endif /* KSORT_CUDA_PROMPT_SHARED_PANELS_CUH */
