/* Attention: what is prepared once a call, how it is cut into units and shares, and one part's memory.
 *
 * Query row r (0 .. n_queries * group - 1) of a KV head is query head member r % group of token r / group. A unit is up
 * to MAX_ROWS neighbouring rows of one KV head with all tiles that any of them sees. The units of a call stand in a
 * line, KV head by KV head, and each part takes an equal, contiguous share of their tiles:
 *
 *     units:   |---- head 0 ----|---- head 1 ----|---- head 2 ----|     one call, 1 row block a head
 *     parts:   |--------- 0 --------|---------- 1 ----------------|
 *                                   ^ head 1 is cut here
 *
 * So one KV head keeps every part busy, and a part holds at most two cut units: one that an earlier part began (its
 * partial HEAD) and one that a later part ends (TAIL). A whole unit is written to out at once; of a cut unit every part
 * leaves its softmax states and accumulators in its scratch, and the part that began it joins them in merge.
 */
#ifndef KSORT_ATTEND_H
#define KSORT_ATTEND_H

#include "kernels.h"

struct attend_job {
    ksort_attend_args args; /* points to the five below, which are copies too: a job may not be moved */
    ksort_cache k_cache;
    ksort_cache v_cache;
    ksort_rope rope;
    ksort_transform k_transform;
    ksort_transform v_transform;
    const struct kernels *kernels;
    struct head_layout k;
    struct head_layout v;
    uint32_t group;      /* query heads a KV head */
    size_t n_rows;       /* query rows a KV head */
    size_t n_row_blocks; /* units a KV head */
    size_t head_tiles;   /* tiles of all units of a KV head */
    size_t n_tiles;      /* tiles of all units */
    size_t stride;       /* floats between accumulator rows */
};

struct unit {
    uint32_t kv_head;
    size_t first_row;
    uint32_t n_rows;
    struct range slots; /* seen by any row */
    struct range line;  /* place of its tiles in the line of all units' tiles */
};

enum { PARTIAL_HEAD, PARTIAL_TAIL, N_PARTIALS };

struct partial {
    struct softmax_state states[MAX_ROWS];
    _Alignas(64) float accumulators[MAX_ROWS * KSORT_MAX_HEAD_DIM]; /* [n_rows][job.stride] */
};

/* One part's piece of the workspace. */
struct attend_scratch {
    struct query_rows queries;
    _Alignas(64) float scores[MAX_ROWS][KSORT_TILE_TOKENS];
    float rescale[MAX_ROWS];
    struct partial partials[N_PARTIALS];
};

/* Reads a caller's arguments and checks them and, with_memory, the pointers to data; counts the work, if it is to be done
 * (with_memory). Returns as ksort_attend, without _NON_FINITE. */
ksort_status ksort_attend_prepare(const ksort_attend_args *from, uint32_t nth, bool with_memory,
                                  struct attend_job *job);

/* Checks part ith of nth of q. Returns KSORT_OK, _NON_FINITE. */
ksort_status ksort_attend_check(const struct attend_job *job, uint32_t ith, uint32_t nth);

/* The two halves of a call; q must have been checked. Return KSORT_OK, _NON_FINITE. */
ksort_status ksort_attend_run(const struct attend_job *job, uint32_t ith, uint32_t nth);
ksort_status ksort_attend_join(const struct attend_job *job, uint32_t ith, uint32_t nth);

/* Sets the counts of units and tiles from what is already in the job. */
void ksort_count_work(struct attend_job *job);

/* The unit that holds place `at` (< n_tiles) of the line. */
void ksort_unit_at(const struct attend_job *job, size_t at, struct unit *unit);

/* Fills the unit's query rows: RoPE, transform, then rounding to BFP16 where asked. Returns KSORT_OK, _NON_FINITE. */
ksort_status ksort_prepare_queries(const struct attend_job *job, const struct unit *unit, struct query_rows *queries);

/* Slots that a row sees. */
static inline struct range row_slots(const struct attend_job *job, size_t row)
{
    size_t end = job->args.first_slot + row / job->group + 1, window = job->args.window;
    return (struct range){window && end > window ? end - window : 0, end};
}

static inline struct attend_scratch *scratch_of(const struct attend_job *job, uint32_t part)
{
    return (struct attend_scratch *)job->args.workspace + part;
}

#endif /* KSORT_ATTEND_H */
