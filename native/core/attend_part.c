/* One part's share of attention, and the joining of cut units. A tile of a unit goes through four steps:
 *
 *     K tile  --scores-->  [rows][64]  --softmax-->  weights [rows][64], rescale [rows]  --accumulate V tile-->
 *     accumulators [rows][head_dim]
 *
 * Bytes moved a unit: its K and V tiles once for up to MAX_ROWS rows. Scores (8 KB) and accumulators (16 KB at head_dim
 * 128) of the part stay in L1 and L2.
 */
#include "attend.h"
#include "transform.h"

/* Where a visit finds its keys, or values. */
static const uint8_t *visited_tile(const ksort_cache *cache, uint32_t kv_head, const struct visit *visit)
{
    if (visit->section == PACKED || !cache->exact)
        return tile_of(cache, visit->tile, kv_head);
    return visit->section == SINKS ? exact_sinks(cache->exact, kv_head)
                                   : exact_tile(cache->exact, visit->tile, kv_head);
}

/* layout: of packed tiles. */
static struct tile_span span_of(const struct attend_job *job, const ksort_cache *cache,
                                const struct head_layout *layout, uint32_t kv_head, const struct visit *visit,
                                const struct visit *next)
{
    return (struct tile_span){
        .layout = visit->section == PACKED || !cache->exact ? layout : &job->exact_layout,
        .tile = visited_tile(cache, kv_head, visit),
        .next = visited_tile(cache, kv_head, next),
        .begin = visit->begin,
        .end = visit->end,
    };
}

static void score(const struct attend_job *job, const struct tile_span *keys, const struct query_rows *queries,
                  float (*scores)[KSORT_TILE_TOKENS])
{
    if (!is_bfp(job->k.type)) {
        job->kernels->scores_float(keys, queries, scores);
    } else if (is_bfp(keys->layout->type)) {
        bool by_float = job->args.query_type == KSORT_F32;
        (by_float ? job->kernels->scores_bfp_by_f32 : job->kernels->scores_bfp_by_bfp)(keys, queries, scores);
    } else { /* exact keys: their units are 1 */
        job->kernels->scores_float(keys, queries, scores);
        if (job->args.query_type != KSORT_F32)
            return;
        const float per_unit = 1.0f / ksort_key_unit(job); /* a power of two */
        for (uint32_t row = 0; row < queries->n_rows; row++)
            for (uint32_t token = keys->begin; token < keys->end; token++)
                scores[row][token] *= per_unit;
    }
}

/* The part of `slots` inside a tile, counted from the tile's first slot; empty ranges have begin >= end. */
static struct range within_tile(struct range slots, size_t tile)
{
    size_t first = tile * KSORT_TILE_TOKENS;
    return (struct range){max_size(slots.begin, first) - first,
                          min_size(max_size(slots.end, first), first + KSORT_TILE_TOKENS) - first};
}

/* The unit's rows of the same token, which see the same slots, end here. */
static uint32_t end_of_token(const struct attend_job *job, const struct unit *unit, uint32_t row)
{
    size_t group = job->group, rest = group - (unit->first_row + row) % group;
    return (uint32_t)min_size(row + rest, unit->n_rows);
}

/* next: the visit that comes after it, or itself. */
static void attend_tile(const struct attend_job *job, const struct unit *unit, const struct visit *visit,
                        const struct visit *next, struct attend_scratch *scratch, struct partial *partial)
{
    struct tile_span keys = span_of(job, job->args.k, &job->k, unit->kv_head, visit, next);
    struct tile_span values = span_of(job, job->args.v, &job->v, unit->kv_head, visit, next);
    score(job, &keys, &scratch->queries, scratch->scores);
    for (uint32_t row = 0, end; row < unit->n_rows; row = end) {
        struct range slots = section_slots(job, unit->first_row + row, visit->section);
        struct range seen = within_tile(slots, visit->tile);
        end = end_of_token(job, unit, row);
        job->kernels->softmax_tile(&scratch->scores[row], end - row, (uint32_t)seen.begin, (uint32_t)seen.end,
                                   &partial->states[row], &scratch->rescale[row]);
    }
    accumulate_function *accumulate =
        is_bfp(values.layout->type) ? job->kernels->accumulate_bfp : job->kernels->accumulate_float;
    accumulate(&values, unit->n_rows, (const float (*)[KSORT_TILE_TOKENS])scratch->scores, scratch->rescale,
               partial->accumulators, job->stride);
}

/* Asks for the exact rows of the visit that a unit begins with: no visit before it asks, and they are few. */
static void prefetch_sinks(const struct attend_job *job, const struct unit *unit, const struct visit *visit)
{
    const ksort_cache *caches[2] = {job->args.k, job->args.v};
    size_t n_bytes = visit->section == SINKS ? row_offset(&job->exact_layout, visit->end) : 0;
    for (int i = 0; i < 2 && n_bytes; i++)
        for (size_t at = 0; caches[i]->exact && at < n_bytes; at += CACHE_LINE)
            PREFETCH_NEXT(visited_tile(caches[i], unit->kv_head, visit) + at);
}

/* Runs the unit's visits at places line.begin .. line.end-1 of the line. */
static ksort_status attend_tiles(const struct attend_job *job, const struct unit *unit, struct range line,
                                 struct attend_scratch *scratch, struct partial *partial)
{
    struct visit visit = ksort_visit_at(unit, line.begin);
    prefetch_sinks(job, unit, &visit);
    ksort_status status = ksort_prepare_queries(job, unit, &scratch->queries);
    if (status != KSORT_OK)
        return status;
    for (uint32_t row = 0; row < unit->n_rows; row++)
        partial->states[row] = softmax_init();
    memset(partial->accumulators, 0, unit->n_rows * job->stride * sizeof(float));
    for (size_t at = line.begin; at < line.end; at++) {
        struct visit next = at + 1 < unit->line.end ? ksort_visit_at(unit, at + 1) : visit;
        attend_tile(job, unit, &visit, &next, scratch, partial);
        visit = next;
    }
    return KSORT_OK;
}

/* Writes the finished rows of a unit to out. Returns KSORT_OK, or _NON_FINITE if a score or a sum overflowed. */
static ksort_status write_unit(const struct attend_job *job, const struct unit *unit, const struct partial *partial)
{
    const ksort_attend_args *args = &job->args;
    uint32_t head_dim = job->v.head_dim;
    struct head_transform transform = {.rotate = false};
    uint16_t buffer[KSORT_MAX_HEAD_DIM];
    const uint16_t *places = NULL;
    if (args->v_transform) {
        transform = ksort_head_transform(args->v_transform, head_dim, unit->kv_head);
        places = ksort_places_of(&transform, head_dim, buffer);
    }
    for (uint32_t row = 0; row < unit->n_rows; row++) {
        size_t token = (unit->first_row + row) / job->group, member = (unit->first_row + row) % job->group;
        float *out = args->out + token * args->out_token_stride + (unit->kv_head * job->group + member) * head_dim;
        const float *accumulator = partial->accumulators + row * job->stride;
        float factor;
        if (!softmax_finish(partial->states[row], &factor))
            return KSORT_ERR_NON_FINITE;
        for (uint32_t c = 0; c < head_dim; c++)
            out[c] = accumulator[c] * factor;
        if (args->v_transform)
            job->kernels->restore_value(&transform, places, head_dim, out);
        if (job->kernels->max_magnitude(out, head_dim) >= FLOAT_MAGNITUDE_INF)
            return KSORT_ERR_NON_FINITE;
    }
    return KSORT_OK;
}

ksort_status ksort_attend_run(const struct attend_job *job, uint32_t ith, uint32_t nth)
{
    struct attend_scratch *scratch = scratch_of(job, ith);
    struct range share = share_of(job->n_visits, ith, nth);
    ksort_status status = KSORT_OK;
    for (size_t at = share.begin; at < share.end && status == KSORT_OK;) {
        struct unit unit;
        ksort_unit_at(job, at, &unit);
        struct range line = {at, min_size(unit.line.end, share.end)};
        bool begun_here = unit.line.begin == at, ends_here = unit.line.end == line.end;
        struct partial *partial = &scratch->partials[begun_here ? PARTIAL_TAIL : PARTIAL_HEAD];
        status = attend_tiles(job, &unit, line, scratch, partial);
        if (status == KSORT_OK && begun_here && ends_here)
            status = write_unit(job, &unit, partial);
        at = line.end;
    }
    return status;
}

static void join_partials(const struct attend_job *job, uint32_t n_rows, const struct partial *other,
                          struct partial *partial)
{
    for (uint32_t row = 0; row < n_rows; row++) {
        float own_factor, other_factor;
        softmax_merge(&partial->states[row], other->states[row], &own_factor, &other_factor);
        float *own = partial->accumulators + row * job->stride;
        const float *added = other->accumulators + row * job->stride;
        for (uint32_t c = 0; c < job->v.head_dim; c++)
            own[c] = own[c] * own_factor + added[c] * other_factor;
    }
}

ksort_status ksort_attend_join(const struct attend_job *job, uint32_t ith, uint32_t nth)
{
    struct range share = share_of(job->n_visits, ith, nth);
    if (share.begin == share.end)
        return KSORT_OK;
    struct unit unit;
    ksort_unit_at(job, share.end - 1, &unit);
    if (unit.line.begin < share.begin || unit.line.end == share.end)
        return KSORT_OK; /* begun by an earlier part, or whole */
    struct partial *partial = &scratch_of(job, ith)->partials[PARTIAL_TAIL];
    for (uint32_t part = ith + 1; share.end < unit.line.end; part++) {
        share = share_of(job->n_visits, part, nth);
        join_partials(job, unit.n_rows, &scratch_of(job, part)->partials[PARTIAL_HEAD], partial);
    }
    return write_unit(job, &unit, partial);
}
