#include "arm/arm.h"

const struct kernels ksort_kernels_neon = {
    .level = "neon",
    .max_magnitude = ksort_neon_max_magnitude,
    .rope = ksort_neon_rope,
    .round_bfp = ksort_neon_round_bfp,
    .round_sbfp = ksort_neon_round_sbfp,
    .transform_key = ksort_neon_transform_key,
    .transform_query = ksort_neon_transform_query,
    .restore_value = ksort_neon_restore_value,
    .encode_transformed = ksort_neon_encode_transformed,
    .store_f16 = ksort_neon_store_f16,
    .store_bf16 = ksort_neon_store_bf16,
    .scores_bfp_by_bfp = ksort_neon_scores_bfp_by_bfp,
    .scores_bfp_by_f32 = ksort_neon_scores_bfp_by_f32,
    .scores_float = ksort_neon_scores_float,
    .softmax_tile = ksort_neon_softmax_tile,
    .accumulate_float = ksort_neon_accumulate_float,
    .accumulate_bfp = ksort_neon_accumulate_bfp,
};
