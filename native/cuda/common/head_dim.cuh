/* The head dimensions that kernels are compiled for. Each has translation units of its own (KSORT_HEAD_DIMS in
 * CMakeLists.txt has the same list: one that is missing there does not link). */
#ifndef KSORT_CUDA_COMMON_HEAD_DIM_CUH
#define KSORT_CUDA_COMMON_HEAD_DIM_CUH

#include <stdint.h>

#include <type_traits>

/* call(std::integral_constant<int, head_dim>()), or `otherwise` where no kernel has that head dimension. */
template <typename RESULT, typename CALL>
RESULT with_head_dim(uint32_t head_dim, RESULT otherwise, CALL call)
{
    switch (head_dim) {
    case 64: return call(std::integral_constant<int, 64>());
    case 80: return call(std::integral_constant<int, 80>());
    case 96: return call(std::integral_constant<int, 96>());
    case 128: return call(std::integral_constant<int, 128>());
    case 256: return call(std::integral_constant<int, 256>());
    default: return otherwise;
    }
}

#endif /* KSORT_CUDA_COMMON_HEAD_DIM_CUH */
