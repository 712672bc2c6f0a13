/* Weights and weighted values of a unit's rows over the tokens of one tile:
 *
 *     scores [rows][64] --softmax_tile--> weights [rows][64], rescale [rows]
 *     accumulators [rows][head_dim] = rescale * accumulators + weights x V[64][head_dim]
 *
 * Bytes moved: the tile's V rows once for all rows of the unit; weights and accumulators stay in L1 and L2.
 */
#include "half.h"
#include "scalar/scalar.h"

/* One row; returns the factor for what was accumulated before. */
static float softmax_row(float scores[KSORT_TILE_TOKENS], uint32_t begin, uint32_t end, struct softmax_state *state)
{
    float max = state->max;
    bool overflowed = false;
    for (uint32_t t = begin; t < end; t++) {
        overflowed = overflowed || !isfinite(scores[t]);
        max = scores[t] > max ? scores[t] : max;
    }
    float rescale = state->max == max ? 1.0f : expf(state->max - max);
    float sum = 0.0f;
    for (uint32_t t = 0; t < KSORT_TILE_TOKENS; t++) {
        scores[t] = t >= begin && t < end ? expf(scores[t] - max) : 0.0f;
        sum += scores[t];
    }
    state->max = max;
    state->sum = overflowed ? NAN : state->sum * rescale + sum;
    return rescale;
}

void ksort_scalar_softmax_tile(float (*scores)[KSORT_TILE_TOKENS], uint32_t n_rows, uint32_t begin, uint32_t end,
                               struct softmax_state *states, float *rescale)
{
    for (uint32_t row = 0; row < n_rows; row++)
        rescale[row] = softmax_row(scores[row], begin, end, &states[row]);
}

static void rescale_rows(uint32_t n_rows, uint32_t head_dim, const float *rescale, float *accumulators, size_t stride)
{
    for (uint32_t row = 0; row < n_rows; row++)
        for (uint32_t c = 0; c < head_dim; c++)
            accumulators[row * stride + c] *= rescale[row];
}

/* Adds one token's value [head_dim], weighted, to every row. */
static void add_value(const float *value, uint32_t head_dim, uint32_t token, uint32_t n_rows,
                      const float (*weights)[KSORT_TILE_TOKENS], float *accumulators, size_t stride)
{
    for (uint32_t row = 0; row < n_rows; row++)
        for (uint32_t c = 0; c < head_dim; c++)
            accumulators[row * stride + c] += weights[row][token] * value[c];
}

void ksort_scalar_accumulate_float(const struct tile_span *values, uint32_t n_rows,
                                   const float (*weights)[KSORT_TILE_TOKENS], const float *rescale, float *accumulators,
                                   size_t stride)
{
    const struct head_layout *layout = values->layout;
    rescale_rows(n_rows, layout->head_dim, rescale, accumulators, stride);
    for (uint32_t token = values->begin; token < values->end; token++) {
        const uint8_t *value_row = values->tile + row_offset(layout, token);
        float value[KSORT_MAX_HEAD_DIM];
        for (uint32_t c = 0; c < layout->head_dim; c++)
            value[c] = load_value(value_row, layout->type, c);
        add_value(value, layout->head_dim, token, n_rows, weights, accumulators, stride);
    }
}

void ksort_scalar_accumulate_bfp(const struct tile_span *values, uint32_t n_rows,
                                 const float (*weights)[KSORT_TILE_TOKENS], const float *rescale, float *accumulators,
                                 size_t stride)
{
    const struct head_layout *layout = values->layout;
    rescale_rows(n_rows, layout->head_dim, rescale, accumulators, stride);
    for (uint32_t token = values->begin; token < values->end; token++) {
        union token_mantissas mantissas;
        ksort_load_mantissas(layout, values->tile, token, &mantissas);
        float value[KSORT_MAX_HEAD_DIM];
        for (uint32_t c = 0; c < layout->head_dim; c++) {
            uint8_t code = values->tile[exponent_offset(layout, c / layout->block_size, token)];
            float scale = layout->is_scaled ? float_of_scale(code) : exponent_scale(code) * mantissa_unit(layout);
            value[c] = (float)mantissas.channels[c] * scale;
        }
        add_value(value, layout->head_dim, token, n_rows, weights, accumulators, stride);
    }
}
