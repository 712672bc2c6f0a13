/* Row operations of a transformer block with AVX2: row_operations.h. */
#include "x86/lanes_avx2.h"

#include "row_operations.h"

static void rms_norm(float *x, const float *added, float added_scale, const float *gain, uint32_t n, float epsilon,
                     float *y)
{
    rms_norm_row(x, added, added_scale, gain, n, epsilon, y);
}

static void swiglu(const float *gate, const float *up, uint32_t n, float *y)
{
    swiglu_row(gate, up, n, y);
}

const struct run_kernels ksort_run_avx2 = {ksort_run_avx2_linear, rms_norm, swiglu};
