/* Nearest rounding with RoPE: a lane is a slot, so that a channel's partner, frequency and sign are the same for all
 * lanes of a warp, and a unit of 32 channels is within a lane. A thread block takes 32 slots of GROUP_HEADS heads:
 *
 *     rows, turns, table  --> shared memory   all threads: everything is asked for at once
 *     turn                                    warp = unit of channels, lane = slot
 *     wait                                    units know each other's largest magnitudes
 *     round, store
 *
 * A channel of 32 slots takes shared memory about 7 cycles: 2 for cos and sin, 1 for the partner, 1 for its turn, half
 * a one for its own value, the rest for staging and maxima. Few heads a block, and so many blocks a multiprocessor:
 * some load while others turn. Twice the heads would halve what is read of cos and sin, and was slower.
 */
#ifndef KSORT_CUDA_PACK_ROPE_CUH
#define KSORT_CUDA_PACK_ROPE_CUH

#include "pack/rope_rows.cuh"

template <int HEAD_DIM, uint32_t X_TYPE, bool STAGED>
struct rope_packer {
    using shape = rope_shape<HEAD_DIM, X_TYPE>;
    using rows_type = rope_rows<HEAD_DIM, X_TYPE, STAGED>;

    const rows_type &rows;

    /* cos, and sin with the partner's sign. table: the shared address of the lane's entry of frequency 0. */
    __device__ float2 cos_sin_of(uint32_t table, uint32_t own, const channel_turn &turn) const
    {
        float2 cos_sin = make_float2(1.0f, 0.0f);
        if constexpr (STAGED) {
            cos_sin = load_shared_float2(table + (turn.entry << 3)); /* bit 31 falls off */
        } else if (turn.partner != own && rows.is_wanted(rows.lane)) {
            const size_t position = rows.group.first + rows.lane;
            const size_t at = position * rows.work.rope.n_frequencies + (turn.entry & ~(1u << 31));
            cos_sin = make_float2(rows.work.rope.cos[at], rows.work.rope.sin[at]);
        }
        cos_sin.y = bits_float(float_bits(cos_sin.y) ^ (turn.entry & 1u << 31));
        return cos_sin;
    }

    /* RoPE of the lane's 16 channels of a head from `channel` on. */
    __device__ void turn_half(uint32_t head, uint32_t channel, float (&y)[HALF_UNIT]) const
    {
        constexpr uint32_t BYTES = ELEMENT_BYTES<X_TYPE>;
        const uint32_t table = shared_address(&rows.smem.rope_table[0][rows.lane]);
        const uint32_t row = shared_address(rows.smem.rows[head][rows.lane]), own_row = row + channel * BYTES;
        const uint32_t turns = shared_address(&rows.smem.turns[head * HEAD_DIM + channel]);
#pragma unroll
        for (int j = 0; j < HALF_UNIT; j += 2) {
            const uint4 pair = load_shared_uint4(turns + j * sizeof(channel_turn));
            const channel_turn both[2] = {{pair.x, pair.y}, {pair.z, pair.w}};
            const float2 own = load_shared_pair<X_TYPE>(own_row + j * BYTES);
#pragma unroll
            for (int k = 0; k < 2; k++) {
                const float2 cos_sin = cos_sin_of(table, (channel + j + k) * BYTES, both[k]);
                const float partner = load_shared_value<X_TYPE>(row + both[k].partner);
                y[j + k] = __fadd_rn(__fmul_rn(k ? own.y : own.x, cos_sin.x), __fmul_rn(partner, cos_sin.y));
            }
        }
    }

    /* A warp's unit. */
    struct unit_place {
        uint32_t head, in_head; /* head of the block; unit of the head */
        bool exists, has_second;

        __device__ uint32_t channel() const { return in_head * UNIT; }
    };

    __device__ unit_place unit_of_warp() const
    {
        unit_place unit;
        unit.head = rows.warp / shape::UNITS;
        unit.in_head = rows.warp % shape::UNITS;
        unit.exists = unit.head < rows.n_heads;
        unit.has_second = HEAD_DIM % UNIT == 0 || unit.channel() + HALF_UNIT < HEAD_DIM;
        return unit;
    }

    /* RoPE of a unit, and the largest magnitudes of its halves. */
    __device__ void turn_unit(const unit_place &unit, float (&y)[2][HALF_UNIT], uint32_t (&magnitudes)[2]) const
    {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (half && !unit.has_second)
                break;
            turn_half(unit.head, unit.channel() + half * HALF_UNIT, y[half]);
            magnitudes[half] = magnitude_of_chunk(y[half]);
        }
    }

    /* The largest magnitude of n units of the unit's head from `first` on, of the lane's slot. */
    __device__ uint32_t largest_of_units(const unit_place &unit, uint32_t first, uint32_t n) const
    {
        uint32_t largest = 0;
        for (uint32_t u = first; u < first + n && u < shape::UNITS; u++)
            largest = max(largest, rows.smem.magnitudes[unit.head * shape::UNITS + u][rows.lane]);
        return largest;
    }

    /* Whether the lane's slot of the unit's head must not be stored; reported by one warp. */
    __device__ bool is_refused(const unit_place &unit) const
    {
        if (largest_of_units(unit, 0, shape::UNITS) <= largest_storable(rows.side))
            return false;
        if (unit.in_head == 0 && rows.is_wanted(rows.lane))
            tell_refusal<HEAD_DIM, X_TYPE>(rows.work, rows.side, rows.group, rows.group.first + rows.lane,
                                           rows.first_head + unit.head);
        return true;
    }

    /* magnitudes: of the unit's halves; become those of the blocks that these belong to. */
    __device__ void share_magnitudes(const unit_place &unit, uint32_t (&magnitudes)[2]) const
    {
        const uint32_t block_size = rows.side.cache.layout.block_size, units = block_size / UNIT; /* a power of two */
        uint32_t largest = max(magnitudes[0], magnitudes[1]);
        if (block_size > UNIT)
            largest = largest_of_units(unit, unit.in_head & ~(units - 1), units);
        magnitudes[0] = block_size < UNIT ? magnitudes[0] : largest;
        magnitudes[1] = block_size < UNIT ? magnitudes[1] : largest;
    }

    /* Rounds and stores the lane's unit of a head. magnitudes: of blocks. */
    __device__ void store_unit(const unit_place &unit, uint8_t *tile, bool is_stored, const uint32_t (&magnitudes)[2],
                               float (&y)[2][HALF_UNIT]) const
    {
        const head_layout &layout = rows.side.cache.layout;
        const uint32_t token = (rows.group.first + rows.lane) % KSORT_TILE_TOKENS;
        const uint32_t log_block = __ffs(layout.block_size) - 1; /* a power of two, unknown to the compiler */
        const int32_t limit = (1 << (layout.mantissa_bits - 1)) - 1;
        word_writer words = {layout, tile, token};
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (half && !unit.has_second)
                break;
            const uint32_t channel = unit.channel() + half * HALF_UNIT;
            uint32_t u[HALF_UNIT], quads[HALF_UNIT / 4];
            const uint32_t byte = round_nearest(layout, magnitudes[half], y[half], u);
#pragma unroll
            for (int q = 0; q < HALF_UNIT / 4; q++)
                quads[q] = clamped_quad(u[4 * q], u[4 * q + 1], u[4 * q + 2], u[4 * q + 3], limit);
            if (!is_stored)
                continue;
            words.store(channel / HALF_UNIT, quads);
            if ((channel & (layout.block_size - 1)) == 0)
                tile[exponent_offset(&layout, channel >> log_block, token)] = (uint8_t)byte;
        }
    }

    /* All threads of the block. */
    __device__ void pack() const
    {
        rows.stage();
        __syncthreads();
        const unit_place unit = unit_of_warp();
        float y[2][HALF_UNIT];
        uint32_t magnitudes[2] = {0, 0};
        if (unit.exists) {
            turn_unit(unit, y, magnitudes);
            rows.smem.magnitudes[rows.warp][rows.lane] = max(magnitudes[0], magnitudes[1]);
        }
        const uint32_t largest = max(magnitudes[0], magnitudes[1]);
        const bool wanted = rows.is_wanted(rows.lane);
        const bool refuses = __syncthreads_or(wanted && largest > largest_storable(rows.side));
        if (!unit.exists)
            return;
        const bool is_stored = wanted && !(refuses && is_refused(unit));
        share_magnitudes(unit, magnitudes);
        uint8_t *tile = tile_of_group(rows.side, rows.group, rows.first_head + unit.head);
        store_unit(unit, tile, is_stored, magnitudes, y);
    }
};

#endif /* KSORT_CUDA_PACK_ROPE_CUH */
