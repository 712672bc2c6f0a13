/* The line of units, and the query rows of one unit. */
#include "attend.h"
#include "transform.h"

static size_t tiles_of(struct range slots)
{
    if (slots.begin >= slots.end)
        return 0;
    return (slots.end - 1) / KSORT_TILE_TOKENS - slots.begin / KSORT_TILE_TOKENS + 1;
}

static size_t visits_of(const struct unit *unit)
{
    size_t n = 0;
    for (int section = 0; section < N_SECTIONS; section++)
        n += tiles_of(unit->slots[section]);
    return n;
}

/* Row block `block` of any KV head. */
static void set_rows(const struct attend_job *job, size_t block, struct unit *unit)
{
    unit->first_row = block * MAX_ROWS;
    unit->n_rows = (uint32_t)min_size(MAX_ROWS, job->n_rows - unit->first_row);
    size_t last_row = unit->first_row + unit->n_rows - 1;
    for (int section = 0; section < N_SECTIONS; section++)
        unit->slots[section] = (struct range){section_slots(job, unit->first_row, section).begin,
                                              section_slots(job, last_row, section).end};
    if (job->exact) { /* rows that see nothing of a section have its ends elsewhere: not beyond the rows that are kept */
        unit->slots[SINKS].end = min_size(unit->slots[SINKS].end, job->exact->n_sinks);
        unit->slots[TAIL].begin = max_size(unit->slots[TAIL].begin, job->exact->begin);
        if (job->exact->n_tail == 0)
            unit->slots[TAIL].end = 0;
    }
}

void ksort_count_work(struct attend_job *job)
{
    job->n_rows = (size_t)job->args.n_queries * job->group;
    job->n_row_blocks = (job->n_rows - 1) / MAX_ROWS + 1;
    job->head_visits = 0;
    for (size_t block = 0; block < job->n_row_blocks; block++) {
        struct unit unit;
        set_rows(job, block, &unit);
        job->head_visits += visits_of(&unit);
    }
    job->n_visits = job->head_visits * job->args.k->n_kv_heads;
}

void ksort_unit_at(const struct attend_job *job, size_t at, struct unit *unit)
{
    unit->kv_head = (uint32_t)(at / job->head_visits);
    size_t begin = unit->kv_head * job->head_visits;
    for (size_t block = 0; block < job->n_row_blocks; block++) {
        set_rows(job, block, unit);
        unit->line = (struct range){begin, begin + visits_of(unit)};
        if (at < unit->line.end)
            return;
        begin = unit->line.end;
    }
}

struct visit ksort_visit_at(const struct unit *unit, size_t at)
{
    size_t place = at - unit->line.begin;
    int section = SINKS;
    while (section < TAIL && place >= tiles_of(unit->slots[section]))
        place -= tiles_of(unit->slots[section++]);
    struct range slots = unit->slots[section];
    size_t tile = slots.begin / KSORT_TILE_TOKENS + place, first = tile * KSORT_TILE_TOKENS;
    return (struct visit){(enum section)section, tile, (uint32_t)(max_size(slots.begin, first) - first),
                          (uint32_t)(min_size(slots.end, first + KSORT_TILE_TOKENS) - first)};
}

float ksort_key_unit(const struct attend_job *job)
{
    return is_bfp(job->k.type) ? mantissa_unit(&job->k) : 1.0f;
}

/* Mantissas, factors and offsets of one rounded row for integer products (see struct query_rows). */
static void set_integer_row(const struct attend_job *job, const union token_mantissas *mantissas,
                            const uint8_t *exponents, uint32_t row, struct query_rows *queries)
{
    const struct head_layout *k = &job->k;
    float constant = job->args.scale * (0x1p-6f * mantissa_unit(k)); /* 2^-6: a BFP16 mantissa's unit */
    memcpy(queries->quads[row], mantissas->quads, k->n_quads * sizeof(uint32_t));
    for (uint32_t b = 0; b < k->n_blocks; b++) {
        uint32_t end = (uint32_t)min_size((b + 1) * k->block_size, k->head_dim);
        int32_t sum = 0;
        for (uint32_t c = b * k->block_size; c < end; c++)
            sum += mantissas->channels[c];
        queries->factors[row][b] = constant * exponent_scale(exponents[b]);
        queries->offsets[row][b] = -sum * (1 << (k->mantissa_bits - 1));
    }
}

static void set_dequantized_row(const struct attend_job *job, const union token_mantissas *mantissas,
                                const uint8_t *exponents, uint32_t row, struct query_rows *queries)
{
    for (uint32_t c = 0; c < job->k.head_dim; c++) {
        float value = (float)mantissas->channels[c] * 0x1p-6f * exponent_scale(exponents[c / job->k.block_size]);
        queries->values[row][c] = value * job->args.scale;
    }
}

static void set_float_row(const struct attend_job *job, const float *query, float factor, uint32_t row,
                          struct query_rows *queries)
{
    for (uint32_t c = 0; c < job->k.head_dim; c++)
        queries->values[row][c] = query[c] * factor;
    for (uint32_t c = job->k.head_dim; c < 4 * job->k.n_quads; c++)
        queries->values[row][c] = 0.0f; /* kernels multiply whole quads */
}

/* The query after RoPE and transform, in buffer [head_dim]; the query itself where there is neither. */
static const float *transformed_query(const struct attend_job *job, uint32_t kv_head, size_t token, const float *query,
                                      float *buffer)
{
    const ksort_attend_args *args = &job->args;
    uint32_t head_dim = job->k.head_dim;
    if (!args->rope && !args->k_transform)
        return query;
    if (args->rope) {
        struct rope_row tables = rope_row_of(args->rope, head_dim, kv_head, token);
        job->kernels->rope(&tables, query, head_dim, buffer);
    } else {
        memcpy(buffer, query, head_dim * sizeof *query);
    }
    if (args->k_transform) {
        struct head_transform transform = ksort_head_transform(args->k_transform, head_dim, kv_head);
        job->kernels->transform_query(&transform, head_dim, buffer);
    }
    return buffer;
}

ksort_status ksort_prepare_queries(const struct attend_job *job, const struct unit *unit, struct query_rows *queries)
{
    const ksort_attend_args *args = &job->args;
    uint32_t head_dim = job->k.head_dim;
    queries->n_rows = unit->n_rows;
    for (uint32_t row = 0; row < unit->n_rows; row++) {
        size_t token = (unit->first_row + row) / job->group, member = (unit->first_row + row) % job->group;
        const float *query = args->q + token * args->q_token_stride + (unit->kv_head * job->group + member) * head_dim;
        _Alignas(64) float buffer[KSORT_MAX_HEAD_DIM]; /* whole cache lines: transforms take less time */
        query = transformed_query(job, unit->kv_head, token, query, buffer);
        if (query == buffer && job->kernels->max_magnitude(buffer, head_dim) >= FLOAT_MAGNITUDE_INF)
            return KSORT_ERR_NON_FINITE;
        if (args->query_type == KSORT_F32) {
            set_float_row(job, query, args->scale * ksort_key_unit(job), row, queries);
            continue;
        }
        union token_mantissas mantissas = {.quads = {0}}; /* padding channels stay 0 */
        uint8_t exponents[MAX_BLOCKS];
        job->kernels->round_bfp(query, head_dim, job->k.block_size, 8, mantissas.channels, exponents);
        if (is_bfp(job->k.type))
            set_integer_row(job, &mantissas, exponents, row, queries);
        else
            set_dequantized_row(job, &mantissas, exponents, row, queries);
        if (args->k->exact)
            set_float_row(job, query, args->scale, row, queries);
    }
    return KSORT_OK;
}
