/* The products of prompt/shared/products.cuh by wgmma (sm_90a): asynchronous, by a warpgroup, each warp for 16 of 64
 * rows.
 *
 * Right operands are panels in shared memory, named by descriptors. A product is started between begin_products, before
 * which its accumulators may be touched, and wait_for_products, after which they may be again.
 */
#ifndef KSORT_CUDA_PROMPT_WGMMA_PRODUCTS_CUH
#define KSORT_CUDA_PROMPT_WGMMA_PRODUCTS_CUH

#include "prompt/shared/panels.cuh"

/* Shared-memory writes of this thread become visible to wgmma (after a barrier). */
__device__ inline void publish_panels()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* Whether x is true in any thread of the warpgroup. Barrier 0 is __syncthreads'. */
__device__ inline bool any_of_partners(bool x)
{
    constexpr uint32_t WARPGROUP = 4 * WARP;
    uint32_t any;
    asm volatile("{\n.reg .pred p, q;\nsetp.ne.u32 p, %1, 0;\nbarrier.cta.red.or.pred q, %2, %3, p;\n"
                 "selp.u32 %0, 1, 0, q;\n}"
                 : "=r"(any)
                 : "r"((uint32_t)x), "r"(1 + threadIdx.x / WARPGROUP), "n"(WARPGROUP)
                 : "memory");
    return any;
}

/* A wgmma matrix descriptor: address, the two strides in bytes, 128-byte swizzle. */
__device__ inline uint64_t descriptor(uint32_t address, uint32_t leading_stride, uint32_t stride)
{
    return (uint64_t)(stride >> 4 | 1u << 30) << 32 | (leading_stride >> 4 << 16 | address >> 4);
}

/* x, which is the same in all lanes, so that the compiler knows. */
__device__ inline uint32_t uniform(uint32_t x)
{
    return __shfl_sync(~0u, x, 0);
}

/* An address that is the same in all lanes, shown to the compiler: so it counts descriptors in uniform registers, and
 * products follow on each other. */
__device__ inline uint32_t uniform_smem_address(const void *smem)
{
    return uniform(smem_address(smem));
}

/* The same `bytes` further on. Its low word alone changes: shared memory ends before the address field does. */
__device__ inline uint64_t further(uint64_t start, uint32_t bytes)
{
    return start >> 32 << 32 | ((uint32_t)start + (bytes >> 4));
}

/* x (64 columns) = a * b, or x + a * b with `add`; 16 deep. b is rows of columns (K), depth running along a row. */
__device__ inline void wgmma_keys(float (&x)[8][4], const uint32_t (&a)[4], uint64_t b, bool add)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "{%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}\n"
                 : "+f"(x[0][0]), "+f"(x[0][1]), "+f"(x[0][2]), "+f"(x[0][3]), "+f"(x[1][0]), "+f"(x[1][1]),
                   "+f"(x[1][2]), "+f"(x[1][3]), "+f"(x[2][0]), "+f"(x[2][1]), "+f"(x[2][2]), "+f"(x[2][3]),
                   "+f"(x[3][0]), "+f"(x[3][1]), "+f"(x[3][2]), "+f"(x[3][3]), "+f"(x[4][0]), "+f"(x[4][1]),
                   "+f"(x[4][2]), "+f"(x[4][3]), "+f"(x[5][0]), "+f"(x[5][1]), "+f"(x[5][2]), "+f"(x[5][3]),
                   "+f"(x[6][0]), "+f"(x[6][1]), "+f"(x[6][2]), "+f"(x[6][3]), "+f"(x[7][0]), "+f"(x[7][1]),
                   "+f"(x[7][2]), "+f"(x[7][3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add));
}

/* The same with rows of a in shared memory, depth running along a row. */
__device__ inline void wgmma_keys(float (&x)[8][4], uint64_t a, uint64_t b, bool add)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "%32, %33, p, 1, 1, 0, 0;\n}\n"
                 : "+f"(x[0][0]), "+f"(x[0][1]), "+f"(x[0][2]), "+f"(x[0][3]), "+f"(x[1][0]), "+f"(x[1][1]),
                   "+f"(x[1][2]), "+f"(x[1][3]), "+f"(x[2][0]), "+f"(x[2][1]), "+f"(x[2][2]), "+f"(x[2][3]),
                   "+f"(x[3][0]), "+f"(x[3][1]), "+f"(x[3][2]), "+f"(x[3][3]), "+f"(x[4][0]), "+f"(x[4][1]),
                   "+f"(x[4][2]), "+f"(x[4][3]), "+f"(x[5][0]), "+f"(x[5][1]), "+f"(x[5][2]), "+f"(x[5][3]),
                   "+f"(x[6][0]), "+f"(x[6][1]), "+f"(x[6][2]), "+f"(x[6][3]), "+f"(x[7][0]), "+f"(x[7][1]),
                   "+f"(x[7][2]), "+f"(x[7][3])
                 : "l"(a), "l"(b), "r"((int)add));
}

/* The same in f16. */
__device__ inline void wgmma_exact_keys(float (&x)[8][4], uint64_t a, uint64_t b, bool add)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "%32, %33, p, 1, 1, 0, 0;\n}\n"
                 : "+f"(x[0][0]), "+f"(x[0][1]), "+f"(x[0][2]), "+f"(x[0][3]), "+f"(x[1][0]), "+f"(x[1][1]),
                   "+f"(x[1][2]), "+f"(x[1][3]), "+f"(x[2][0]), "+f"(x[2][1]), "+f"(x[2][2]), "+f"(x[2][3]),
                   "+f"(x[3][0]), "+f"(x[3][1]), "+f"(x[3][2]), "+f"(x[3][3]), "+f"(x[4][0]), "+f"(x[4][1]),
                   "+f"(x[4][2]), "+f"(x[4][3]), "+f"(x[5][0]), "+f"(x[5][1]), "+f"(x[5][2]), "+f"(x[5][3]),
                   "+f"(x[6][0]), "+f"(x[6][1]), "+f"(x[6][2]), "+f"(x[6][3]), "+f"(x[7][0]), "+f"(x[7][1]),
                   "+f"(x[7][2]), "+f"(x[7][3])
                 : "l"(a), "l"(b), "r"((int)add));
}

/* x[0..7] (64 columns) += a * b; b is rows of depth (V), columns running along a row. */
__device__ inline void wgmma_values_64(float (*x)[4], const uint32_t (&a)[4], uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"
                 : "+f"(x[0][0]), "+f"(x[0][1]), "+f"(x[0][2]), "+f"(x[0][3]), "+f"(x[1][0]), "+f"(x[1][1]),
                   "+f"(x[1][2]), "+f"(x[1][3]), "+f"(x[2][0]), "+f"(x[2][1]), "+f"(x[2][2]), "+f"(x[2][3]),
                   "+f"(x[3][0]), "+f"(x[3][1]), "+f"(x[3][2]), "+f"(x[3][3]), "+f"(x[4][0]), "+f"(x[4][1]),
                   "+f"(x[4][2]), "+f"(x[4][3]), "+f"(x[5][0]), "+f"(x[5][1]), "+f"(x[5][2]), "+f"(x[5][3]),
                   "+f"(x[6][0]), "+f"(x[6][1]), "+f"(x[6][2]), "+f"(x[6][3]), "+f"(x[7][0]), "+f"(x[7][1]),
                   "+f"(x[7][2]), "+f"(x[7][3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

/* x (128 columns) += a * b; b is rows of depth (V), columns running along a row, in two panels. */
__device__ inline void wgmma_values_128(float (&x)[16][4], const uint32_t (&a)[4], uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
                 "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
                 : "+f"(x[0][0]), "+f"(x[0][1]), "+f"(x[0][2]), "+f"(x[0][3]), "+f"(x[1][0]), "+f"(x[1][1]),
                   "+f"(x[1][2]), "+f"(x[1][3]), "+f"(x[2][0]), "+f"(x[2][1]), "+f"(x[2][2]), "+f"(x[2][3]),
                   "+f"(x[3][0]), "+f"(x[3][1]), "+f"(x[3][2]), "+f"(x[3][3]), "+f"(x[4][0]), "+f"(x[4][1]),
                   "+f"(x[4][2]), "+f"(x[4][3]), "+f"(x[5][0]), "+f"(x[5][1]), "+f"(x[5][2]), "+f"(x[5][3]),
                   "+f"(x[6][0]), "+f"(x[6][1]), "+f"(x[6][2]), "+f"(x[6][3]), "+f"(x[7][0]), "+f"(x[7][1]),
                   "+f"(x[7][2]), "+f"(x[7][3]), "+f"(x[8][0]), "+f"(x[8][1]), "+f"(x[8][2]), "+f"(x[8][3]),
                   "+f"(x[9][0]), "+f"(x[9][1]), "+f"(x[9][2]), "+f"(x[9][3]), "+f"(x[10][0]), "+f"(x[10][1]),
                   "+f"(x[10][2]), "+f"(x[10][3]), "+f"(x[11][0]), "+f"(x[11][1]), "+f"(x[11][2]), "+f"(x[11][3]),
                   "+f"(x[12][0]), "+f"(x[12][1]), "+f"(x[12][2]), "+f"(x[12][3]), "+f"(x[13][0]), "+f"(x[13][1]),
                   "+f"(x[13][2]), "+f"(x[13][3]), "+f"(x[14][0]), "+f"(x[14][1]), "+f"(x[14][2]), "+f"(x[14][3]),
                   "+f"(x[15][0]), "+f"(x[15][1]), "+f"(x[15][2]), "+f"(x[15][3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

/* The same for 16 columns, what D 80 and 96 have beside whole panels. */
__device__ inline void wgmma_values_16(float (*x)[4], const uint32_t (&a)[4], uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12, 1, 1, 1, 1;\n"
                 : "+f"(x[0][0]), "+f"(x[0][1]), "+f"(x[0][2]), "+f"(x[0][3]), "+f"(x[1][0]), "+f"(x[1][1]),
                   "+f"(x[1][2]), "+f"(x[1][3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

/* Keeps what the compiler does with accumulators on its side of the asynchronous products. */
template <int N>
__device__ inline void pin(float (&x)[N][4])
{
#pragma unroll
    for (int n = 0; n < N; n++)
        asm volatile("" : "+f"(x[n][0]), "+f"(x[n][1]), "+f"(x[n][2]), "+f"(x[n][3])::"memory");
}

/* Before products that add to or overwrite x. */
template <int N>
__device__ inline void begin_products(float (&x)[N][4])
{
    pin(x);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

/* Waits for all products started but the last PENDING. Then their accumulators are to be pinned. */
template <int PENDING>
__device__ inline void wait_for_products()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

constexpr int PANEL_BYTES = TILE * PANEL_ROW_BYTES;
constexpr int ROW_GROUP_BYTES = 8 * PANEL_ROW_BYTES;

/* Starts scores[64 tokens] = q k^T */
template <int HEAD_DIM>
__device__ inline void start_key_product(float (&scores)[TILE / 8][4], const uint32_t (&q)[HEAD_DIM / 16][4],
                                         const uint8_t *k_smem)
{
    uint64_t keys = descriptor(uniform_smem_address(k_smem), 16, ROW_GROUP_BYTES);
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; k++)
        wgmma_keys(scores, q[k], further(keys, k / 4 * PANEL_BYTES + k % 4 * 32), k > 0);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/* The same with the 64 rows of q in panels; addresses in shared memory, uniform ones. */
template <int HEAD_DIM>
__device__ inline void start_key_product(float (&scores)[TILE / 8][4], uint32_t q_address, uint32_t k_address)
{
    uint64_t queries = descriptor(q_address, 16, ROW_GROUP_BYTES);
    uint64_t keys = descriptor(k_address, 16, ROW_GROUP_BYTES);
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; k++)
        wgmma_keys(scores, further(queries, k / 4 * PANEL_BYTES + k % 4 * 32),
                   further(keys, k / 4 * PANEL_BYTES + k % 4 * 32), k > 0);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/* scores[64 tokens] = (sum of the two parts of q) k^T in f16, at once. The parts are the 64 rows in panels. */
template <int HEAD_DIM>
__device__ inline void exact_key_product(float (&scores)[TILE / 8][4], const uint8_t *high_smem,
                                         const uint8_t *low_smem, const uint8_t *k_smem)
{
    uint64_t parts[2] = {descriptor(uniform_smem_address(high_smem), 16, ROW_GROUP_BYTES),
                         descriptor(uniform_smem_address(low_smem), 16, ROW_GROUP_BYTES)};
    uint64_t keys = descriptor(uniform_smem_address(k_smem), 16, ROW_GROUP_BYTES);
    begin_products(scores);
#pragma unroll
    for (int part = 0; part < 2; part++)
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 16; k++)
            wgmma_exact_keys(scores, further(parts[part], k / 4 * PANEL_BYTES + k % 4 * 32),
                             further(keys, k / 4 * PANEL_BYTES + k % 4 * 32), part > 0 || k > 0);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    wait_for_products<0>();
    pin(scores);
}

/* out += p v of 16 tokens */
template <int HEAD_DIM>
__device__ inline void start_value_step(float (&out)[HEAD_DIM / 8][4], const uint32_t (&p)[4], uint64_t values)
{
    if constexpr (HEAD_DIM == 128) {
        wgmma_values_128(out, p, values);
    } else {
#pragma unroll
        for (int panel = 0; panel < HEAD_DIM / 64; panel++)
            wgmma_values_64(&out[panel * 8], p, further(values, panel * PANEL_BYTES));
#pragma unroll
        for (int rest = HEAD_DIM / 64 * 64; rest < HEAD_DIM; rest += 16)
            wgmma_values_16(&out[rest / 8], p, further(values, rest / 64 * PANEL_BYTES + rest % 64 * 2));
    }
}

/* Starts out += (sum of the parts of p) v */
template <int HEAD_DIM, int PARTS>
__device__ inline void start_value_product(float (&out)[HEAD_DIM / 8][4], const uint32_t (&p)[PARTS][KEY_STEPS][4],
                                           uint32_t v_address)
{
    uint64_t values = descriptor(v_address, PANEL_BYTES, ROW_GROUP_BYTES);
#pragma unroll
    for (int k = 0; k < KEY_STEPS; k++)
#pragma unroll
        for (int part = 0; part < PARTS; part++)
            start_value_step<HEAD_DIM>(out, p[part][k], further(values, k * 16 * PANEL_ROW_BYTES));
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/* scores[64 tokens] = q k^T, at once. */
template <int HEAD_DIM>
__device__ inline void key_product(float (&scores)[TILE / 8][4], const uint32_t (&q)[HEAD_DIM / 16][4],
                                   const uint8_t *k_smem)
{
    begin_products(scores);
    start_key_product<HEAD_DIM>(scores, q, k_smem);
    wait_for_products<0>();
    pin(scores);
}

/* out += (sum of the parts of p) v, at once. */
template <int HEAD_DIM, int PARTS>
__device__ inline void value_product(float (&out)[HEAD_DIM / 8][4], const uint32_t (&p)[PARTS][KEY_STEPS][4],
                                     const uint8_t *v_smem)
{
    begin_products(out);
    start_value_product<HEAD_DIM, PARTS>(out, p, uniform_smem_address(v_smem));
    wait_for_products<0>();
    pin(out);
}

#endif /* KSORT_CUDA_PROMPT_WGMMA_PRODUCTS_CUH */
