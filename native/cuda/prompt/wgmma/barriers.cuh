/* Barriers in shared memory (mbarrier), by their addresses there, between warps of prompt attention that make tiles and
 * those that use them. */
#ifndef KSORT_CUDA_PROMPT_WGMMA_BARRIERS_CUH
#define KSORT_CUDA_PROMPT_WGMMA_BARRIERS_CUH

#include "prompt/shared/panels.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ inline void init_barrier(uint32_t barrier, uint32_t n_arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(n_arrivals) : "memory");
}

/* One arrival of a warp, after all that its lanes did before. */
__device__ inline void arrive_as_warp(uint32_t barrier)
{
    __syncwarp();
    if (threadIdx.x % WARP == 0)
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/* Waits until the phase of this parity is complete; the one before the first counts as complete, with parity 1. */
__device__ inline void wait_for_phase(uint32_t barrier, uint32_t parity)
{
    uint32_t complete;
    do
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n}"
                     : "=r"(complete)
                     : "r"(barrier), "r"(parity)
                     : "memory");
    while (!complete);
}

/* Whether the phase is complete already. */
__device__ inline bool is_complete(uint32_t barrier, uint32_t parity)
{
    uint32_t complete;
    asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(complete)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return complete;
}

/* The one arrival of a phase that ends when `bytes` have been copied. */
__device__ inline void expect_bytes(uint32_t barrier, uint32_t bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

/* Starts a copy of bytes, a multiple of 16, that the barrier counts. */
__device__ inline void copy_bytes_async(uint8_t *smem, const void *gmem, uint32_t bytes, uint32_t barrier)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     smem_address(smem)),
                 "l"(gmem), "r"(bytes), "r"(barrier)
                 : "memory");
}

/* Joins THREADS threads; barrier 0 is __syncthreads'. */
template <int THREADS>
__device__ inline void join_threads(int barrier)
{
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(THREADS) : "memory");
}

#endif

#endif /* KSORT_CUDA_PROMPT_WGMMA_BARRIERS_CUH */
