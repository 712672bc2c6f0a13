/* Queries whose keys have no transform. A lane holds a chunk of channels of a query head; a thread block takes
 * neighbouring heads, one token after another, so that partners, frequencies and signs are loaded once. A row is on its
 * way while the one before it is turned and rounded.
 *
 *     thread    0 .. L-1 | L .. 2L-1 | ...     L = CHUNK_LANES: 8, 16 or 32 lanes a head, 8 channels each
 *     head      0        | 1         | ...     grid:  x = tokens   y = heads   z = context
 *
 *     cos, sin of the block's positions --> rope table in shared memory [token][frequency]
 *     q --16-byte loads--> chunks --> shared memory, for partners
 *                             |--RoPE, maxima, rounding--> 8- and 16-byte stores
 *
 * Bytes moved, a row: head_dim times 2 or 4 in, head_dim + 16 out; for a prompt 2 head_dim. Rows of cos and sin,
 * 4 head_dim, once a token and thread block.
 *
 * Two heads of 128 channels, a warp's work, are about 180 instructions and 40 cycles of shared memory, or 90 where an
 * order of channels of their own makes lanes meet in banks. Memory takes 100 cycles: H100, 2.5 TB/s.
 */
#ifndef KSORT_CUDA_QUERY_NEAREST_CUH
#define KSORT_CUDA_QUERY_NEAREST_CUH

#include "common/check.cuh"
#include "common/dependent_launch.cuh"
#include "common/phases.cuh"
#include "common/shared_loads.cuh"

constexpr uint32_t QUERY_THREADS = 256; /* of a thread block, at most; so are tokens */
constexpr uint32_t QUERY_TOKENS = 16;
constexpr int RESIDENT_QUERIES = 4; /* thread blocks of a multiprocessor, as registers allow */

/* Heads and tokens of a thread block. */
struct query_block {
    uint32_t heads, tokens;
};

/* Frequencies of the RoPE tables, at most. */
template <int HEAD_DIM>
constexpr uint32_t QUERY_FREQUENCIES = HEAD_DIM / 2;

/* Where cos and sin of a frequency are among a token's. In a model's own order of channels, lanes' frequencies are 4 or
 * 8 apart: a place left free after every fourth makes that 5 or 10, which are different banks for 16 lanes, or 8. */
__host__ __device__ constexpr uint32_t rope_place(uint32_t frequency)
{
    return frequency + frequency / 4;
}

template <int HEAD_DIM>
struct query_smem {
    float values[QUERY_THREADS / WARP][CHUNK][WARP]; /* a warp's: channel of the chunk, lane */
    /* cos and sin; the last are 1 and 0, for channels that are not turned */
    float2 rope_table[QUERY_TOKENS][rope_place(QUERY_FREQUENCIES<HEAD_DIM>) + 1];
};

/* RoPE of a lane's channels. One that is not turned is its own partner, and its cos and sin are the last. */
struct chunk_turns {
    uint32_t partner[CHUNK]; /* shared address of the value */
    uint32_t cos_sin[CHUNK]; /* shared address, of the first token's */
    uint32_t sign[CHUNK];    /* of the partner: a float's sign bit */
};

template <int HEAD_DIM>
__device__ inline void load_turns_of_chunk(const ksort_rope &rope, uint32_t kv_head, const query_smem<HEAD_DIM> &smem,
                                           chunk_turns &turns)
{
    constexpr uint32_t LANES = CHUNK_LANES<HEAD_DIM>;
    const uint32_t chunk = lane_of_thread() % LANES, first_lane = lane_of_thread() - chunk;
    const bool in_head = chunk * CHUNK < HEAD_DIM;
    const size_t at = (size_t)kv_head * HEAD_DIM + (in_head ? chunk * CHUNK : 0);
    uint16_t partners[CHUNK], frequencies[CHUNK];
    int8_t signs[CHUNK];
    memcpy(partners, __builtin_assume_aligned(rope.partner + at, sizeof partners), sizeof partners);
    memcpy(frequencies, __builtin_assume_aligned(rope.frequency + at, sizeof frequencies), sizeof frequencies);
    memcpy(signs, __builtin_assume_aligned(rope.sign + at, sizeof signs), sizeof signs);
#pragma unroll
    for (uint32_t j = 0; j < CHUNK; j++) {
        const int sign = in_head ? signs[j] : 0;
        const uint32_t partner = sign ? partners[j] : chunk * CHUNK + j;
        const uint32_t frequency = sign ? frequencies[j] : QUERY_FREQUENCIES<HEAD_DIM>;
        turns.partner[j] =
            shared_address(&smem.values[threadIdx.x / WARP][partner % CHUNK][first_lane + partner / CHUNK]);
        turns.cos_sin[j] = shared_address(&smem.rope_table[0][rope_place(frequency)]);
        turns.sign[j] = sign < 0 ? 1u << 31 : 0;
    }
}

/* cos and sin of n_tokens positions, a warp for each. Beyond the tables, their last are loaded, and not used. */
template <int HEAD_DIM>
__device__ inline void stage_rope_table(const attend_job &job, uint32_t position, uint32_t n_tokens,
                                        query_smem<HEAD_DIM> &smem)
{
    constexpr uint32_t FREQUENCIES = QUERY_FREQUENCIES<HEAD_DIM>;
    const ksort_rope &rope = job.rope;
    for (uint32_t t = threadIdx.x / WARP; t < n_tokens; t += blockDim.x / WARP) {
        const size_t row = (size_t)min(position + t, job.tokens.n_positions - 1) * rope.n_frequencies;
        float2 entries[(FREQUENCIES + WARP - 1) / WARP];
#pragma unroll
        for (uint32_t i = 0; i * WARP < FREQUENCIES; i++) {
            const size_t at = row + min(i * WARP + lane_of_thread(), rope.n_frequencies - 1);
            entries[i] = make_float2(rope.cos[at], rope.sin[at]);
        }
#pragma unroll
        for (uint32_t i = 0; i * WARP < FREQUENCIES; i++)
            if (i * WARP + lane_of_thread() < FREQUENCIES)
                smem.rope_table[t][rope_place(i * WARP + lane_of_thread())] = entries[i];
        smem.rope_table[t][rope_place(FREQUENCIES)] = make_float2(1.0f, 0.0f);
    }
}

/* y becomes y * cos + (sign * partner) * sin. to_row: bytes from the first token's row of the rope table to this one's;
 * values: of the warp, all of whose lanes call this. */
__device__ inline void turn_chunk(const chunk_turns &turns, uint32_t to_row, float (&values)[CHUNK][WARP],
                                  float (&y)[CHUNK])
{
    __syncwarp(); /* the row before has been read */
#pragma unroll
    for (int j = 0; j < CHUNK; j++)
        values[j][lane_of_thread()] = y[j];
    __syncwarp();
#pragma unroll
    for (int j = 0; j < CHUNK; j++) {
        const float2 cos_sin = load_shared_float2(turns.cos_sin[j] + to_row);
        const float partner = load_shared_value<KSORT_F32>(turns.partner[j]);
        const float sine = bits_float(float_bits(cos_sin.y) + turns.sign[j]); /* the sum, as more units add than xor */
        y[j] = __fadd_rn(__fmul_rn(y[j], cos_sin.x), __fmul_rn(partner, sine));
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

/* A chunk as it is before rounding, for exact rows: whoever reads it takes what is not finite for zeros. */
__device__ inline void store_exact_chunk(float *place, const float (&y)[CHUNK])
{
    reinterpret_cast<float4 *>(place)[0] = make_float4(y[0], y[1], y[2], y[3]);
    reinterpret_cast<float4 *>(place)[1] = make_float4(y[4], y[5], y[6], y[7]);
}

/* Rounds a row's chunk to BFP16 in blocks of the keys' size, and stores it. A row that is not finite, or without a
 * position, is reported and becomes zeros. All lanes of the warp. */
template <int HEAD_DIM>
__device__ inline void store_query_chunk(const attend_job &job, uint32_t row, bool has_position, bool is_stored,
                                         float (&y)[CHUNK])
{
    constexpr uint32_t MANTISSA_BITS = 8;
    constexpr int32_t LARGEST = 127;
    constexpr uint32_t SMALL = 16;           /* exponents below are rare, and all that round_to_units calls tiny */
    constexpr uint32_t ABOVE_127 = 0x7F0000; /* fraction of 127.5 / 64: from there on the largest is rounded to 128 */
    const uint32_t chunk = lane_of_thread() % CHUNK_LANES<HEAD_DIM>;
    if (job.exact_queries && is_stored && chunk * CHUNK < HEAD_DIM)
        store_exact_chunk(job.exact_queries + (size_t)row * HEAD_DIM + chunk * CHUNK, y);
    const uint32_t magnitude = largest_of_block(magnitude_of_chunk(y), job.k.layout.block_size / CHUNK);
    const bool is_finite = magnitude < FLOAT_MAGNITUDE_INF;
    uint32_t exponent = magnitude >> 23, m[CHUNK];
    const bool is_rare = !is_finite || exponent - 1 < SMALL - 1 || (magnitude & 0x7FFFFF) >= ABOVE_127;
    if (!has_position || __any_sync(ALL_LANES, is_rare)) {
        const uint32_t not_finite = __ballot_sync(ALL_LANES, !is_finite);
        const bool is_refused = !has_position || not_finite & lanes_of_head<HEAD_DIM>();
        if (is_refused && is_stored && chunk == 0)
            report(job.tokens, has_position ? KSORT_ERR_NON_FINITE : KSORT_ERR_ROPE);
        exponent = is_refused ? 0 : exponent;
        round_chunk(exponent, MANTISSA_BITS, is_refused ? 0 : LARGEST, y, m);
    } else {
        round_to_units<false>(exponent, MANTISSA_BITS, y, m);
    }
    if (!job.values)
        store_mantissas<HEAD_DIM>(job, row, is_stored, exponent, m);
    else if (is_stored && chunk * CHUNK < HEAD_DIM)
        store_values(job.values + (size_t)row * HEAD_DIM + chunk * CHUNK, exponent, m);
}

template <int HEAD_DIM, uint32_t X_TYPE>
__global__ void __launch_bounds__(QUERY_THREADS, RESIDENT_QUERIES)
    prepare_nearest_kernel(const __grid_constant__ attend_job job, query_block block)
{
    let_dependent_begin(); /* decode asks for its first tiles meanwhile */
    __shared__ query_smem<HEAD_DIM> smem;
    const uint32_t chunk = threadIdx.x % CHUNK_LANES<HEAD_DIM>, head_of_block = threadIdx.x / CHUNK_LANES<HEAD_DIM>;
    const uint32_t context = blockIdx.z, first_token = blockIdx.x * block.tokens;
    const bool exists = head_of_block < block.heads && blockIdx.y * block.heads + head_of_block < job.n_heads;
    const uint32_t head = exists ? blockIdx.y * block.heads + head_of_block : 0; /* the others store nothing */
    const uint32_t n_new = min(n_new_of(job.tokens, context), job.tokens.n_tokens);
    const uint32_t position = (uint32_t)job.tokens.n_cached[context] + first_token;
    const size_t first_q =
        context * job.q_context_stride + first_token * job.q_token_stride + (size_t)head * HEAD_DIM + chunk * CHUNK;
    const uint8_t *q = static_cast<const uint8_t *>(job.q) + first_q * ELEMENT_BYTES<X_TYPE>;
    uint4 parts[CHUNK_PARTS<X_TYPE>] = {};
    const auto load_row = [&]() {
#pragma unroll
        for (int i = 0; i < CHUNK_PARTS<X_TYPE>; i++)
            if (chunk * CHUNK < HEAD_DIM)
                parts[i] = __ldcs(reinterpret_cast<const uint4 *>(q) + i);
        q += job.q_token_stride * ELEMENT_BYTES<X_TYPE>;
    };
    load_row(); /* of a token that is not new as well: without waiting for n_new */
    const uint32_t n_tokens = first_token < n_new ? min(block.tokens, n_new - first_token) : 0;
    chunk_turns turns;
    if (job.rope.partner) {
        load_turns_of_chunk<HEAD_DIM>(job.rope, head / job.group, smem, turns);
        stage_rope_table<HEAD_DIM>(job, position, n_tokens, smem);
        __syncthreads();
    }
    uint32_t row = (context * job.tokens.n_tokens + first_token) * job.n_heads + head;
#pragma unroll 1
    for (uint32_t t = 0; t < n_tokens; t++, row += job.n_heads) {
        float y[CHUNK];
        chunk_values<X_TYPE>(parts, y);
        if (t + 1 < n_tokens)
            load_row();
        if (job.rope.partner)
            turn_chunk(turns, t * (uint32_t)sizeof smem.rope_table[0], smem.values[threadIdx.x / WARP], y);
        const bool has_position = !job.rope.partner || position + t < job.tokens.n_positions;
        store_query_chunk<HEAD_DIM>(job, row, has_position, exists, y);
    }
}

/* Whether a job's queries have no transform (a shift is of keys alone), and RoPE tables that are staged and loaded in
 * chunks here. */
template <int HEAD_DIM>
bool is_prepared_nearest(const attend_job &job)
{
    const ksort_transform &transform = job.k_transform;
    const ksort_rope &rope = job.rope;
    return !transform.scale && !transform.rotate && !transform.permutation &&
           rope.n_frequencies <= QUERY_FREQUENCIES<HEAD_DIM> && is_aligned(rope.partner, 16) &&
           is_aligned(rope.frequency, 16) && is_aligned(rope.sign, 8);
}

/* Blocks of as many tokens as fill a device of DEVICE_THREADS a whole number of times; else some of it would be idle at
 * the end. */
template <int HEAD_DIM>
query_block block_of_queries(const attend_job &job)
{
    constexpr uint64_t DEVICE_THREADS = 132 * RESIDENT_QUERIES * QUERY_THREADS; /* H100 */
    constexpr uint32_t MOST_HEADS = QUERY_THREADS / CHUNK_LANES<HEAD_DIM>;
    const auto above = [](uint64_t a, uint64_t b) { return (uint32_t)((a + b - 1) / b); }; /* a / b, rounded up */
    const uint64_t rows = (uint64_t)job.tokens.n_tokens * job.tokens.n_contexts * job.n_heads;
    const uint32_t times = above(rows * CHUNK_LANES<HEAD_DIM>, DEVICE_THREADS); /* with blocks of one token */
    return {above(job.n_heads, above(job.n_heads, MOST_HEADS)), above(times, above(times, QUERY_TOKENS))};
}

template <int HEAD_DIM>
cudaError_t launch_prepare_nearest(const attend_job &job, cudaStream_t stream)
{
    const query_block block = block_of_queries<HEAD_DIM>(job);
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((job.tokens.n_tokens + block.tokens - 1) / block.tokens,
                          (job.n_heads + block.heads - 1) / block.heads, job.tokens.n_contexts);
    config.blockDim = dim3((block.heads * CHUNK_LANES<HEAD_DIM> + WARP - 1) / WARP * WARP);
    config.stream = stream;
    if (job.x_type == KSORT_F16)
        return cudaLaunchKernelEx(&config, prepare_nearest_kernel<HEAD_DIM, KSORT_F16>, job, block);
    if (job.x_type == KSORT_BF16)
        return cudaLaunchKernelEx(&config, prepare_nearest_kernel<HEAD_DIM, KSORT_BF16>, job, block);
    return cudaLaunchKernelEx(&config, prepare_nearest_kernel<HEAD_DIM, KSORT_F32>, job, block);
}

#endif /* KSORT_CUDA_QUERY_NEAREST_CUH */
