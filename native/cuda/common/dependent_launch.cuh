/* Kernels that begin while the one before them still runs (programmatic dependent launch, sm_90 and later):
 *
 *     ...             ====|
 *     pack             ...|====|                       ... asks L2 for rows of x, then waits
 *     prepare_queries          ====|
 *     decode                    ...|=========|         ... asks for its first tiles, then waits
 *     merge                             .....|====|    ... finds its row, then waits; blocks come as decode's leave
 *
 *     prepare_queries          ====|
 *     prompt, long rows         ...|==========|        ... makes its first tiles, then waits
 *     prompt, short rows            ..======..|        blocks come as multiprocessors get free; they wait at their end
 *
 * pack (of GROUP_SLOTS tokens or more, without transforms), pack_exact, which waits at once, decode, merge and
 * prompts on sm_90a are launched by launch_dependent, all others the ordinary way: after all that was launched before
 * is complete. A dependent kernel begins when every block of the kernel before it has ended or called
 * let_dependent_begin, and wait_for_kernel_before returns when that kernel is complete and its writes are visible. So
 * before it waits
 *   - pack must not read or write anything: what is before it may be any kernel, and write rows, lengths and tables.
 *     It only asks L2 for rows (prefetch_into_l2);
 *   - decode, merge and prompts may read what was written before the call of ksort_cuda_attend: tiles
 *     (ksort_cuda_pack), lengths, page tables. These are complete, as prepare_queries has begun, and it begins after
 *     all that. Were prepare_queries a dependent kernel too, it could begin, and decode after it, while pack still
 *     runs. They must not read what earlier phases write, nor write anything but *device_status;
 *   - a prompt's short rows may do everything: read queries, as every block of its long rows has waited for
 *     prepare_queries before it called let_dependent_begin (from L2: L1 may have lines of before), and write outputs,
 *     as no row is of both.
 * Every thread waits, also where it has nothing to do: otherwise merge could be complete before decode is, and what is
 * launched after merge would only wait for merge; and so with pack and what is before it, and with a prompt's rows.
 *
 * pack calls let_dependent_begin at once: its successor is pack again, which waits, or is launched the ordinary way, or
 * is a caller's dependent kernel, which has to wait before it reads tiles. A prompt's first kernel calls it when it has
 * waited: its successor is the second, or, where there is none, one of those.
 */
#ifndef KSORT_CUDA_COMMON_DEPENDENT_LAUNCH_CUH
#define KSORT_CUDA_COMMON_DEPENDENT_LAUNCH_CUH

#include "common/device.cuh"

/* PTX architecture from which kernels have the two functions below; older ones are launched after one another. */
constexpr int DEPENDENT_LAUNCH_PTX = 90;

__device__ inline void let_dependent_begin()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ inline void wait_for_kernel_before()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* Asks L2 for the line of an address, and reads nothing: L2 is where the writes of all kernels meet, so a line that is
 * there early is not an old one. */
__device__ inline void prefetch_into_l2(const void *address)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

/* Launches a kernel that calls wait_for_kernel_before. What counts is the code that the device runs, not the device:
 * code for sm_80 that was translated for a newer device does not wait. */
template <typename JOB>
cudaError_t launch_dependent(cudaLaunchConfig_t config, void (*kernel)(JOB), const JOB &job)
{
    cudaFuncAttributes code;
    cudaError_t error = cudaFuncGetAttributes(&code, kernel);
    if (error != cudaSuccess)
        return error;
    cudaLaunchAttribute dependent = {};
    dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    dependent.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &dependent;
    config.numAttrs = code.ptxVersion >= DEPENDENT_LAUNCH_PTX ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, job);
}

#endif /* KSORT_CUDA_COMMON_DEPENDENT_LAUNCH_CUH */
