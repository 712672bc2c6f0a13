/* The instructions that decoding stands on: tensor core products, loads into shared memory, byte permutation.
 *
 * Fragments of an mma, lane = 4 * n + j (n = 0..7, j = 0..3), 32-bit registers:
 *     A [16 rows][k]:  registers 0, 2: row n; 1, 3: row n + 8.  0, 1: first half of k; 2, 3: second half
 *     B [k][8 columns]: column n; registers 0, 1: first and second half of k
 *     C [16][8]:       values 0, 1: row n, columns 2j, 2j + 1; values 2, 3: row n + 8
 * A half of k has 16 bytes or 8 two-byte values, of which register r of lane j holds bytes 4j .. 4j+3.
 */
#ifndef KSORT_CUDA_DECODE_MMA_CUH
#define KSORT_CUDA_DECODE_MMA_CUH

#include "common/device.cuh"

/* c += A B, int8, k = 32. */
__device__ inline void mma_int8(int32_t (&c)[4], const uint4 &a, uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

/* c += A B, f16, k = 16. */
__device__ inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* c += A B, bf16, k = 16. */
__device__ inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* Four 8x8 matrices of 2-byte values, transposed: row r of matrix i is the 16 bytes at lane 8i + r's address. */
__device__ inline void load_transposed(const uint8_t *row_smem, uint32_t (&matrices)[4])
{
    uint32_t address = (uint32_t)__cvta_generic_to_shared(row_smem);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(address)
                 : "memory");
}

/* The same, not transposed. */
__device__ inline void load_straight(const uint8_t *row_smem, uint32_t (&matrices)[4])
{
    uint32_t address = (uint32_t)__cvta_generic_to_shared(row_smem);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(address)
                 : "memory");
}

/* Asks for 16 bytes; past L1, which would hold them for nobody. Addresses in shared memory are 32-bit. */
__device__ inline void copy_16_async(uint32_t to_smem, const uint8_t *from_gmem)
{
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to_smem), "l"(from_gmem) : "memory");
}

__device__ inline void commit_copies()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* Waits until at most N of the lane's last commits are under way. */
template <int N>
__device__ inline void wait_for_copies()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/* The lane, as a value that the compiler keeps: it would read it anew, which takes long, where registers are scarce. */
__device__ inline uint32_t lane_of_warp()
{
    uint32_t lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
}

/* (x & mask) ^ bits. Two constants don't fit an instruction: left alone the compiler makes two of this. */
__device__ inline uint32_t and_xor(uint32_t x, uint32_t mask, uint32_t bits)
{
    uint32_t y;
    asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(y) : "r"(x), "r"(mask), "r"(bits));
    return y;
}

__device__ inline uint32_t bits_of(__nv_bfloat162 x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

__device__ inline __nv_bfloat162 bf16_pair(uint32_t bits)
{
    __nv_bfloat162 x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

#endif /* KSORT_CUDA_DECODE_MMA_CUH */
