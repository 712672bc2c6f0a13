/* Packing. A part of a context's new slots or tokens is
 *
 *     slots of a context    ....nnnn|nnnnnnnn|nnn.....    n: new
 *     x: keys               0       |2       |4           grid:  x = part, of keys and values alternately, so that a
 *        values             1       |3       |5                  multiprocessor turns keys while it waits for values
 *                                                                y = KV head, or group of heads   z = context
 *
 * A thread block takes
 *
 *     nearest rounding, RoPE:     32 slots of a few heads, a lane a slot                               (pack/rope.cuh)
 *                       none:     32 slots of a few heads, a lane 8 channels of four slots a time      (pack/plain.cuh)
 *     transformed heads, few:     8 tokens of one head, a warp a token; other numbers for other heads  (pack/few.cuh)
 *                        many:    128 slots of one head, a lane a slot                                 (pack/many.cuh)
 *
 * Bytes moved, a head of one token: head_dim times 2 or 4 in, head_dim * bits / 8 + blocks out. Besides, mostly from
 * L2: rows of cos and sin and RoPE tables once a block with nearest rounding; of transformed heads rows of cos and sin
 * once a token, and once a block the rows of the feedback matrix from the diagonal on, some 2 head_dim^2 bytes.
 */
#ifndef KSORT_CUDA_PACK_KERNEL_CUH
#define KSORT_CUDA_PACK_KERNEL_CUH

#include "common/dependent_launch.cuh"
#include "pack/few.cuh"
#include "pack/many.cuh"
#include "pack/nearest.cuh"

/* Thread blocks of a multiprocessor: what leaves registers enough. */
template <int HEAD_DIM, uint32_t X_TYPE>
constexpr int RESIDENT_NEAREST = (X_TYPE == KSORT_F32 ? 768 : 1024) / PACK_THREADS<HEAD_DIM>;
template <int HEAD_DIM>
constexpr int RESIDENT_ANY = 512 / PACK_THREADS<HEAD_DIM>;

/* Keys or values, and the index of the thread block's group or strip. */
__device__ inline const pack_side &side_of_block(const pack_work &work, uint32_t &index)
{
    const uint32_t has_two = work.n_sides - 1;
    index = blockIdx.x >> has_two;
    return work.sides[blockIdx.x & has_two];
}

template <int HEAD_DIM, uint32_t X_TYPE>
__global__ void __launch_bounds__(PACK_THREADS<HEAD_DIM>, RESIDENT_NEAREST<HEAD_DIM, X_TYPE>)
    pack_nearest_kernel(const __grid_constant__ pack_work work)
{
    extern __shared__ uint4 shared_chunks[];
    uint32_t group_index;
    const pack_side &side = side_of_block(work, group_index);
    let_dependent_begin();
    prefetch_rows<HEAD_DIM, X_TYPE>(work, side, group_index);
    wait_for_kernel_before();
    pack_nearest<HEAD_DIM, X_TYPE, true>(work, side, group_index, reinterpret_cast<uint8_t *>(shared_chunks));
}

/* One side may have no transform, and neither has one where a rope has more frequencies than can be staged. */
template <int HEAD_DIM, uint32_t X_TYPE>
__global__ void __launch_bounds__(PACK_THREADS<HEAD_DIM>, RESIDENT_ANY<HEAD_DIM>)
    pack_any_kernel(const __grid_constant__ pack_work work)
{
    extern __shared__ uint4 shared_chunks[];
    uint8_t *shared = reinterpret_cast<uint8_t *>(shared_chunks);
    uint32_t index;
    const pack_side &side = side_of_block(work, index);
    if (side.is_transformed)
        pack_few<HEAD_DIM, X_TYPE>(work, side, index, shared);
    else
        pack_nearest<HEAD_DIM, X_TYPE, false>(work, side, index, shared);
}

/* All sides have a transform. */
template <int HEAD_DIM, uint32_t X_TYPE>
__global__ void __launch_bounds__(many_shape<HEAD_DIM>::THREADS, many_shape<HEAD_DIM>::RESIDENT)
    pack_many_kernel(const __grid_constant__ pack_work work)
{
    extern __shared__ uint4 shared_chunks[];
    uint32_t index;
    const pack_side &side = side_of_block(work, index);
    pack_many<HEAD_DIM, X_TYPE>(work, side, index, reinterpret_cast<uint8_t *>(shared_chunks));
}

#endif /* KSORT_CUDA_PACK_KERNEL_CUH */
