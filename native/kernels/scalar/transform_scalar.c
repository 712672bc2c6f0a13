/* Transforms of one head, in place:
 *
 *     key or value:  y - shift, * scale ----------------> rotate ---> y[i] = y[permutation[i]]
 *     query:         q / scale -------------------------> rotate ---> q[i] = q[permutation[i]]
 *     output:        out[c] = out[places[c]] -----------> rotate ---> / scale, + shift
 *
 * Bytes moved: 4 head_dim in and out; 10 head_dim of tables, which stay in L1 over the tokens of a head.
 */
#include "rounding.h"
#include "scalar/scalar.h"

static void rotate_segment(float *x, uint32_t n)
{
    for (uint32_t stride = 1; stride < n; stride *= 2)
        for (uint32_t begin = 0; begin < n; begin += 2 * stride)
            for (uint32_t i = begin; i < begin + stride; i++) {
                float a = x[i], b = x[i + stride];
                x[i] = a + b;
                x[i + stride] = a - b;
            }
    float factor = rotation_factor(n);
    for (uint32_t i = 0; i < n; i++)
        x[i] *= factor;
}

static void rotate(float *x, uint32_t head_dim)
{
    for (uint32_t begin = 0, n; begin < head_dim; begin += n) {
        n = largest_power_of_two(head_dim - begin);
        rotate_segment(x + begin, n);
    }
}

/* y[i] = y[from[i]]; from [head_dim] is a permutation, or NULL for none. */
static void permute(float *y, const uint16_t *from, uint32_t head_dim)
{
    if (!from)
        return;
    float copy[KSORT_MAX_HEAD_DIM];
    memcpy(copy, y, head_dim * sizeof *y);
    for (uint32_t i = 0; i < head_dim; i++)
        y[i] = copy[from[i]];
}

void ksort_scalar_transform_key(const struct head_transform *transform, uint32_t head_dim, float *y)
{
    for (uint32_t c = 0; transform->shift && c < head_dim; c++)
        y[c] = y[c] - transform->shift[c];
    for (uint32_t c = 0; transform->scale && c < head_dim; c++)
        y[c] = y[c] * transform->scale[c];
    if (transform->rotate)
        rotate(y, head_dim);
    permute(y, transform->permutation, head_dim);
}

void ksort_scalar_transform_query(const struct head_transform *transform, uint32_t head_dim, float *q)
{
    for (uint32_t c = 0; transform->scale && c < head_dim; c++)
        q[c] = q[c] / transform->scale[c];
    if (transform->rotate)
        rotate(q, head_dim);
    permute(q, transform->permutation, head_dim);
}

void ksort_scalar_restore_value(const struct head_transform *transform, const uint16_t *places, uint32_t head_dim,
                                float *out)
{
    permute(out, places, head_dim);
    if (transform->rotate)
        rotate(out, head_dim);
    for (uint32_t c = 0; transform->scale && c < head_dim; c++)
        out[c] = out[c] / transform->scale[c];
    for (uint32_t c = 0; transform->shift && c < head_dim; c++)
        out[c] = out[c] + transform->shift[c];
}
