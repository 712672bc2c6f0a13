/* Checked row operations of a transformer block. */
#ifndef KSORT_ROWS_H
#define KSORT_ROWS_H

#include "run_kernels.h"

struct rms_norm_job {
    ksort_rms_norm_args args; /* heads and added_scale are not 0 */
    const struct run_kernels *kernels;
};

struct swiglu_job {
    ksort_swiglu_args args;
    const struct run_kernels *kernels;
};

/* Read a caller's arguments and check them. Return KSORT_OK, _ARGUMENT, _STRUCT_SIZE, _KERNELS. */
ksort_status ksort_rms_norm_prepare(const ksort_rms_norm_args *from, struct rms_norm_job *job);
ksort_status ksort_swiglu_prepare(const ksort_swiglu_args *from, struct swiglu_job *job);

/* Rows of part ith of nth. */
void ksort_rms_norm_run(const struct rms_norm_job *job, uint32_t ith, uint32_t nth);
void ksort_swiglu_run(const struct swiglu_job *job, uint32_t ith, uint32_t nth);

#endif /* KSORT_ROWS_H */
