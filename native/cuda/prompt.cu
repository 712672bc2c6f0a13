/* Prompt attention: several query tokens a sequence, on tensor cores, straight from packed tiles.
 *
 * The queries of a KV head are rows, token-major: row r is token r / group, head r % group of the group, so that the
 * heads of a group share every expanded tile. A CTA has ROWS of them, a warp 16. It walks over the tiles they see:
 *
 *                        tiles of 64 slots -->                       job of one CTA: its rows, all its tiles
 *     rows 0 ..     |0 0                      |                      - packed K and V of a tile come by cp.async,
 *     rows ROWS ..  |1 1 1 1                  |  (causal: later        two tiles ahead
 *     rows 2 ROWS ..|2 2 2 2 2 2              |  rows see more;      - all threads expand them to bf16 K and f16 V in
 *     ...           |3 3 3 3 3 3 3 3          |  they start first)     shared memory, one tile ahead
 *                                                                    - each warp: S = Q K^T, softmax, out += P V
 *
 * One half of the warps expands the next tile before its products, the other half after: so tensor cores and ALUs are
 * both busy. A head of 256 channels has room for one expanded tile only, and does one after the other.
 *
 * Heads of up to 128 channels on sm_90a are prompt_wgmma.cuh's.
 *
 * P is split in two f16 parts (22 bits), which makes 3 products of 2 and costs some 105 us of 385 on an H100 (4096
 * tokens, 32 heads on 8). For outputs of 16 bits one part (11 bits) does where a row sees more than SHORT_SLOTS slots,
 * as its errors cancel. Such long rows and short ones are two launches: both ways in one kernel would cost all rows
 * some 10%, for want of registers.
 *
 * Bytes that must move: packed K and V of what is seen, once a CTA (from L2: the CTAs of a KV head run side by side),
 * queries in bf16 and out once. Work: 4 * head_dim flops (f32 outputs: 6) for each pair of a row and a slot, far above
 * what bytes cost.
 */
#include "prompt_rows.cuh"
#include "prompt_wgmma.cuh"

/* Rows that see at most so many slots are short. What errors of 11-bit weights reach, as a share of the bound of the
 * CPU library's tests (tests/native_support.py), 64 and 128 channels, the largest of random problems:
 *
 *     slots seen                          up to 31    63    127    255    511    1023    1600
 *     weight on many slots                      15   1.8    1.0    0.9    0.5     0.2     0.1
 *     on two, with values of +1 and -1         1.1   0.9    1.0    0.8    1.2     0.8     0.4
 */
constexpr uint32_t SHORT_SLOTS = 512;

/* One tile, expanded: scores, softmax, weighted values. */
template <int HEAD_DIM, int PARTS>
__device__ inline void add_tile(lane_rows<HEAD_DIM> &rows, const uint32_t (&q)[HEAD_DIM / 16][4],
                                const tile_pipeline<HEAD_DIM> &tiles, uint32_t tile, int top, float log2_scale)
{
    uint32_t p[PARTS][KEY_STEPS][4];
    rows.template weigh_tile<PARTS>(
        p, tiles.job, tiles.block, threadIdx.x / WARP * MMA_ROWS, tile, log2_scale,
        [&](float(&scores)[TILE / 8][4]) { key_product<HEAD_DIM>(scores, q, tiles.keys(tile)); });
    rows.raise_top(top);
    value_product<HEAD_DIM, PARTS>(rows.out, p, tiles.values(tile));
}

/* Queries as left operands; of -q where the scale is negative, so that scores are multiplied by |scale|. */
template <int HEAD_DIM>
__device__ inline void load_signed_queries(uint32_t (&q)[HEAD_DIM / 16][4], const tile_pipeline<HEAD_DIM> &tiles)
{
    load_queries<HEAD_DIM>(q, tiles.queries(), prompt_shape<HEAD_DIM>::rows, threadIdx.x / WARP * MMA_ROWS);
    uint32_t signs = tiles.job.scale < 0.0f ? 0x80008000 : 0;
    for (int k = 0; k < HEAD_DIM / 16; k++)
        for (int i = 0; i < 4; i++)
            q[k][i] ^= signs;
}

template <int HEAD_DIM, int PARTS>
__global__ void __launch_bounds__(prompt_shape<HEAD_DIM>::threads, prompt_shape<HEAD_DIM>::ctas_a_multiprocessor)
    prompt_kernel(const __grid_constant__ attend_job job, slot_range range)
{
    typedef prompt_shape<HEAD_DIM> shape;
    static_assert(shape::warps * staged_row_bytes<HEAD_DIM> <= shape::expanded_bytes, "out rows fit in that of tiles");
    extern __shared__ __align__(1024) uint8_t smem[];
    row_block block;
    if (!find_rows(job, range, shape::rows, blockIdx.x, block))
        return;
    tile_pipeline<HEAD_DIM> tiles = {job, block, smem, stages_values<HEAD_DIM>(job.v.layout)};
    lane_rows<HEAD_DIM> rows;
    uint32_t warp = threadIdx.x / WARP;
    rows.init(job);
    float log2_scale = log2_scale_of(job);
    uint32_t q[HEAD_DIM / 16][4];

    tiles.fetch_queries();
    tiles.fetch(block.first_tile, block.first_tile);
    wait_for_copies();
    __syncthreads();
    if (shape::queries_stay) {
        load_signed_queries<HEAD_DIM>(q, tiles);
        __syncthreads();
    }
    if (shape::n_buffers == 2)
        tiles.fetch(block.first_tile + 1, block.end_tile);
    int top = tiles.expand(block.first_tile, rows.top);
    wait_for_copies();
    publish_panels();
    __syncthreads();

    bool expands_first = shape::n_buffers == 2 && threadIdx.x < shape::threads / 2;
    for (uint32_t tile = block.first_tile; tile < block.end_tile; tile++) {
        int next_top = top;
        tiles.fetch(tile + shape::n_buffers, tile + 1);
        if (expands_first)
            next_top = tiles.expand(tile + 1, top);
        if (!shape::queries_stay)
            load_signed_queries<HEAD_DIM>(q, tiles);
        add_tile<HEAD_DIM, PARTS>(rows, q, tiles, tile, top, log2_scale);
        if (shape::n_buffers == 1) {
            wait_for_copies();
            __syncthreads(); /* the stage is complete, and everyone has done with the expanded tile */
        }
        if (!expands_first)
            next_top = tiles.expand(tile + 1, top);
        top = next_top;
        wait_for_copies();
        publish_panels();
        __syncthreads();
    }
    store_rows<HEAD_DIM>(rows, job, block, warp * MMA_ROWS, (float *)(smem + warp * staged_row_bytes<HEAD_DIM>));
}

template <int HEAD_DIM>
static uint32_t prompt_smem_bytes(const attend_job &job)
{
    typedef prompt_shape<HEAD_DIM> shape;
    return shape::expanded_bytes + shape::n_buffers * stage_bytes<HEAD_DIM>(job);
}

/* Allows a kernel the shared memory that a job takes. */
template <int HEAD_DIM, int PARTS>
static cudaError_t allow_smem(const attend_job &job, bool has_wgmma)
{
    if constexpr (HEAD_DIM <= 128)
        if (has_wgmma)
            return cudaFuncSetAttribute(prompt_wgmma_kernel<HEAD_DIM, PARTS>,
                                        cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        (int)wgmma_smem_bytes<HEAD_DIM>(job));
    return cudaFuncSetAttribute(prompt_kernel<HEAD_DIM, PARTS>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                (int)prompt_smem_bytes<HEAD_DIM>(job));
}

/* is_second: the launch before it has other rows of the same prompt. */
template <int HEAD_DIM, int PARTS>
static cudaError_t launch_rows(const attend_job &job, slot_range range, bool is_second, bool has_wgmma,
                               cudaStream_t stream)
{
    typedef prompt_shape<HEAD_DIM> shape;
    if constexpr (HEAD_DIM <= 128)
        if (has_wgmma)
            return launch_prompt_wgmma<HEAD_DIM, PARTS>(job, range, is_second, stream);
    prompt_kernel<HEAD_DIM, PARTS><<<n_row_blocks(job, range, shape::rows), shape::threads,
                                     prompt_smem_bytes<HEAD_DIM>(job), stream>>>(job, range);
    return cudaGetLastError();
}

/* Whether no row sees more than SHORT_SLOTS slots. */
static bool has_short_rows_only(const attend_job &job)
{
    return job.max_slots <= SHORT_SLOTS || (job.window && job.window <= SHORT_SLOTS);
}

template <int HEAD_DIM>
static cudaError_t launch_prompt_of(const attend_job &job, cudaStream_t stream)
{
    bool has_wgmma = false;
    cudaError_t error = cudaSuccess;
    if constexpr (HEAD_DIM <= 128)
        error = find_wgmma<HEAD_DIM>(has_wgmma);
    if (error == cudaSuccess)
        error = allow_smem<HEAD_DIM, 2>(job, has_wgmma);
    if (error != cudaSuccess)
        return error;
    if (job.x_type == KSORT_F32 || has_short_rows_only(job))
        return launch_rows<HEAD_DIM, 2>(job, {0, UINT32_MAX}, false, has_wgmma, stream);
    error = allow_smem<HEAD_DIM, 1>(job, has_wgmma); /* what CUDA refuses here writes nothing */
    if (error == cudaSuccess)
        error = launch_rows<HEAD_DIM, 1>(job, {SHORT_SLOTS, UINT32_MAX}, false, has_wgmma, stream);
    if (error == cudaSuccess)
        error = launch_rows<HEAD_DIM, 2>(job, {0, SHORT_SLOTS}, true, has_wgmma, stream);
    return error;
}

cudaError_t launch_prompt(const attend_job &job, cudaStream_t stream)
{
    switch (job.k.layout.head_dim) {
    case 64:
        return launch_prompt_of<64>(job, stream);
    case 80:
        return launch_prompt_of<80>(job, stream);
    case 96:
        return launch_prompt_of<96>(job, stream);
    case 128:
        return launch_prompt_of<128>(job, stream);
    case 256:
        return launch_prompt_of<256>(job, stream);
    }
    return cudaErrorInvalidValue;
}
