#include "transform.h"

#include <math.h>

#include "structs.h"

/* These run in every call, so their loops have no early end: compilers make vectors of all but the scattered stores. */
static bool is_permutation(const uint16_t *permutation, uint32_t n)
{
    uint32_t n_outside = 0;
    for (uint32_t i = 0; i < n; i++)
        n_outside += permutation[i] >= n;
    if (n_outside)
        return false;
    uint8_t seen[KSORT_MAX_HEAD_DIM];
    memset(seen, 0, n);
    for (uint32_t i = 0; i < n; i++)
        seen[permutation[i]] = 1;
    return !memchr(seen, 0, n);
}

static bool all_positive(const float *x, size_t n)
{
    uint32_t n_others = 0;
    for (size_t i = 0; i < n; i++)
        n_others += !(x[i] > 0.0f);
    return n_others == 0;
}

ksort_status ksort_read_transform(const ksort_transform *from, const struct kernels *kernels,
                                  const struct head_layout *layout, uint32_t n_kv_heads, ksort_transform *transform)
{
    ksort_status status = READ_STRUCT(transform, from, rotate);
    if (status != KSORT_OK)
        return status;
    if (!is_bfp(layout->type))
        return KSORT_ERR_TYPE;
    if (transform->rotate > 1)
        return KSORT_ERR_TRANSFORM;
    size_t n = (size_t)n_kv_heads * layout->head_dim;
    const float *shift = transform->shift, *scale = transform->scale;
    if (shift && kernels->max_magnitude(shift, n) >= FLOAT_MAGNITUDE_INF)
        return KSORT_ERR_TRANSFORM;
    if (scale && (kernels->max_magnitude(scale, n) >= FLOAT_MAGNITUDE_INF || !all_positive(scale, n)))
        return KSORT_ERR_TRANSFORM;
    for (uint32_t head = 0; transform->permutation && head < n_kv_heads; head++)
        if (!is_permutation(transform->permutation + (size_t)head * layout->head_dim, layout->head_dim))
            return KSORT_ERR_TRANSFORM;
    return KSORT_OK;
}

double ksort_transformed_bound(const struct kernels *kernels, const ksort_transform *transform, uint32_t n_kv_heads,
                               uint32_t head_dim, double magnitude)
{
    size_t n = (size_t)n_kv_heads * head_dim;
    if (transform->shift)
        magnitude += (double)bits_float(kernels->max_magnitude(transform->shift, n));
    if (transform->scale)
        magnitude *= (double)bits_float(kernels->max_magnitude(transform->scale, n));
    /* A channel of W y is a sum of n entries of +-y / sqrt(n) over a segment of n <= head_dim channels. */
    if (transform->rotate)
        magnitude *= sqrt((double)head_dim);
    return magnitude * (1 + 1e-5); /* the roundings of at most 14 float32 operations */
}

struct head_transform ksort_head_transform(const ksort_transform *transform, uint32_t head_dim, uint32_t head)
{
    size_t at = (size_t)head * head_dim;
    return (struct head_transform){
        .shift = transform->shift ? transform->shift + at : NULL,
        .scale = transform->scale ? transform->scale + at : NULL,
        .feedback = transform->feedback ? transform->feedback + at * head_dim : NULL,
        .rotate = transform->rotate != 0,
        .permutation = transform->permutation ? transform->permutation + at : NULL,
    };
}

const uint16_t *ksort_places_of(const struct head_transform *transform, uint32_t head_dim,
                                uint16_t places[KSORT_MAX_HEAD_DIM])
{
    if (!transform->permutation)
        return NULL;
    for (uint32_t i = 0; i < head_dim; i++)
        places[transform->permutation[i]] = (uint16_t)i;
    return places;
}
