/* Transforms of a K plan: their checks, and the tables of one head. The arithmetic is the kernels'. */
#ifndef KSORT_TRANSFORM_H
#define KSORT_TRANSFORM_H

#include "kernels.h"

/* Reads a caller's transform of heads stored as `layout`, and checks it. Feedback entries are not looked at.
 * Returns KSORT_OK, _STRUCT_SIZE, _TYPE, _TRANSFORM. */
ksort_status ksort_read_transform(const ksort_transform *from, const struct kernels *kernels,
                                  const struct head_layout *layout, uint32_t n_kv_heads, ksort_transform *transform);

/* A bound of |transformed head| for heads x up to `magnitude`; transform has been checked. */
double ksort_transformed_bound(const struct kernels *kernels, const ksort_transform *transform, uint32_t n_kv_heads,
                               uint32_t head_dim, double magnitude);

/* The tables of KV head `head`. */
struct head_transform ksort_head_transform(const ksort_transform *transform, uint32_t head_dim, uint32_t head);

/* The inverse of the transform's permutation, in `places`: channel c stands at place places[c]. NULL if it has none. */
const uint16_t *ksort_places_of(const struct head_transform *transform, uint32_t head_dim,
                                uint16_t places[KSORT_MAX_HEAD_DIM]);

#endif /* KSORT_TRANSFORM_H */
