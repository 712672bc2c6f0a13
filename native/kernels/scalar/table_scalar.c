#include "scalar/scalar.h"

const struct kernels ksort_kernels_scalar = {
    .level = "scalar",
    .max_magnitude = ksort_scalar_max_magnitude,
    .rope = ksort_scalar_rope,
    .round_bfp = ksort_scalar_round_bfp,
    .round_sbfp = ksort_scalar_round_sbfp,
    .transform_key = ksort_scalar_transform_key,
    .transform_query = ksort_scalar_transform_query,
    .restore_value = ksort_scalar_restore_value,
    .encode_transformed = ksort_scalar_encode_transformed,
    .store_f16 = ksort_scalar_store_f16,
    .store_bf16 = ksort_scalar_store_bf16,
    .scores_bfp_by_bfp = ksort_scalar_scores_bfp_by_bfp,
    .scores_bfp_by_f32 = ksort_scalar_scores_bfp_by_f32,
    .scores_float = ksort_scalar_scores_float,
    .softmax_tile = ksort_scalar_softmax_tile,
    .accumulate_float = ksort_scalar_accumulate_float,
    .accumulate_bfp = ksort_scalar_accumulate_bfp,
};
