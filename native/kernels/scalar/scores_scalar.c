/* Scores of a unit's rows against the tokens of one tile, one token at a time:
 *
 *     words, exponents of token t --unpack--> mantissas [head_dim] i8 (on the stack)
 *     for every row: for every block: dot product, times the block's factors       -> scores[row][t]
 *
 * Bytes moved: a token's packed bytes once for all rows.
 */
#include "half.h"
#include "scalar/scalar.h"

/* Channels of block b that exist: the last block may be shorter. */
static uint32_t block_end(const struct head_layout *layout, uint32_t b)
{
    uint32_t end = (b + 1) * layout->block_size;
    return end < layout->head_dim ? end : layout->head_dim;
}

/* What the sum of block b is to be multiplied with, but for mantissa_unit. */
static float key_scale(const struct tile_span *keys, uint32_t b, uint32_t token)
{
    uint8_t code = keys->tile[exponent_offset(keys->layout, b, token)];
    return keys->layout->is_scaled ? float_of_scale(code) : exponent_scale(code);
}

static int32_t dot_int8(const int8_t *a, const int8_t *b, uint32_t n)
{
    int32_t sum = 0;
    for (uint32_t i = 0; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

void ksort_scalar_scores_bfp_by_bfp(const struct tile_span *keys, const struct query_rows *queries,
                                    float (*scores)[KSORT_TILE_TOKENS])
{
    const struct head_layout *layout = keys->layout;
    for (uint32_t token = keys->begin; token < keys->end; token++) {
        union token_mantissas key;
        ksort_load_mantissas(layout, keys->tile, token, &key);
        for (uint32_t row = 0; row < queries->n_rows; row++) {
            const int8_t *query = (const int8_t *)queries->quads[row];
            float score = 0.0f;
            for (uint32_t b = 0; b < layout->n_blocks; b++) {
                uint32_t begin = b * layout->block_size, n = block_end(layout, b) - begin;
                int32_t dot = dot_int8(key.channels + begin, query + begin, n);
                score += (float)dot * (key_scale(keys, b, token) * queries->factors[row][b]);
            }
            scores[row][token] = score;
        }
    }
}

void ksort_scalar_scores_bfp_by_f32(const struct tile_span *keys, const struct query_rows *queries,
                                    float (*scores)[KSORT_TILE_TOKENS])
{
    const struct head_layout *layout = keys->layout;
    for (uint32_t token = keys->begin; token < keys->end; token++) {
        union token_mantissas key;
        ksort_load_mantissas(layout, keys->tile, token, &key);
        for (uint32_t row = 0; row < queries->n_rows; row++) {
            float score = 0.0f;
            for (uint32_t b = 0; b < layout->n_blocks; b++) {
                float dot = 0.0f;
                for (uint32_t c = b * layout->block_size; c < block_end(layout, b); c++)
                    dot += (float)key.channels[c] * queries->values[row][c];
                score += dot * key_scale(keys, b, token);
            }
            scores[row][token] = score;
        }
    }
}

void ksort_scalar_scores_float(const struct tile_span *keys, const struct query_rows *queries,
                               float (*scores)[KSORT_TILE_TOKENS])
{
    const struct head_layout *layout = keys->layout;
    for (uint32_t token = keys->begin; token < keys->end; token++) {
        const uint8_t *key = keys->tile + row_offset(layout, token);
        float values[KSORT_MAX_HEAD_DIM];
        for (uint32_t c = 0; c < layout->head_dim; c++)
            values[c] = load_value(key, layout->type, c);
        for (uint32_t row = 0; row < queries->n_rows; row++) {
            float score = 0.0f;
            for (uint32_t c = 0; c < layout->head_dim; c++)
                score += values[c] * queries->values[row][c];
            scores[row][token] = score;
        }
    }
}
