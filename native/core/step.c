#include "step.h"

#include "attend.h"
#include "pack.h"

/* The checked arguments. */
struct ksort_step {
    bool packs[2], attends; /* what was given: k and v, attend */
    struct pack_job pack[2];
    struct attend_job attend;
};

size_t ksort_step_bytes(void)
{
    return sizeof(struct ksort_step);
}

ksort_status ksort_step_prepare(struct ksort_step *step, const ksort_pack_args *k, const ksort_pack_args *v,
                                const ksort_attend_args *attend, uint32_t n_parts)
{
    const ksort_pack_args *pack[2] = {k, v};
    ksort_status status = KSORT_OK;
    for (int i = 0; i < 2 && status == KSORT_OK; i++) {
        step->packs[i] = pack[i] != NULL;
        if (pack[i])
            status = ksort_pack_prepare(pack[i], &step->pack[i]);
    }
    step->attends = attend != NULL;
    if (status == KSORT_OK && attend)
        status = ksort_attend_prepare(attend, n_parts, true, &step->attend);
    return status;
}

bool ksort_step_has(const struct ksort_step *step, enum step_phase phase)
{
    bool packs = step->packs[0] || step->packs[1];
    switch (phase) {
    case STEP_CHECK: return packs || step->attends;
    case STEP_WRITE: return packs;
    default: return step->attends;
    }
}

static ksort_status check_part(const struct ksort_step *step, uint32_t ith, uint32_t n_parts)
{
    ksort_status status = KSORT_OK;
    for (int i = 0; i < 2 && status == KSORT_OK; i++)
        if (step->packs[i])
            status = ksort_pack_check(&step->pack[i], ith, n_parts);
    if (status == KSORT_OK && step->attends)
        status = ksort_attend_check(&step->attend, ith, n_parts);
    return status;
}

static ksort_status write_part(const struct ksort_step *step, uint32_t ith, uint32_t n_parts)
{
    for (int i = 0; i < 2; i++)
        if (step->packs[i])
            ksort_pack_write(&step->pack[i], ith, n_parts);
    return KSORT_OK;
}

ksort_status ksort_step_part(const struct ksort_step *step, enum step_phase phase, uint32_t ith, uint32_t n_parts)
{
    switch (phase) {
    case STEP_CHECK: return check_part(step, ith, n_parts);
    case STEP_WRITE: return write_part(step, ith, n_parts);
    case STEP_ATTEND: return ksort_attend_run(&step->attend, ith, n_parts);
    default: return ksort_attend_join(&step->attend, ith, n_parts);
    }
}
