/* A checked matrix product. */
#ifndef KSORT_LINEAR_H
#define KSORT_LINEAR_H

#include "kernels.h"

struct linear_job {
    const ksort_linear_args *args;
    const struct kernels *kernels;
};

/* Checks args. Returns KSORT_OK, _ARGUMENT, _STRUCT_SIZE, _TYPE, _KERNELS. */
ksort_status ksort_linear_prepare(const ksort_linear_args *args, struct linear_job *job);

/* Outputs of part ith of nth. */
void ksort_linear_run(const struct linear_job *job, uint32_t ith, uint32_t nth);

/* Parts for a pool: many, so that a thread which lost its core does not hold up the others, but none too small. */
uint32_t ksort_linear_parts(const struct linear_job *job);

#endif /* KSORT_LINEAR_H */
