/* Row operations of a transformer block: RMSNorm and SwiGLU, one row. Bytes moved: the row in and out. */
#include <math.h>

#include "run_kernels.h"

static void rms_norm(float *x, const float *added, float added_scale, const float *gain, uint32_t n, float epsilon,
                     float *y)
{
    float sum = 0.0f;
    for (uint32_t i = 0; i < n; i++) {
        if (added)
            x[i] += added_scale * added[i];
        sum += x[i] * x[i];
    }
    float factor = 1.0f / sqrtf(sum / (float)n + epsilon);
    for (uint32_t i = 0; i < n; i++)
        y[i] = x[i] * factor * gain[i];
}

static void swiglu(const float *gate, const float *up, uint32_t n, float *y)
{
    for (uint32_t i = 0; i < n; i++)
        y[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

const struct run_kernels ksort_run_scalar = {ksort_run_scalar_linear, rms_norm, swiglu};
