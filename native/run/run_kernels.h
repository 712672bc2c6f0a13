/* The runner's kernel table: what a level does for products and rows, beside the cache's table (core/kernels.h). */
#ifndef KSORT_RUN_KERNELS_H
#define KSORT_RUN_KERNELS_H

#include "common.h"

#pragma GCC visibility push(default)
#include "ksort_run.h"
#pragma GCC visibility pop

#define LINEAR_ROWS 4 /* rows of x that are few: they share each load of a weight */

/* Some outputs of a matrix product: y[r][o] = sum over i of weights[o][i] * x[r][i]. */
struct linear_block {
    const void *weights; /* [n_out, n_in] */
    const float *x;
    float *y;
    size_t x_row_stride; /* floats */
    size_t y_row_stride; /* floats */
    size_t n_out;        /* may be 0 */
    size_t n_in;
    uint32_t n_rows;
    uint32_t type; /* KSORT_F32, KSORT_F16 or KSORT_BF16 */
};

typedef void linear_function(const struct linear_block *block);

/* One vector or row each, see ksort_rms_norm and ksort_swiglu; n is at least 1. */
typedef void rms_norm_function(float *x, const float *added, float added_scale, const float *gain, uint32_t n,
                               float epsilon, float *y);
typedef void swiglu_function(const float *gate, const float *up, uint32_t n, float *y);

struct run_kernels {
    linear_function *linear;
    rms_norm_function *rms_norm;
    swiglu_function *swiglu;
};

/* One a level; the levels "avx512bw" and "avx512" share theirs. Each stands in its level's rows_*.c. */
extern const struct run_kernels ksort_run_scalar, ksort_run_avx2, ksort_run_avx512, ksort_run_neon;

linear_function ksort_run_scalar_linear, ksort_run_avx2_linear, ksort_run_avx512_linear, ksort_run_neon_linear;

/* The table of the level that libksort uses, or NULL where that is "unsupported". */
const struct run_kernels *ksort_run_kernels(void);

#endif /* KSORT_RUN_KERNELS_H */
