/* The scalar level: complete, and the oracle of the others. Contracts are in kernels.h. */
#ifndef KSORT_SCALAR_H
#define KSORT_SCALAR_H

#include "kernels.h"

extern const struct kernels ksort_kernels_scalar;

/* Other levels use some of them. */
max_magnitude_function ksort_scalar_max_magnitude;
rope_function ksort_scalar_rope;
round_function ksort_scalar_round_bfp, ksort_scalar_round_sbfp;
transform_function ksort_scalar_transform_key, ksort_scalar_transform_query;
restore_function ksort_scalar_restore_value;
encode_function ksort_scalar_encode_transformed;
store_function ksort_scalar_store_f16, ksort_scalar_store_bf16;
score_function ksort_scalar_scores_bfp_by_bfp, ksort_scalar_scores_bfp_by_f32, ksort_scalar_scores_float;
softmax_function ksort_scalar_softmax_tile;
accumulate_function ksort_scalar_accumulate_float, ksort_scalar_accumulate_bfp;

#endif /* KSORT_SCALAR_H */
