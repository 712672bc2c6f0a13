/* Queries whose keys have no transform: a lane holds a chunk of channels of up to QUERY_ROWS rows, which are query
 * heads of one KV head and token: they share partners, cos and sin, and are loaded together.
 *
 *     q --cp.async--> rows in shared memory --> chunks and partners --RoPE, maxima, rounding--> 8- and 16-byte stores
 */
#ifndef KSORT_PREPARE_NEAREST_CUH
#define KSORT_PREPARE_NEAREST_CUH

#include "dependent_launch.cuh"
#include "pack_chunks.cuh"
#include "phases.cuh"

constexpr int QUERY_ROWS = 4;
constexpr int QUERY_THREADS = 256; /* of a thread block */

/* Whether rows don't fill a device with more than one row a warp or team. */
inline bool has_few_rows(const attend_job &job)
{
    return (uint64_t)job.tokens.n_tokens * job.n_heads * job.tokens.n_sequences < 8192;
}

/* Where the rows of a team, the lanes of a head, are. */
struct query_place {
    uint32_t kv_head, position, n_rows;
    size_t first_q;   /* element of q */
    size_t first_row; /* of the prepared */
    bool is_new;
    bool has_position; /* in the RoPE tables */
};

/* rows_a_team: at most QUERY_ROWS. A KV head's query heads fill one team or more; the last may have fewer rows. */
template <int HEAD_DIM>
__device__ inline query_place place_of_team(const attend_job &job, uint32_t rows_a_team)
{
    const uint32_t n_kv_heads = job.n_heads / job.group, teams_a_group = (job.group + rows_a_team - 1) / rows_a_team;
    const uint32_t team = (blockIdx.x * QUERY_THREADS + threadIdx.x) / CHUNK_LANES<HEAD_DIM>;
    const uint32_t token = team / (teams_a_group * n_kv_heads), of_token = team % (teams_a_group * n_kv_heads);
    const uint32_t first_of_group = of_token % teams_a_group * rows_a_team, sequence = blockIdx.y;
    query_place place;
    place.kv_head = of_token / teams_a_group;
    place.position = (uint32_t)job.tokens.n_cached[sequence] + token;
    place.n_rows = min(rows_a_team, job.group - first_of_group);
    place.is_new = token < n_new_of(job.tokens, sequence);
    place.has_position = !job.rope.partner || place.position < job.tokens.n_positions;
    const uint32_t head = place.kv_head * job.group + first_of_group;
    place.first_q = sequence * job.q_sequence_stride + token * job.q_token_stride + (size_t)head * HEAD_DIM;
    place.first_row = ((size_t)sequence * job.tokens.n_tokens + token) * job.n_heads + head;
    if (token >= job.tokens.n_tokens)
        place.n_rows = 0;
    return place;
}

/* RoPE of a chunk's channels. One that is not turned has itself for a partner, and the angle of `no_turn`. */
struct chunk_turns {
    uint32_t partner[CHUNK];   /* bytes from the start of the head's row in shared memory */
    uint32_t frequency[CHUNK];
    uint32_t sign[CHUNK];      /* of the partner: a float's sign bit */
};

/* at: of the chunk's first channel `channel` in tables [n_kv_heads][head_dim]. */
__device__ inline void load_turns_of_chunk(const ksort_rope &rope, size_t at, uint32_t channel, uint32_t element_bytes,
                                           uint32_t no_turn, struct chunk_turns &turns)
{
#pragma unroll
    for (int j = 0; j < CHUNK; j++) {
        const int sign = rope.sign[at + j];
        const uint32_t partner = rope.partner[at + j], frequency = rope.frequency[at + j];
        turns.partner[j] = (sign ? partner : channel + j) * element_bytes;
        turns.frequency[j] = sign ? frequency : no_turn;
        turns.sign[j] = sign < 0 ? 1u << 31 : 0;
    }
}

/* cos, and sin with the partner's sign, of a chunk at one position. */
struct chunk_angles {
    float2 angles[CHUNK];
};

__device__ inline void load_angles_of_chunk(const ksort_rope &rope, uint32_t position, const chunk_turns &turns,
                                            chunk_angles &at)
{
    const float *cosines = rope.cos + (size_t)position * rope.n_frequencies;
    const float *sines = rope.sin + (size_t)position * rope.n_frequencies;
#pragma unroll
    for (int j = 0; j < CHUNK; j++) {
        const bool turned = turns.frequency[j] < rope.n_frequencies;
        at.angles[j].x = turned ? cosines[turns.frequency[j]] : 1.0f;
        at.angles[j].y = turned ? bits_float(float_bits(sines[turns.frequency[j]]) ^ turns.sign[j]) : 0.0f;
    }
}

/* Mantissas times their step in bf16, which holds them exactly, subnormal steps too. */
__device__ inline void store_values(__nv_bfloat16 *values, uint32_t exponent, const uint32_t (&m)[CHUNK])
{
    const __nv_bfloat162 unit = __float2bfloat162_rn(__fmul_rn(0x1p-6f, exponent_scale((uint8_t)exponent)));
    uint32_t pairs[CHUNK / 2];
#pragma unroll
    for (int i = 0; i < CHUNK / 2; i++) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(mantissa_of(m[2 * i]), mantissa_of(m[2 * i + 1]));
        const __nv_bfloat162 value = __hmul2(pair, unit);
        memcpy(&pairs[i], &value, sizeof value);
    }
    *reinterpret_cast<uint4 *>(values) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

/* All lanes of the head; mantissas past its end are zeros. */
template <int HEAD_DIM>
__device__ inline void store_mantissas(const attend_job &job, size_t row, bool is_stored, uint32_t exponent,
                                       const uint32_t (&m)[CHUNK])
{
    constexpr uint32_t LANES = CHUNK_LANES<HEAD_DIM>;
    const uint32_t lane = lane_of_thread(), chunk = lane % LANES, lanes_a_block = job.k.layout.block_size / CHUNK;
    if (is_stored && chunk * CHUNK < job.query_stride)
        reinterpret_cast<uint2 *>(job.mantissas + row * job.query_stride)[chunk] =
            make_uint2(quad_of(m[0], m[1], m[2], m[3]), quad_of(m[4], m[5], m[6], m[7]));
#pragma unroll
    for (uint32_t first = 0; first < MAX_BLOCKS; first += LANES) {
        const uint32_t block = first + chunk;
        const bool exists = block < job.k.layout.n_blocks;
        const uint32_t first_lane = lane - chunk + (exists ? block * lanes_a_block : 0);
        const uint32_t of_block = __shfl_sync(ALL_LANES, exponent, first_lane);
        if (is_stored && block < MAX_BLOCKS)
            job.exponents[row * MAX_BLOCKS + block] = exists ? (uint8_t)of_block : 0;
    }
}

/* Rounds a row's chunk to BFP16 in blocks of the keys' size, and stores it; zeros where it is refused. */
template <int HEAD_DIM>
__device__ inline void store_query_chunk(const attend_job &job, size_t row, uint32_t magnitude, bool is_refused,
                                         bool is_stored, float (&y)[CHUNK])
{
    constexpr uint32_t MANTISSA_BITS = 8;
    constexpr int32_t LARGEST = 127;
    const uint32_t chunk = lane_of_thread() % CHUNK_LANES<HEAD_DIM>;
    const uint32_t block_magnitude = largest_of_block(magnitude, job.k.layout.block_size / CHUNK);
    const uint32_t exponent = is_refused ? 0 : block_magnitude >> 23;
    uint32_t m[CHUNK];
    round_chunk(exponent, MANTISSA_BITS, is_refused ? 0 : LARGEST, y, m);
    if (!job.values)
        store_mantissas<HEAD_DIM>(job, row, is_stored, exponent, m);
    else if (is_stored && chunk * CHUNK < HEAD_DIM)
        store_values(job.values + row * HEAD_DIM + chunk * CHUNK, exponent, m);
}

/* Grid: x = (token, KV head, rows_a_team of its query heads) in teams, y = sequence. */
template <int HEAD_DIM, uint32_t X_TYPE>
__global__ void __launch_bounds__(QUERY_THREADS)
    prepare_nearest_kernel(const __grid_constant__ attend_job job, uint32_t rows_a_team)
{
    let_dependent_begin(); /* decode asks for its first tiles meanwhile */
    constexpr uint32_t LANES = CHUNK_LANES<HEAD_DIM>, STRIDE = ROW_STRIDE<HEAD_DIM, X_TYPE>;
    __shared__ uint4 rows_of_teams[QUERY_THREADS / LANES * QUERY_ROWS * STRIDE / 16];
    uint8_t *rows = reinterpret_cast<uint8_t *>(rows_of_teams) + threadIdx.x / LANES * QUERY_ROWS * STRIDE;
    const uint32_t chunk = threadIdx.x % LANES;
    const bool in_head = chunk * CHUNK < HEAD_DIM;
    const query_place place = place_of_team<HEAD_DIM>(job, rows_a_team);
#pragma unroll
    for (int r = 0; r < QUERY_ROWS; r++) /* of tokens that are not new as well: without waiting for n_new */
        if (in_head && r < place.n_rows)
            request_chunk<X_TYPE>(job.q, place.first_q + (size_t)r * HEAD_DIM, chunk, rows + r * STRIDE);
    __pipeline_commit();
    chunk_turns turns;
    chunk_angles at;
    if (job.rope.partner && in_head && place.n_rows > 0) {
        load_turns_of_chunk(job.rope, (size_t)place.kv_head * HEAD_DIM + chunk * CHUNK, chunk * CHUNK,
                            ELEMENT_BYTES<X_TYPE>, job.rope.n_frequencies, turns);
        if (place.has_position)
            load_angles_of_chunk(job.rope, place.position, turns, at);
    }
    __pipeline_wait_prior(0);
    __syncwarp(); /* the other lanes have their chunks */
#pragma unroll
    for (int r = 0; r < QUERY_ROWS; r++) {
        if (r >= rows_a_team)
            break;
        float y[CHUNK] = {};
        if (in_head && r < place.n_rows) {
            load_chunk<X_TYPE>(rows + r * STRIDE, chunk, y);
            if (job.rope.partner)
                rope_chunk<X_TYPE>(
                    rows + r * STRIDE, [&](int j) { return turns.partner[j]; }, [&](int j) { return at.angles[j]; }, y);
        }
        const bool is_stored = place.is_new && r < place.n_rows;
        const uint32_t magnitude = magnitude_of_chunk(y);
        const uint32_t non_finite = __ballot_sync(ALL_LANES, magnitude >= FLOAT_MAGNITUDE_INF);
        const bool is_refused = !place.has_position || non_finite & lanes_of_head<HEAD_DIM>();
        if (is_refused && is_stored && chunk == 0)
            tell(job.tokens, place.has_position ? KSORT_ERR_NON_FINITE : KSORT_ERR_ROPE);
        store_query_chunk<HEAD_DIM>(job, place.first_row + r, magnitude, is_refused, is_stored, y);
    }
}

template <int HEAD_DIM>
cudaError_t launch_prepare_nearest(const attend_job &job, cudaStream_t stream)
{
    const uint32_t rows_a_team = has_few_rows(job) ? 1 : job.group < QUERY_ROWS ? job.group : QUERY_ROWS;
    const uint64_t teams =
        (uint64_t)job.tokens.n_tokens * (job.n_heads / job.group) * ((job.group + rows_a_team - 1) / rows_a_team);
    const uint64_t blocks = (teams * CHUNK_LANES<HEAD_DIM> + QUERY_THREADS - 1) / QUERY_THREADS;
    if (blocks > INT32_MAX / QUERY_THREADS)
        return cudaErrorInvalidConfiguration;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((uint32_t)blocks, job.tokens.n_sequences);
    config.blockDim = dim3(QUERY_THREADS);
    config.stream = stream;
    if (job.x_type == KSORT_F16)
        return cudaLaunchKernelEx(&config, prepare_nearest_kernel<HEAD_DIM, KSORT_F16>, job, rows_a_team);
    if (job.x_type == KSORT_BF16)
        return cudaLaunchKernelEx(&config, prepare_nearest_kernel<HEAD_DIM, KSORT_BF16>, job, rows_a_team);
    return cudaLaunchKernelEx(&config, prepare_nearest_kernel<HEAD_DIM, KSORT_F32>, job, rows_a_team);
}

#endif /* KSORT_PREPARE_NEAREST_CUH */
