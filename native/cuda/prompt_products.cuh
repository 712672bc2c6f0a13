/* The two products of prompt attention on tensor cores: S = Q K^T in bf16, out += P V in f16, sums in float32.
 *
 * A warp has 16 rows. In registers, as mma.sync and wgmma alike lay them out (g = lane / 4, t = lane % 4):
 *     accumulator x[n][e]:  row g + 8 * (e / 2), column 8 n + 2 t + e % 2
 *     left operand a[k][i]: a pair: row g + 8 * (i % 2), columns 16 k + 8 * (i / 2) + 2 t and the next
 * so S turns into the left operand P without leaving its thread. Right operands are expanded tiles in shared memory
 * (prompt_panels.cuh). wgmma, where it is compiled for (sm_90a), is a product of the four warps of a warpgroup, which
 * call together; elsewhere mma.sync, each warp for itself.
 */
#ifndef KSORT_PROMPT_PRODUCTS_CUH
#define KSORT_PROMPT_PRODUCTS_CUH

#include "prompt_panels.cuh"

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

#include "prompt_wgmma_products.cuh"

#else

/* mma.sync reads shared memory as everyone does. */
__device__ inline void publish_panels() {}

/* Whether x is true in any thread that takes part in the same products. */
__device__ inline bool any_of_partners(bool x)
{
    return __any_sync(~0u, x);
}

__device__ inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ inline void mma_keys(float (&x)[4], const uint32_t (&a)[4], uint32_t b_0, uint32_t b_1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(x[0]), "+f"(x[1]), "+f"(x[2]), "+f"(x[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_0), "r"(b_1));
}

__device__ inline void mma_values(float (&x)[4], const uint32_t (&a)[4], uint32_t b_0, uint32_t b_1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(x[0]), "+f"(x[1]), "+f"(x[2]), "+f"(x[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_0), "r"(b_1));
}

/* scores[64 tokens] = q k^T */
template <int HEAD_DIM>
__device__ inline void key_product(float (&scores)[TILE / 8][4], const uint32_t (&q)[HEAD_DIM / 16][4],
                                   const uint8_t *k_smem)
{
    uint32_t lane = threadIdx.x % WARP, k_address = smem_address(k_smem);
#pragma unroll
    for (int n = 0; n < TILE / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            scores[n][e] = 0.0f;
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; k++)
#pragma unroll
        for (int n = 0; n < TILE / 8; n += 2) {
            uint32_t b[4];
            uint32_t token = 8 * n + lane / 16 * 8 + lane % 8;
            load_matrices(b, k_address + chunk_offset(TILE, token, 2 * k + lane / 8 % 2));
            mma_keys(scores[n], q[k], b[0], b[1]);
            mma_keys(scores[n + 1], q[k], b[2], b[3]);
        }
}

/* out += (sum of the parts of p) v */
template <int HEAD_DIM, int PARTS>
__device__ inline void value_product(float (&out)[HEAD_DIM / 8][4], const uint32_t (&p)[PARTS][KEY_STEPS][4],
                                     const uint8_t *v_smem)
{
    uint32_t lane = threadIdx.x % WARP, v_address = smem_address(v_smem);
#pragma unroll
    for (int k = 0; k < KEY_STEPS; k++)
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n += 2) {
            uint32_t b[4];
            load_matrices_transposed(b, v_address + chunk_offset(TILE, 16 * k + lane % 16, n + lane / 16));
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                mma_values(out[n], p[part][k], b[0], b[1]);
                mma_values(out[n + 1], p[part][k], b[2], b[3]);
            }
        }
}

#endif

#endif /* KSORT_PROMPT_PRODUCTS_CUH */
