/* A checked matrix product. */
#ifndef KSORT_LINEAR_H
#define KSORT_LINEAR_H

#include "run_kernels.h"

struct linear_job {
    ksort_linear_args args;
    const struct run_kernels *kernels;
    uint32_t n_long; /* parts that come first and are longer than the others; 0: all parts are alike */
};

/* Reads a caller's arguments and checks them. Returns KSORT_OK, _ARGUMENT, _STRUCT_SIZE, _TYPE, _KERNELS. */
ksort_status ksort_linear_prepare(const ksort_linear_args *from, struct linear_job *job);

/* Outputs of part ith of nth. */
void ksort_linear_run(const struct linear_job *job, uint32_t ith, uint32_t nth);

/* Parts for a pool. Few rows: a long part for each thread, as long streams of weights are read fastest, then short
 * ones, so that a thread which lost its core does not hold up the others. */
uint32_t ksort_linear_parts(struct linear_job *job, uint32_t n_threads);

#endif /* KSORT_LINEAR_H */
