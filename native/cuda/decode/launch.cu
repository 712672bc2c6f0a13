/* Decode attention, launched: which kernel of decode/kernel.cuh. Compiled once a head dimension. */
#include "decode/kernel.cuh"

template <uint32_t HEAD_DIM, uint32_t K_TYPE, uint32_t V_TYPE>
static cudaError_t launch_types(const attend_job &job, cudaStream_t stream)
{
    constexpr decode_shape SHAPE = shape_of(HEAD_DIM, K_TYPE, V_TYPE);
    return launch_decode_shaped<HEAD_DIM, K_TYPE, V_TYPE, SHAPE.warps, SHAPE.stages, SHAPE.blocks>(job, stream);
}

template <uint32_t HEAD_DIM, uint32_t K_TYPE>
static cudaError_t launch_k(const attend_job &job, cudaStream_t stream)
{
    switch (job.v.layout.type) {
    case KSORT_F16: return launch_types<HEAD_DIM, K_TYPE, KSORT_F16>(job, stream);
    case KSORT_BF16: return launch_types<HEAD_DIM, K_TYPE, KSORT_BF16>(job, stream);
    case KSORT_BFP16: return launch_types<HEAD_DIM, K_TYPE, KSORT_BFP16>(job, stream);
    case KSORT_SBFP12: return launch_types<HEAD_DIM, K_TYPE, KSORT_SBFP12>(job, stream);
    case KSORT_SBFP11: return launch_types<HEAD_DIM, K_TYPE, KSORT_SBFP11>(job, stream);
    default: return launch_types<HEAD_DIM, K_TYPE, KSORT_BFP12>(job, stream);
    }
}

template <int HEAD_DIM>
cudaError_t launch_decode(const attend_job &job, cudaStream_t stream)
{
    switch (job.k.layout.type) {
    case KSORT_BFP16: return launch_k<HEAD_DIM, KSORT_BFP16>(job, stream);
    case KSORT_BFP14: return launch_k<HEAD_DIM, KSORT_BFP14>(job, stream);
    case KSORT_SBFP12: return launch_k<HEAD_DIM, KSORT_SBFP12>(job, stream);
    case KSORT_SBFP11: return launch_k<HEAD_DIM, KSORT_SBFP11>(job, stream);
    default: return launch_k<HEAD_DIM, KSORT_BFP12>(job, stream);
    }
}

template cudaError_t launch_decode<KSORT_HEAD_DIM>(const attend_job &, cudaStream_t);
