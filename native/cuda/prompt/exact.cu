/* What exact rows add to a prompt's rows, before the packed tiles (prompt/launch.cu), which go on from it: sums and
 * softmax states in the workspace. Compiled once a head dimension.
 *
 * A CTA has 64 rows of a KV head (prompt/shared/row_blocks.cuh), a warp 16, and walks over the f16 tiles they see:
 *
 *     sinks (tile 0 of the exact rows), then tiles of the ring from the first row's tail to the last row's own slot
 *     - keys and values of a tile come by cp.async straight into panels
 *     - S = (two parts of Q) K^T in f16, softmax, out += P V as prompt/mma/kernel.cuh
 *
 * Several CTAs of a multiprocessor hide each other's waiting. Bytes moved, beside those of tiles (4 head_dim a slot,
 * once a CTA, from L2): 4 head_dim of queries in and 4 head_dim of sums out, a row. */
#include "prompt/shared/expand.cuh"
#include "prompt/shared/rows.cuh"

namespace {

constexpr uint32_t EXACT_ROWS = 64, EXACT_THREADS = 4 * WARP;

template <int HEAD_DIM>
struct exact_panels {
    static constexpr int tile_bytes = panel_bytes<HEAD_DIM>(TILE), bytes = 4 * tile_bytes;
    static constexpr int ctas_a_multiprocessor = HEAD_DIM <= 128 ? 3 : 1; /* as registers allow */
    uint8_t *smem;

    __device__ uint8_t *high() const { return smem; }
    __device__ uint8_t *low() const { return smem + tile_bytes; }
    __device__ uint8_t *keys() const { return smem + 2 * tile_bytes; }
    __device__ uint8_t *values() const { return smem + 3 * tile_bytes; }
};
static_assert(EXACT_ROWS == TILE, "queries take the panels of a tile");

/* A lane's two neighbouring channels of a row, times `inverse`, in two parts. */
__device__ inline void store_parts(uint8_t *high, uint8_t *low, float2 x, const query_scale &scale)
{
    const query_parts first = parts_of_query(x.x, scale), second = parts_of_query(x.y, scale);
    *(__half2 *)high = __halves2half2(first.high, second.high);
    *(__half2 *)low = __halves2half2(first.low, second.low);
}

/* The warp's 16 queries into panels; factors: what their scores are multiplied by, of -q where the scale is negative.
 * */
template <int HEAD_DIM>
__device__ void load_exact_queries(const attend_job &job, const row_block &block, const exact_panels<HEAD_DIM> &panels,
                                   float *factors_smem)
{
    constexpr uint32_t PAIRS = HEAD_DIM / 2, A_LANE = (PAIRS + WARP - 1) / WARP;
    const uint32_t lane = threadIdx.x % WARP, first_row = threadIdx.x / WARP * MMA_ROWS;
    for (uint32_t row = first_row; row < first_row + MMA_ROWS; row++) {
        const size_t at = prepared_row(job, block, min(block.begin + row, block.end - 1));
        const float2 *q = (const float2 *)(job.exact_queries + at * HEAD_DIM);
        float2 x[A_LANE];
        uint32_t largest = 0;
#pragma unroll
        for (uint32_t i = 0; i < A_LANE; i++) {
            x[i] = i * WARP + lane < PAIRS ? q[i * WARP + lane] : make_float2(0.0f, 0.0f);
            largest = max(largest, max(float_bits(x[i].x) & 0x7FFFFFFF, float_bits(x[i].y) & 0x7FFFFFFF));
        }
        const query_scale scale = query_scale_of(__reduce_max_sync(~0u, largest));
#pragma unroll
        for (uint32_t i = 0; i < A_LANE; i++) {
            const uint32_t pair = i * WARP + lane;
            const uint32_t place = chunk_offset(EXACT_ROWS, row, pair / 4) + pair % 4 * 4;
            if (pair < PAIRS)
                store_parts(panels.high() + place, panels.low() + place, x[i], scale);
        }
        if (lane == 0)
            factors_smem[row] = job.scale < 0.0f ? -scale.factor : scale.factor;
    }
}

/* A tile of f16 rows into panels, with zeros for tokens that are not begin .. end-1. */
template <int HEAD_DIM>
__device__ void fetch_exact(uint8_t *panels_smem, const uint8_t *tile_gmem, uint32_t begin, uint32_t end)
{
    constexpr uint32_t ROW_CHUNKS = HEAD_DIM / CHUNK_CHANNELS;
    for (uint32_t i = threadIdx.x; i < TILE * ROW_CHUNKS; i += EXACT_THREADS) {
        const uint32_t token = i / ROW_CHUNKS, chunk = i % ROW_CHUNKS;
        copy_16_async(panels_smem + chunk_offset(TILE, token, chunk), tile_gmem + i * CHUNK_BYTES,
                      token >= begin && token < end);
    }
}

/* The tiles that a block's rows see as exact: that of the sinks, and those of slots from tail_begin on. */
struct exact_walk {
    uint32_t n_sink_tiles, tail_begin, first_tail_tile, n_tiles;

    __device__ exact_walk(const attend_job &job, const row_block &block)
    {
        const slot_sections first = sections_of_token(job, block, slot_of_row(job, block, block.begin));
        const slot_sections last = sections_of_token(job, block, slot_of_row(job, block, block.end - 1));
        n_sink_tiles = first.first < job.k.exact.n_sinks ? 1 : 0;
        tail_begin = max(first.tail_begin, exact_begin(job.k.exact, block.context));
        first_tail_tile = tail_begin / TILE;
        const bool has_tail = job.k.exact.n_tail && tail_begin < last.end;
        n_tiles = n_sink_tiles + (has_tail ? (last.end + TILE - 1) / TILE - first_tail_tile : 0);
    }

    __device__ bool is_of_sinks(uint32_t i) const { return i < n_sink_tiles; }
    /* The slots' tile, of the context. */
    __device__ uint32_t tile(uint32_t i) const { return is_of_sinks(i) ? 0 : first_tail_tile + i - n_sink_tiles; }
};

template <int HEAD_DIM>
__device__ void fetch_tile(const attend_job &job, const row_block &block, const exact_walk &walk, uint32_t i,
                           const exact_panels<HEAD_DIM> &panels)
{
    const uint32_t tile = walk.tile(i), slot = tile * TILE;
    const uint32_t n_slots = walk.is_of_sinks(i) ? min(job.k.exact.n_sinks, block.n_slots) : block.n_slots;
    const uint32_t begin = walk.is_of_sinks(i) ? 0 : max(walk.tail_begin, slot) - slot;
    const uint32_t end = min(n_slots - slot, (uint32_t)TILE);
    auto source = [&](const device_cache &cache) -> const uint8_t * {
        if (cache.layout.type == KSORT_F16)
            return tile_at(cache.pages, block.context, tile, block.kv_head);
        return exact_tile_at(cache.exact, block.context, walk.is_of_sinks(i) ? 0 : ring_tile(cache.exact, tile),
                             block.kv_head);
    };
    fetch_exact<HEAD_DIM>(panels.keys(), source(job.k), begin, end);
    fetch_exact<HEAD_DIM>(panels.values(), source(job.v), begin, end);
}

template <int HEAD_DIM>
__device__ void save_rows(const lane_rows<HEAD_DIM> &rows, const attend_job &job, const row_block &block,
                          uint32_t first_row)
{
#pragma unroll
    for (int r = 0; r < ROWS_A_LANE; r++) {
        const float sum = quad_sum(rows.softmax[r].sum);
        const uint32_t row = block.begin + first_row + threadIdx.x % WARP / 4 + 8 * r;
        if (row >= block.end)
            continue;
        const size_t at = prepared_row(job, block, row);
        float2 *sums = (float2 *)(job.exact_sums + at * HEAD_DIM) + threadIdx.x % 4;
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n++)
            sums[4 * n] = make_float2(rows.out[n][2 * r], rows.out[n][2 * r + 1]);
        if (threadIdx.x % 4 == 0)
            job.exact_rows[at] = {rows.softmax[r].shift, sum};
    }
}

template <int HEAD_DIM>
__global__ void __launch_bounds__(EXACT_THREADS, exact_panels<HEAD_DIM>::ctas_a_multiprocessor)
    prompt_exact_kernel(const __grid_constant__ attend_job job)
{
    constexpr int PARTS = 2;
    extern __shared__ __align__(1024) uint8_t smem[];
    __shared__ float factors_smem[EXACT_ROWS];
    row_block block;
    if (!find_rows(job, {0, UINT32_MAX}, EXACT_ROWS, blockIdx.x, block))
        return;
    const exact_panels<HEAD_DIM> panels = {smem};
    const exact_walk walk(job, block);
    const float log2_scale = log2_scale_of(job);
    const uint32_t first_row = threadIdx.x / WARP * MMA_ROWS;
    lane_rows<HEAD_DIM> rows;
    rows.init(job);
    load_exact_queries<HEAD_DIM>(job, block, panels, factors_smem);
    __syncwarp();
    float factors[ROWS_A_LANE];
#pragma unroll
    for (int r = 0; r < ROWS_A_LANE; r++)
        factors[r] = factors_smem[first_row + threadIdx.x % WARP / 4 + 8 * r];
    for (uint32_t i = 0; i < walk.n_tiles; i++) {
        fetch_tile<HEAD_DIM>(job, block, walk, i, panels);
        wait_for_copies();
        publish_panels();
        __syncthreads();
        uint32_t p[PARTS][KEY_STEPS][4];
        const section section = walk.is_of_sinks(i) ? section::sinks : section::tail;
        rows.template weigh_tile<PARTS>(
            p, job, block, first_row, walk.tile(i), section, i == 0, log2_scale, [&](float (&scores)[TILE / 8][4]) {
                exact_key_product<HEAD_DIM>(scores, panels.high(), panels.low(), panels.keys());
#pragma unroll
                for (int n = 0; n < TILE / 8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        scores[n][e] *= factors[e / 2];
            });
        value_product<HEAD_DIM, PARTS>(rows.out, p, panels.values());
        __syncthreads(); /* the tile makes room */
    }
    save_rows<HEAD_DIM>(rows, job, block, first_row);
}

} // namespace

template <int HEAD_DIM>
cudaError_t launch_prompt_exact(const attend_job &job, cudaStream_t stream)
{
    constexpr int BYTES = exact_panels<HEAD_DIM>::bytes;
    cudaError_t error =
        cudaFuncSetAttribute(prompt_exact_kernel<HEAD_DIM>, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
    if (error != cudaSuccess)
        return error;
    prompt_exact_kernel<HEAD_DIM>
        <<<n_row_blocks(job, {0, UINT32_MAX}, EXACT_ROWS), EXACT_THREADS, BYTES, stream>>>(job);
    return cudaGetLastError();
}

template cudaError_t launch_prompt_exact<KSORT_HEAD_DIM>(const attend_job &, cudaStream_t);
