/* Row operations of a transformer block with AVX2: row_operations.h. */
#include "x86/lanes_avx2.h"

#include "row_operations.h"

void ksort_avx2_rms_norm(float *x, const float *added, const float *gain, uint32_t n, float epsilon, float *y)
{
    rms_norm_row(x, added, gain, n, epsilon, y);
}

void ksort_avx2_swiglu(const float *gate, const float *up, uint32_t n, float *y)
{
    swiglu_row(gate, up, n, y);
}
