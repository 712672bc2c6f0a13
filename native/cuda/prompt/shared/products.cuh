/* The two products of prompt attention on tensor cores: S = Q K^T in bf16, out += P V in f16, sums in float32.
 *
 * A warp has 16 rows. In registers, as mma.sync and wgmma alike lay them out (g = lane / 4, t = lane % 4):
 *     accumulator x[n][e]:  row g + 8 * (e / 2), column 8 n + 2 t + e % 2
 *     left operand a[k][i]: a pair: row g + 8 * (i % 2), columns 16 k + 8 * (i / 2) + 2 t and the next
 * so S turns into the left operand P without leaving its thread. Right operands are expanded tiles in shared memory
 * (prompt/shared/panels.cuh). wgmma, where it is compiled for (sm_90a), is a product of the four warps of a warpgroup,
 * which call together; elsewhere mma.sync, each warp for itself.
 */
#ifndef KSORT_CUDA_PROMPT_SHARED_PRODUCTS_CUH
#define KSORT_CUDA_PROMPT_SHARED_PRODUCTS_CUH

#include "prompt/shared/panels.cuh"

constexpr int KEY_STEPS = TILE / 16; /* steps of 16 tokens in P V */

__device__ inline void load_matrices(uint32_t (&r)[4], uint32_t address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

/* The left operands of 16 rows from row `row` on, of n_rows rows in panels. */
template <int HEAD_DIM>
__device__ inline void load_queries(uint32_t (&q)[HEAD_DIM / 16][4], const uint8_t *q_smem, uint32_t n_rows,
                                    uint32_t row)
{
    uint32_t lane = threadIdx.x % WARP;
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; k++)
        load_matrices(q[k], smem_address(q_smem) + chunk_offset(n_rows, row + lane % 16, 2 * k + lane / 16));
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "prompt/wgmma/products.cuh"
#else
#include "prompt/mma/products.cuh"
#endif

#endif /* KSORT_CUDA_PROMPT_SHARED_PRODUCTS_CUH */
