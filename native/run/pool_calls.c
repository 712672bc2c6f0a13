/* What callers without threads of their own do over a pool: one layer's step, in four phases, or one operation, in one:
 *
 *     check k, v, q  |  write k, v  |  attend  |  join cut units
 *     linear, RMSNorm or SwiGLU
 *
 * A phase has as many parts as there are threads, a matrix product more.
 */
#include "pool.h"

#define FEWEST_SHARED_ROWS 8 /* fewer are done sooner by the caller alone */

static ksort_status check_part(const struct step *step, uint32_t part, uint32_t n_parts)
{
    ksort_status status = KSORT_OK;
    for (int i = 0; i < 2 && status == KSORT_OK; i++)
        if (step->pack[i].args)
            status = ksort_pack_check(&step->pack[i], part, n_parts);
    if (status == KSORT_OK && step->attend.args)
        status = ksort_attend_check(&step->attend, part, n_parts);
    return status;
}

static ksort_status write_part(const struct step *step, uint32_t part, uint32_t n_parts)
{
    for (int i = 0; i < 2; i++)
        if (step->pack[i].args)
            ksort_pack_write(&step->pack[i], part, n_parts);
    return KSORT_OK;
}

ksort_status ksort_run_part(const struct step *step, enum phase phase, uint32_t part, uint32_t n_parts)
{
    switch (phase) {
    case PHASE_CHECK:
        return check_part(step, part, n_parts);
    case PHASE_WRITE:
        return write_part(step, part, n_parts);
    case PHASE_ATTEND:
        return ksort_attend_run(&step->attend, part, n_parts);
    case PHASE_JOIN:
        return ksort_attend_join(&step->attend, part, n_parts);
    case PHASE_LINEAR:
        ksort_linear_run(&step->linear, part, n_parts);
        return KSORT_OK;
    case PHASE_RMS_NORM:
        ksort_rms_norm_run(&step->rms_norm, part, n_parts);
        return KSORT_OK;
    default:
        ksort_swiglu_run(&step->swiglu, part, n_parts);
        return KSORT_OK;
    }
}

ksort_status ksort_pool_step(ksort_pool *pool, const ksort_pack_args *k, const ksort_pack_args *v,
                             const ksort_attend_args *attend)
{
    if (!pool)
        return KSORT_ERR_ARGUMENT;
    struct step *step = ksort_pool_new_step(pool);
    uint32_t n_threads = ksort_pool_threads(pool);
    const ksort_pack_args *pack[2] = {k, v};
    *step = (struct step){.attend.args = NULL};
    ksort_status status = KSORT_OK;
    for (int i = 0; i < 2 && status == KSORT_OK; i++)
        if (pack[i])
            status = ksort_pack_prepare(pack[i], &step->pack[i]);
    if (status == KSORT_OK && attend)
        status = ksort_attend_prepare(attend, n_threads, true, &step->attend);
    if (status != KSORT_OK)
        return status;
    ksort_pool_begin(pool);
    status = ksort_pool_run_phase(pool, PHASE_CHECK, n_threads);
    if (status == KSORT_OK && (k || v))
        status = ksort_pool_run_phase(pool, PHASE_WRITE, n_threads);
    if (status == KSORT_OK && attend)
        status = ksort_pool_run_phase(pool, PHASE_ATTEND, n_threads);
    if (status == KSORT_OK && attend)
        status = ksort_pool_run_phase(pool, PHASE_JOIN, n_threads);
    return status;
}

ksort_status ksort_pool_linear(ksort_pool *pool, const ksort_linear_args *args)
{
    if (!pool)
        return KSORT_ERR_ARGUMENT;
    struct linear_job *job = &ksort_pool_new_step(pool)->linear;
    ksort_status status = ksort_linear_prepare(args, job);
    if (status != KSORT_OK)
        return status;
    uint32_t n_parts = ksort_linear_parts(job, ksort_pool_threads(pool));
    ksort_pool_begin(pool);
    return ksort_pool_run_phase(pool, PHASE_LINEAR, n_parts);
}

ksort_status ksort_pool_rms_norm(ksort_pool *pool, const ksort_rms_norm_args *args)
{
    if (!pool)
        return KSORT_ERR_ARGUMENT;
    struct rms_norm_job *job = &ksort_pool_new_step(pool)->rms_norm;
    ksort_status status = ksort_rms_norm_prepare(args, job);
    if (status != KSORT_OK)
        return status;
    if (args->n_rows < FEWEST_SHARED_ROWS) {
        ksort_rms_norm_run(job, 0, 1);
        return KSORT_OK;
    }
    ksort_pool_begin(pool);
    return ksort_pool_run_phase(pool, PHASE_RMS_NORM, ksort_pool_threads(pool));
}

ksort_status ksort_pool_swiglu(ksort_pool *pool, const ksort_swiglu_args *args)
{
    if (!pool)
        return KSORT_ERR_ARGUMENT;
    struct swiglu_job *job = &ksort_pool_new_step(pool)->swiglu;
    ksort_status status = ksort_swiglu_prepare(args, job);
    if (status != KSORT_OK)
        return status;
    if (args->n_rows < FEWEST_SHARED_ROWS) {
        ksort_swiglu_run(job, 0, 1);
        return KSORT_OK;
    }
    ksort_pool_begin(pool);
    return ksort_pool_run_phase(pool, PHASE_SWIGLU, ksort_pool_threads(pool));
}
