/* Packing. A strip is 16 slots of one head of keys or values, a group two strips:
 *
 *     slots of a context    ....nnnn|nnnnnnnn|nnn.....    n: new; parts are groups, or strips of transformed heads
 *     x: keys               0       |2       |4           grid:  x = part, of keys and values alternately, so that a
 *        values             1       |3       |5                  multiprocessor turns keys while it waits for values
 *                                                                y = KV head, or group of heads   z = context
 *
 * A thread block takes
 *
 *     nearest rounding, RoPE:   a group of a few heads, a lane a slot                            (pack/rope.cuh)
 *                       none:   a group of a few heads, a lane 8 channels of four slots a time   (pack/plain.cuh)
 *     transformed heads:        a strip of one head, a warp T tokens                             (pack/transformed.cuh)
 *
 * Bytes moved, a head of one token: head_dim times 2 or 4 in, head_dim * bits / 8 + blocks out. Besides, mostly from
 * L2: rows of cos and sin and RoPE tables once a block with nearest rounding; of transformed heads all tables once a
 * token, and once a strip the rows of the feedback matrix from the diagonal on, some 2 head_dim^2 bytes.
 */
#ifndef KSORT_CUDA_PACK_KERNEL_CUH
#define KSORT_CUDA_PACK_KERNEL_CUH

#include "common/dependent_launch.cuh"
#include "pack/nearest.cuh"
#include "pack/transformed.cuh"

/* Thread blocks of a multiprocessor: what leaves registers enough. */
template <int HEAD_DIM, uint32_t X_TYPE>
constexpr int RESIDENT_NEAREST = (X_TYPE == KSORT_F32 ? 768 : 1024) / strip_shape<HEAD_DIM>::THREADS;
template <int HEAD_DIM>
constexpr int RESIDENT_ANY = 768 / strip_shape<HEAD_DIM>::THREADS;

/* Keys or values, and the index of the thread block's group or strip. */
__device__ inline const pack_side &side_of_block(const pack_work &work, uint32_t &index)
{
    const uint32_t has_two = work.n_sides - 1;
    index = blockIdx.x >> has_two;
    return work.sides[blockIdx.x & has_two];
}

template <int HEAD_DIM, uint32_t X_TYPE>
__global__ void __launch_bounds__(strip_shape<HEAD_DIM>::THREADS, RESIDENT_NEAREST<HEAD_DIM, X_TYPE>)
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
__global__ void __launch_bounds__(strip_shape<HEAD_DIM>::THREADS, RESIDENT_ANY<HEAD_DIM>)
    pack_any_kernel(const __grid_constant__ pack_work work)
{
    extern __shared__ uint4 shared_chunks[];
    uint8_t *shared = reinterpret_cast<uint8_t *>(shared_chunks);
    uint32_t index;
    const pack_side &side = side_of_block(work, index);
    if (side.is_transformed)
        pack_transformed<HEAD_DIM>(work, side, index, shared);
    else
        pack_nearest<HEAD_DIM, X_TYPE, false>(work, side, index, shared);
}

#endif /* KSORT_CUDA_PACK_KERNEL_CUH */
