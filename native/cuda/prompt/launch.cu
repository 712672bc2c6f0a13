/* Prompt attention, launched: several query tokens a context, on tensor cores, straight from packed tiles. Heads of up
 * to 128 channels on sm_90a by prompt/wgmma/kernel.cuh, others by prompt/mma/kernel.cuh. Compiled once a head
 * dimension.
 *
 * P is split in two f16 parts (22 bits), which makes 3 products of 2 and costs some 105 us of 385 on an H100 (4096
 * tokens, 32 heads on 8). For outputs of 16 bits one part (11 bits) does where a row sees more than SHORT_SLOTS slots,
 * as its errors cancel. Such long rows and short ones are two launches: both ways in one kernel would cost all rows
 * some 10%, for want of registers.
 */
#include "prompt/mma/kernel.cuh"
#include "prompt/wgmma/kernel.cuh"

template <int HEAD_DIM>
static uint32_t prompt_smem_bytes(const attend_job &job)
{
    typedef prompt_shape<HEAD_DIM> shape;
    return shape::expanded_bytes + shape::n_buffers * stage_bytes<HEAD_DIM>(job);
}

/* Allows a kernel the shared memory that a job takes. */
template <int HEAD_DIM, int PARTS>
static cudaError_t allow_smem(const attend_job &job, bool has_wgmma)
{
    if constexpr (HEAD_DIM <= 128)
        if (has_wgmma)
            return cudaFuncSetAttribute(prompt_wgmma_kernel<HEAD_DIM, PARTS>,
                                        cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        (int)wgmma_smem_bytes<HEAD_DIM>(job));
    return cudaFuncSetAttribute(prompt_kernel<HEAD_DIM, PARTS>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                (int)prompt_smem_bytes<HEAD_DIM>(job));
}

/* is_second: the launch before it has other rows of the same prompt. */
template <int HEAD_DIM, int PARTS>
static cudaError_t launch_rows(const attend_job &job, slot_range range, bool is_second, bool has_wgmma,
                               cudaStream_t stream)
{
    typedef prompt_shape<HEAD_DIM> shape;
    if constexpr (HEAD_DIM <= 128)
        if (has_wgmma)
            return launch_prompt_wgmma<HEAD_DIM, PARTS>(job, range, is_second, stream);
    prompt_kernel<HEAD_DIM, PARTS>
        <<<n_row_blocks(job, range, shape::rows), shape::threads, prompt_smem_bytes<HEAD_DIM>(job), stream>>>(job,
                                                                                                              range);
    return cudaGetLastError();
}

/* Whether no row sees more than SHORT_SLOTS slots. */
static bool has_short_rows_only(const attend_job &job)
{
    return job.max_slots <= SHORT_SLOTS || (job.window && job.window <= SHORT_SLOTS);
}

template <int HEAD_DIM>
cudaError_t launch_prompt(const attend_job &job, cudaStream_t stream)
{
    bool has_wgmma = false;
    cudaError_t error = cudaSuccess;
    if constexpr (HEAD_DIM <= 128)
        error = find_wgmma<HEAD_DIM>(has_wgmma);
    if (error == cudaSuccess)
        error = allow_smem<HEAD_DIM, 2>(job, has_wgmma);
    if (error != cudaSuccess)
        return error;
    if (job.x_type == KSORT_F32 || has_short_rows_only(job))
        return launch_rows<HEAD_DIM, 2>(job, {0, UINT32_MAX}, false, has_wgmma, stream);
    error = allow_smem<HEAD_DIM, 1>(job, has_wgmma); /* what CUDA refuses here writes nothing */
    if (error == cudaSuccess)
        error = launch_rows<HEAD_DIM, 1>(job, {SHORT_SLOTS, UINT32_MAX}, false, has_wgmma, stream);
    if (error == cudaSuccess)
        error = launch_rows<HEAD_DIM, 2>(job, {0, SHORT_SLOTS}, true, has_wgmma, stream);
    return error;
}

template cudaError_t launch_prompt<KSORT_HEAD_DIM>(const attend_job &, cudaStream_t);
