/* Kernels of a call that begin while the one before them still runs (programmatic dependent launch, sm_90 and later):
 *
 *     pack, ... ====|
 *     prepare_queries    ====|
 *     decode              ...|=========|        ... asks for its first tiles, then waits
 *     merge                       .....|====|   ... finds its row, then waits; blocks come as decode's leave
 *
 * prepare_queries is launched the ordinary way, decode and merge by launch_dependent. A dependent kernel begins when
 * every block of the kernel before it has called let_dependent_begin, and wait_for_kernel_before returns when that
 * kernel is complete and its writes are visible. So before it waits a kernel
 *   - may read what was written before the call of ksort_cuda_attend: tiles (ksort_cuda_pack), lengths, page tables.
 *     These are complete, as prepare_queries has begun, and it begins after all that. Were prepare_queries a dependent
 *     kernel too, it could begin, and decode after it, while pack still runs;
 *   - must not read what earlier phases write, nor write anything but *device_status.
 * Every thread waits, also where it has nothing to do: otherwise merge could be complete before decode is, and what is
 * launched after merge would only wait for merge.
 */
#ifndef KSORT_DEPENDENT_LAUNCH_CUH
#define KSORT_DEPENDENT_LAUNCH_CUH

#include "device.cuh"

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

#endif /* KSORT_DEPENDENT_LAUNCH_CUH */
