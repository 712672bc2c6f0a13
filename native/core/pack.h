/* Packing in two steps, so that the pool can check k and v wholly before either is written. */
#ifndef KSORT_PACK_H
#define KSORT_PACK_H

#include "kernels.h"

struct pack_job {
    ksort_pack_args args; /* points to the four below, which are copies too: a job may not be moved */
    ksort_cache cache;
    ksort_exact exact;
    ksort_rope rope;
    ksort_transform transform;
    const struct kernels *kernels;
    struct head_layout layout;
    struct head_layout exact_layout; /* where the cache has exact rows */
    double growth;                   /* |RoPE(x)| <= growth * max|x|; see ksort_check_rope */
};

/* Reads a caller's arguments and checks everything but the values of x. Returns as ksort_pack, without _NON_FINITE and _RANGE. */
ksort_status ksort_pack_prepare(const ksort_pack_args *from, struct pack_job *job);

/* Checks part ith of nth of x. Returns KSORT_OK, _NON_FINITE, _RANGE. */
ksort_status ksort_pack_check(const struct pack_job *job, uint32_t ith, uint32_t nth);

/* Writes part ith of nth. All of x must have been checked. */
void ksort_pack_write(const struct pack_job *job, uint32_t ith, uint32_t nth);

#endif /* KSORT_PACK_H */
