/* The products of prompt/shared/products.cuh by mma.sync: each warp for its own 16 rows, right operands by ldmatrix.
 * That file includes this one where there is no wgmma.
 */
#ifndef KSORT_CUDA_PROMPT_MMA_PRODUCTS_CUH
#define KSORT_CUDA_PROMPT_MMA_PRODUCTS_CUH

#include "prompt/shared/panels.cuh"

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

/* scores[64 tokens] = (sum of the two parts of q) k^T in f16. The parts are 64 rows each, in panels, of which the
 * warp has 16. */
template <int HEAD_DIM>
__device__ inline void exact_key_product(float (&scores)[TILE / 8][4], const uint8_t *high_smem,
                                         const uint8_t *low_smem, const uint8_t *k_smem)
{
    uint32_t lane = threadIdx.x % WARP, row = threadIdx.x / WARP * 16 + lane % 16, k_address = smem_address(k_smem);
#pragma unroll
    for (int n = 0; n < TILE / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            scores[n][e] = 0.0f;
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; k++) {
        uint32_t high[4], low[4], at = chunk_offset(TILE, row, 2 * k + lane / 16);
        load_matrices(high, smem_address(high_smem) + at);
        load_matrices(low, smem_address(low_smem) + at);
#pragma unroll
        for (int n = 0; n < TILE / 8; n += 2) {
            uint32_t b[4];
            load_matrices(b, k_address + chunk_offset(TILE, 8 * n + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
            mma_values(scores[n], high, b[0], b[1]);
            mma_values(scores[n + 1], high, b[2], b[3]);
            mma_values(scores[n], low, b[0], b[1]);
            mma_values(scores[n + 1], low, b[2], b[3]);
        }
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

#endif /* KSORT_CUDA_PROMPT_MMA_PRODUCTS_CUH */
