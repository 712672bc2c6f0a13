/* What callers without threads of their own do over a pool: one layer's step, in the phases of core/step.h, or one
 * operation. A phase has as many parts as there are threads, a matrix product more. */
#include "linear.h"
#include "pool.h"
#include "rows.h"
#include "step.h"

#define FEWEST_SHARED_ROWS 8 /* fewer are done sooner by the caller alone */

struct phase_of_step {
    const struct ksort_step *step;
    enum step_phase phase;
};

static ksort_status step_part(const void *context, uint32_t ith, uint32_t nth)
{
    const struct phase_of_step *of = context;
    return ksort_step_part(of->step, of->phase, ith, nth);
}

ksort_status ksort_pool_step(ksort_pool *pool, const ksort_pack_args *k, const ksort_pack_args *v,
                             const ksort_attend_args *attend)
{
    if (!pool)
        return KSORT_ERR_ARGUMENT;
    struct ksort_step *step = ksort_pool_step_memory(pool);
    uint32_t n_threads = ksort_pool_threads(pool);
    ksort_status status = ksort_step_prepare(step, k, v, attend, n_threads);
    if (status != KSORT_OK)
        return status;
    ksort_pool_begin(pool);
    for (int phase = 0; phase < N_STEP_PHASES && status == KSORT_OK; phase++) {
        struct phase_of_step of = {step, (enum step_phase)phase};
        if (ksort_step_has(step, of.phase))
            status = ksort_pool_run(pool, step_part, &of, n_threads);
    }
    return status;
}

static ksort_status linear_part(const void *context, uint32_t ith, uint32_t nth)
{
    ksort_linear_run(context, ith, nth);
    return KSORT_OK;
}

ksort_status ksort_pool_linear(ksort_pool *pool, const ksort_linear_args *args)
{
    struct linear_job job;
    ksort_status status = pool ? ksort_linear_prepare(args, &job) : KSORT_ERR_ARGUMENT;
    if (status != KSORT_OK)
        return status;
    uint32_t n_parts = ksort_linear_parts(&job, ksort_pool_threads(pool));
    ksort_pool_begin(pool);
    return ksort_pool_run(pool, linear_part, &job, n_parts);
}

/* Rows, all alike: few of them by the caller alone. */
static ksort_status run_rows(ksort_pool *pool, pool_function *function, const void *job, uint32_t n_rows)
{
    if (n_rows < FEWEST_SHARED_ROWS)
        return function(job, 0, 1);
    ksort_pool_begin(pool);
    return ksort_pool_run(pool, function, job, ksort_pool_threads(pool));
}

static ksort_status rms_norm_part(const void *context, uint32_t ith, uint32_t nth)
{
    ksort_rms_norm_run(context, ith, nth);
    return KSORT_OK;
}

ksort_status ksort_pool_rms_norm(ksort_pool *pool, const ksort_rms_norm_args *args)
{
    struct rms_norm_job job;
    ksort_status status = pool ? ksort_rms_norm_prepare(args, &job) : KSORT_ERR_ARGUMENT;
    return status == KSORT_OK ? run_rows(pool, rms_norm_part, &job, job.args.n_rows) : status;
}

static ksort_status swiglu_part(const void *context, uint32_t ith, uint32_t nth)
{
    ksort_swiglu_run(context, ith, nth);
    return KSORT_OK;
}

ksort_status ksort_pool_swiglu(ksort_pool *pool, const ksort_swiglu_args *args)
{
    struct swiglu_job job;
    ksort_status status = pool ? ksort_swiglu_prepare(args, &job) : KSORT_ERR_ARGUMENT;
    return status == KSORT_OK ? run_rows(pool, swiglu_part, &job, job.args.n_rows) : status;
}
