/* One layer's step in phases, for threads that are not the library's: packs k and v, then attends.
 *
 *     check k, v, q  |  write k, v  |  attend  |  join cut units
 *
 * So all that is given is checked once a step, and all of it before anything is written. Exported, but no part of the
 * ABI: only the libksort_run of the same build calls these. */
#ifndef KSORT_STEP_H
#define KSORT_STEP_H

#include "common.h"

struct ksort_step;

enum step_phase { STEP_CHECK, STEP_WRITE, STEP_ATTEND, STEP_JOIN, N_STEP_PHASES };

#pragma GCC visibility push(default)

/* Bytes of a step, whose memory is the caller's and may not move while it is used. */
size_t ksort_step_bytes(void);

/* Checks all arguments but the values of x and q; k, v and attend may be NULL each. The step refers to what they point
 * to. Every phase has n_parts parts, and begins when all parts of the one before have ended.
 * Returns as ksort_pack and ksort_attend do. */
ksort_status ksort_step_prepare(struct ksort_step *step, const ksort_pack_args *k, const ksort_pack_args *v,
                                const ksort_attend_args *attend, uint32_t n_parts);

/* Whether there is something to do in a phase. */
bool ksort_step_has(const struct ksort_step *step, enum step_phase phase);

/* Part ith of n_parts. Returns KSORT_OK, _NON_FINITE, _RANGE. */
ksort_status ksort_step_part(const struct ksort_step *step, enum step_phase phase, uint32_t ith, uint32_t n_parts);

#pragma GCC visibility pop

#endif /* KSORT_STEP_H */
