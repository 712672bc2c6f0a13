/* What the pool's threads and the calls that use them share. */
#ifndef KSORT_POOL_H
#define KSORT_POOL_H

#include "attend.h"
#include "linear.h"
#include "pack.h"
#include "rows.h"

enum phase { PHASE_CHECK, PHASE_WRITE, PHASE_ATTEND, PHASE_JOIN, PHASE_LINEAR, PHASE_RMS_NORM, PHASE_SWIGLU, N_PHASES };

/* The checked arguments of a call. */
struct step {
    struct pack_job pack[2];  /* k, v; args NULL: none */
    struct attend_job attend; /* args NULL: none */
    struct linear_job linear;
    struct rms_norm_job rms_norm;
    struct swiglu_job swiglu;
};

/* Does one part of a phase. */
ksort_status ksort_run_part(const struct step *step, enum phase phase, uint32_t part, uint32_t n_parts);

uint32_t ksort_pool_threads(const struct ksort_pool *pool);

/* To be filled by the caller while no part is being done. */
struct step *ksort_pool_new_step(struct ksort_pool *pool);

/* The step is filled: tells the threads. */
void ksort_pool_begin(struct ksort_pool *pool);

/* The caller's side of one phase, after ksort_pool_begin. Returns the step's status so far. */
ksort_status ksort_pool_run_phase(struct ksort_pool *pool, enum phase phase, uint32_t n_parts);

#endif /* KSORT_POOL_H */
