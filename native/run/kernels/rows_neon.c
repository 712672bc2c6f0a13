/* Row operations of a transformer block with Advanced SIMD: row_operations.h. */
#include "arm/lanes_neon.h"

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

const struct run_kernels ksort_run_neon = {ksort_run_neon_linear, rms_norm, swiglu};
