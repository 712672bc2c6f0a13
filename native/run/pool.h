/* Threads that do the parts of a function together. Knows nothing of what is done. */
#ifndef KSORT_POOL_H
#define KSORT_POOL_H

#include "run_kernels.h"

/* Does part ith of nth. */
typedef ksort_status pool_function(const void *context, uint32_t ith, uint32_t nth);

uint32_t ksort_pool_threads(const struct ksort_pool *pool);

/* The pool's memory for the step of its caller: ksort_step_bytes of it. */
struct ksort_step *ksort_pool_step_memory(struct ksort_pool *pool);

/* Forgets the status of earlier runs, and wakes the threads. */
void ksort_pool_begin(struct ksort_pool *pool);

/* Does all parts, the caller among the threads, n_parts at most 65535. After ksort_pool_begin, as often as wanted; each
 * run sees what the one before wrote. Returns KSORT_OK, or one of the other statuses since ksort_pool_begin. */
ksort_status ksort_pool_run(struct ksort_pool *pool, pool_function *function, const void *context, uint32_t n_parts);

#endif /* KSORT_POOL_H */
