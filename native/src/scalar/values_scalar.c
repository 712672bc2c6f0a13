/* Weights and weighted values of a unit's rows over the tokens of one tile:
 *
 *     scores [rows][64] --softmax_tile--> weights [rows][64], rescale [rows]
 *     accumulators [rows][head_dim] = rescale * accumulators + weights x V[64][head_dim]
 *
 * Bytes moved: the tile's V rows once for all rows of the unit; weights and accumulators stay in L1 and L2.
 */
#include "half.h"
#include "scalar/scalar.h"

float ksort_scalar_softmax_tile(float scores[KSORT_TILE_TOKENS], uint32_t begin, uint32_t end,
                                struct softmax_state *state)
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

void ksort_scalar_accumulate(const struct tile_span *values, uint32_t n_rows,
                             const float (*weights)[KSORT_TILE_TOKENS], const float *rescale, float *accumulators,
                             size_t stride)
{
    const struct head_layout *layout = values->layout;
    for (uint32_t row = 0; row < n_rows; row++)
        for (uint32_t c = 0; c < layout->head_dim; c++)
            accumulators[row * stride + c] *= rescale[row];
    for (uint32_t token = values->begin; token < values->end; token++) {
        const uint8_t *value_row = values->tile + row_offset(layout, token);
        float value[KSORT_MAX_HEAD_DIM];
        for (uint32_t c = 0; c < layout->head_dim; c++)
            value[c] = load_value(value_row, layout->type, c);
        for (uint32_t row = 0; row < n_rows; row++)
            for (uint32_t c = 0; c < layout->head_dim; c++)
                accumulators[row * stride + c] += weights[row][token] * value[c];
    }
}
