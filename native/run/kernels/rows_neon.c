/* Row operations of a transformer block with Advanced SIMD: row_operations.h. */
#include "arm/lanes_neon.h"

#include "row_operations.h"

void ksort_neon_rms_norm(float *x, const float *added, const float *gain, uint32_t n, float epsilon, float *y)
{
    rms_norm_row(x, added, gain, n, epsilon, y);
}

void ksort_neon_swiglu(const float *gate, const float *up, uint32_t n, float *y)
{
    swiglu_row(gate, up, n, y);
}
