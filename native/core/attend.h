/* Attention: what is prepared once a call, how it is cut into units and shares, and one part's memory.
 *
 * Query row r (0 .. n_queries * group - 1) of a KV head is query head member r % group of token r / group. A unit is up
 * to MAX_ROWS neighbouring rows of one KV head with all tiles that any of them sees, each a visit. The units of a call stand in a
 * line, KV head by KV head, and each part takes an equal, contiguous share of their visits of tiles:
 *
 *     units:   |---- head 0 ----|---- head 1 ----|---- head 2 ----|     one call, 1 row block a head
 *     parts:   |--------- 0 --------|---------- 1 ----------------|
 *                                   ^ head 1 is cut here
 *
 * Where exact rows lie beside a cache, the slots that a row sees are cut into three sections, which a unit goes through
 * one after another. A tile that holds two sections is visited twice:
 *
 *     slots of a row:  | sinks |-------- packed --------|-- tail --|
 *     visits:          |0      |0      |1      |2       |2     |3  |     tiles, each with the slots of one section
 *
 * So one KV head keeps every part busy, and a part holds at most two cut units: one that an earlier part began (its
 * partial HEAD) and one that a later part ends (TAIL). A whole unit is written to out at once; of a cut unit every part
 * leaves its softmax states and accumulators in its scratch, and the part that began it joins them in merge.
 */
#ifndef KSORT_ATTEND_H
#define KSORT_ATTEND_H

#include "kernels.h"

struct attend_job {
    ksort_attend_args args; /* points to what is below, which are copies too: a job may not be moved */
    ksort_cache k_cache;
    ksort_cache v_cache;
    ksort_exact k_exact;
    ksort_exact v_exact;
    const ksort_exact *exact; /* one that says where sections end, or NULL */
    ksort_rope rope;
    ksort_transform k_transform;
    ksort_transform v_transform;
    const struct kernels *kernels;
    struct head_layout k;
    struct head_layout v;
    struct head_layout exact_layout; /* of exact keys and values */
    uint32_t group;                  /* query heads a KV head */
    size_t n_rows;                   /* query rows a KV head */
    size_t n_row_blocks;             /* units a KV head */
    size_t head_visits;              /* of all units of a KV head */
    size_t n_visits;                 /* of all units */
    size_t stride;                   /* floats between accumulator rows */
};

enum section { SINKS, PACKED, TAIL, N_SECTIONS };

struct unit {
    uint32_t kv_head;
    size_t first_row;
    uint32_t n_rows;
    struct range slots[N_SECTIONS]; /* seen by any row; empty ranges have begin >= end */
    struct range line;              /* place of its visits in the line of all units' visits */
};

/* The slots of one section in one tile, counted from the tile's first. */
struct visit {
    enum section section;
    size_t tile;
    uint32_t begin;
    uint32_t end;
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

/* Sets the counts of units and visits from what is already in the job. */
void ksort_count_work(struct attend_job *job);

/* The unit that holds place `at` (< n_visits) of the line. */
void ksort_unit_at(const struct attend_job *job, size_t at, struct unit *unit);

/* The visit at place `at` of the line, which is one of the unit's. */
struct visit ksort_visit_at(const struct unit *unit, size_t at);

/* What float query rows hold beside the softmax scale: for BFP keys 2^-(mantissa_bits - 2). */
float ksort_key_unit(const struct attend_job *job);

/* Fills the unit's query rows: RoPE, transform, then rounding to BFP16 where asked; floats too for exact keys. Returns KSORT_OK, _NON_FINITE. */
ksort_status ksort_prepare_queries(const struct attend_job *job, const struct unit *unit, struct query_rows *queries);

/* Slots that a row sees. */
static inline struct range row_slots(const struct attend_job *job, size_t row)
{
    size_t end = job->args.first_slot + row / job->group + 1, window = job->args.window;
    return (struct range){window && end > window ? end - window : 0, end};
}

/* The slots of a section that a row sees; what is before and after it are the other sections'. */
static inline struct range section_slots(const struct attend_job *job, size_t row, enum section section)
{
    struct range seen = row_slots(job, row);
    if (!job->exact)
        return section == PACKED ? seen : (struct range){0, 0};
    size_t sinks_end = min_size(max_size(job->exact->n_sinks, seen.begin), seen.end);
    size_t tail_begin = seen.end - min_size(job->exact->n_tail, seen.end);
    tail_begin = min_size(max_size(tail_begin, job->exact->begin), seen.end);
    tail_begin = max_size(tail_begin, sinks_end);
    switch (section) {
    case SINKS: return (struct range){seen.begin, sinks_end};
    case PACKED: return (struct range){sinks_end, tail_begin};
    default: return (struct range){tail_begin, seen.end};
    }
}

static inline struct attend_scratch *scratch_of(const struct attend_job *job, uint32_t part)
{
    return (struct attend_scratch *)job->args.workspace + part;
}

#endif /* KSORT_ATTEND_H */
