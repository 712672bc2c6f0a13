/* What exact rows add to a prompt's rows, before the packed tiles (prompt/launch.cu), which go on from it: sums and
 * softmax states in the workspace. Compiled once a head dimension.
 *
 * A CTA has 64 rows of a KV head (prompt/shared/row_blocks.cuh), a warp 16. The slots that any of them sees as exact
 * make a list, which it walks over in tiles of 64:
 *
 *     list    | sinks | tail of the first row ... own slot of the last row |      4 and 143 of 16 tokens: 3 tiles
 *     - keys and values of a tile come by cp.async, row by row, into panels; each while the other's product runs
 *     - S = (two parts of Q) K^T in f16, softmax, out += P V as prompt/mma/kernel.cuh; P in the parts that packed
 *       tiles have for such rows
 *
 * Several CTAs of a multiprocessor hide each other's waiting. Bytes moved, beside those of tiles (4 head_dim a slot,
 * once a CTA, from L2): 4 head_dim of queries in and 4 head_dim of sums out, a row: in the same place. */
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

template <int HEAD_DIM>
constexpr uint32_t PAIRS_A_LANE = (HEAD_DIM / 2 + WARP - 1) / WARP;

/* A row's channels, pairs WARP * i + lane, into panels, and what its scores are multiplied by: of -q where the scale is
 * negative. */
template <int HEAD_DIM>
__device__ void store_query(const exact_panels<HEAD_DIM> &panels, uint32_t row,
                            const float2 (&x)[PAIRS_A_LANE<HEAD_DIM>], float *factors_smem, bool is_negative)
{
    const uint32_t lane = threadIdx.x % WARP;
    uint32_t largest = 0;
#pragma unroll
    for (uint32_t i = 0; i < PAIRS_A_LANE<HEAD_DIM>; i++)
        largest = max(largest, max(float_bits(x[i].x) & 0x7FFFFFFF, float_bits(x[i].y) & 0x7FFFFFFF));
    const query_scale scale = query_scale_of(__reduce_max_sync(~0u, largest));
#pragma unroll
    for (uint32_t i = 0; i < PAIRS_A_LANE<HEAD_DIM>; i++) {
        const uint32_t pair = i * WARP + lane;
        const uint32_t place = chunk_offset(EXACT_ROWS, row, pair / 4) + pair % 4 * 4;
        if (pair < HEAD_DIM / 2)
            store_parts(panels.high() + place, panels.low() + place, x[i], scale);
    }
    if (lane == 0)
        factors_smem[row] = is_negative ? -scale.factor : scale.factor;
}

/* The warp's 16 queries. */
template <int HEAD_DIM>
__device__ void load_exact_queries(const attend_job &job, const row_block &block, const exact_panels<HEAD_DIM> &panels,
                                   float *factors_smem)
{
    constexpr uint32_t PAIRS = HEAD_DIM / 2, A_LANE = PAIRS_A_LANE<HEAD_DIM>;
    constexpr uint32_t BATCH = HEAD_DIM <= 128 ? 8 : 4; /* rows that are under way together */
    const uint32_t lane = threadIdx.x % WARP, first_row = threadIdx.x / WARP * MMA_ROWS;
#pragma unroll 1
    for (uint32_t batch = first_row; batch < first_row + MMA_ROWS; batch += BATCH) {
        float2 x[BATCH][A_LANE];
#pragma unroll
        for (uint32_t r = 0; r < BATCH; r++) {
            const size_t at = prepared_row(job, block, min(block.begin + batch + r, block.end - 1));
            const float2 *q = (const float2 *)(job.exact_queries + at * HEAD_DIM);
#pragma unroll
            for (uint32_t i = 0; i < A_LANE; i++)
                x[r][i] = i * WARP + lane < PAIRS ? __ldcg(q + i * WARP + lane) : make_float2(0.0f, 0.0f);
        }
#pragma unroll
        for (uint32_t r = 0; r < BATCH; r++)
            store_query<HEAD_DIM>(panels, batch + r, x[r], factors_smem, job.scale < 0.0f);
    }
}

/* The list of slots that a block's rows see as exact: sinks 0 .. n_sinks-1, then the tail from slot tail_begin on. */
struct exact_walk {
    uint32_t n_sinks, tail_begin, n_listed, n_tiles;
    int whole_begin, whole_end; /* places that all rows see */
    bool is_coarse;             /* weights in one part do (prompt/shared/softmax.cuh) */

    __device__ exact_walk(const attend_job &job, const row_block &block)
    {
        const slot_sections first = sections_of_token(job, block, slot_of_row(job, block, block.begin));
        const slot_sections last = sections_of_token(job, block, slot_of_row(job, block, block.end - 1));
        n_sinks = first.first < job.k.exact.n_sinks ? min(job.k.exact.n_sinks, last.end) : 0;
        tail_begin = max(max(first.tail_begin, exact_begin(job.k.exact, block.context)), n_sinks);
        n_listed = n_sinks + (job.k.exact.n_tail && tail_begin < last.end ? last.end - tail_begin : 0);
        n_tiles = (n_listed + TILE - 1) / TILE;
        whole_begin = max(place(last.tail_begin), (int)n_sinks);
        whole_end = place(first.end);
        is_coarse = job.x_type != KSORT_F32 && first.end - first.first > SHORT_SLOTS;
    }

    /* Of a slot of the tail. */
    __device__ int place(uint32_t slot) const { return (int)slot - (int)tail_begin + (int)n_sinks; }
};

/* Rows of tile i of the list into panels, of keys or of values, with zeros beyond its end. */
template <int HEAD_DIM>
__device__ void fetch_listed(uint8_t *panels_smem, const attend_job &job, const device_cache &cache,
                             const row_block &block, const exact_walk &walk, uint32_t i)
{
    constexpr uint32_t ROW_CHUNKS = HEAD_DIM / CHUNK_CHANNELS;
    auto tile_of = [&](uint32_t tile, bool is_of_sinks) -> const uint8_t * {
        if (cache.layout.type == KSORT_F16)
            return tile_at(cache.pages, block.context, tile, block.kv_head);
        return exact_tile_at(cache.exact, block.context, is_of_sinks ? 0 : ring_tile(cache.exact, tile), block.kv_head);
    };
    const bool has_tail = walk.n_sinks < walk.n_listed;
    const uint32_t first_place = max(i * TILE, walk.n_sinks); /* of the tail */
    const uint32_t first_tile = (walk.tail_begin + first_place - walk.n_sinks) / TILE;
    const uint32_t last_tile = (walk.tail_begin + walk.n_listed - walk.n_sinks - 1) / TILE;
    const uint8_t *sinks = walk.n_sinks ? tile_of(0, true) : nullptr;
    const uint8_t *first = has_tail ? tile_of(min(first_tile, last_tile), false) : sinks;
    const uint8_t *second = has_tail ? tile_of(min(first_tile + 1, last_tile), false) : sinks;
    for (uint32_t at = threadIdx.x; at < TILE * ROW_CHUNKS; at += EXACT_THREADS) {
        const uint32_t token = at / ROW_CHUNKS, chunk = at % ROW_CHUNKS, place = i * TILE + token;
        const bool is_of_sinks = place < walk.n_sinks;
        const uint32_t slot = is_of_sinks ? place : walk.tail_begin + place - walk.n_sinks;
        const uint8_t *tile_gmem = is_of_sinks ? sinks : slot / TILE == first_tile ? first : second;
        copy_16_async(panels_smem + chunk_offset(TILE, token, chunk),
                      tile_gmem + (slot % TILE * ROW_CHUNKS + chunk) * CHUNK_BYTES, place < walk.n_listed);
    }
    group_copies();
}

/* Scores of tile i of the list that a row does not see. */
__device__ void mask_listed(float (&scores)[TILE / 8][4], const attend_job &job, const row_block &block,
                            uint32_t first_row, const exact_walk &walk, uint32_t i)
{
    const int begin = (int)i * TILE, column = threadIdx.x % 4 * 2;
    if (begin >= walk.whole_begin && begin + TILE <= walk.whole_end)
        return;
#pragma unroll
    for (int r = 0; r < ROWS_A_LANE; r++) {
        const uint32_t row = block.begin + first_row + threadIdx.x % WARP / 4 + 8 * r;
        const slot_sections slots = sections_of_token(job, block, slot_of_row(job, block, min(row, block.end - 1)));
        const int sinks = (int)slots.first - begin, sinks_end = (int)slots.sinks_end - begin;
        const int tail = max(walk.place(slots.tail_begin), (int)walk.n_sinks) - begin;
        const int tail_end = walk.place(slots.end) - begin;
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
#pragma unroll
            for (int e = 2 * r; e < 2 * r + 2; e++) {
                const int place = 8 * n + column + e % 2;
                const bool is_sink = begin + place < (int)walk.n_sinks;
                if (is_sink ? place < sinks || place >= sinks_end : place < tail || place >= tail_end)
                    scores[n][e] = -INFINITY;
            }
    }
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
        float2 *sums = (float2 *)(job.exact_queries + at * HEAD_DIM) + threadIdx.x % 4;
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n++)
            sums[4 * n] = make_float2(rows.out[n][2 * r], rows.out[n][2 * r + 1]);
        if (threadIdx.x % 4 == 0)
            job.exact_rows[at] = {rows.softmax[r].shift, sum};
    }
}

/* The list's tiles. Keys and values of the first have been asked for. */
template <int HEAD_DIM, int PARTS>
__device__ void add_listed(lane_rows<HEAD_DIM> &rows, const attend_job &job, const row_block &block,
                           const exact_walk &walk, const exact_panels<HEAD_DIM> &panels,
                           const float (&factors)[ROWS_A_LANE])
{
    const float log2_scale = log2_scale_of(job);
    const uint32_t first_row = threadIdx.x / WARP * MMA_ROWS;
    for (uint32_t i = 0; i < walk.n_tiles; i++) {
        uint32_t p[PARTS][KEY_STEPS][4];
        wait_for_copies<1>(); /* values may still come */
        publish_panels();
        __syncthreads();
        rows.template weigh_tile<PARTS>(p, i == 0, log2_scale, [&](float (&scores)[TILE / 8][4]) {
            exact_key_product<HEAD_DIM>(scores, panels.high(), panels.low(), panels.keys());
#pragma unroll
            for (int n = 0; n < TILE / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    scores[n][e] *= factors[e / 2];
            mask_listed(scores, job, block, first_row, walk, i);
        });
        wait_for_copies<0>();
        publish_panels();
        __syncthreads(); /* keys make room */
        if (i + 1 < walk.n_tiles)
            fetch_listed<HEAD_DIM>(panels.keys(), job, job.k, block, walk, i + 1);
        value_product<HEAD_DIM, PARTS>(rows.out, p, panels.values());
        __syncthreads(); /* values make room */
        if (i + 1 < walk.n_tiles)
            fetch_listed<HEAD_DIM>(panels.values(), job, job.v, block, walk, i + 1);
    }
}

template <int HEAD_DIM>
__global__ void __launch_bounds__(EXACT_THREADS, exact_panels<HEAD_DIM>::ctas_a_multiprocessor)
    prompt_exact_kernel(const __grid_constant__ attend_job job)
{
    extern __shared__ __align__(1024) uint8_t smem[];
    __shared__ float factors_smem[EXACT_ROWS];
    row_block block;
    if (!find_rows(job, {0, UINT32_MAX}, EXACT_ROWS, blockIdx.x, block))
        return;
    const exact_panels<HEAD_DIM> panels = {smem};
    const exact_walk walk(job, block);
    if (walk.n_tiles > 0) {
        fetch_listed<HEAD_DIM>(panels.keys(), job, job.k, block, walk, 0);
        fetch_listed<HEAD_DIM>(panels.values(), job, job.v, block, walk, 0);
    }
    const uint32_t first_row = threadIdx.x / WARP * MMA_ROWS;
    load_exact_queries<HEAD_DIM>(job, block, panels, factors_smem);
    __syncthreads(); /* sums come into the place of queries, of which the last row's are read for rows beyond */
    float factors[ROWS_A_LANE];
#pragma unroll
    for (int r = 0; r < ROWS_A_LANE; r++)
        factors[r] = factors_smem[first_row + threadIdx.x % WARP / 4 + 8 * r];
    lane_rows<HEAD_DIM> rows;
    rows.init(job);
    if (walk.is_coarse)
        add_listed<HEAD_DIM, 1>(rows, job, block, walk, panels, factors);
    else
        add_listed<HEAD_DIM, 2>(rows, job, block, walk, panels, factors);
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
