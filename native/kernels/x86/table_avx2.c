#include "x86/x86.h"

const struct kernels ksort_kernels_avx2 = {
    .level = "avx2",
    .max_magnitude = ksort_avx2_max_magnitude,
    .rope = ksort_avx2_rope,
    .round_bfp = ksort_avx2_round_bfp,
    .round_sbfp = ksort_avx2_round_sbfp,
    .transform_key = ksort_avx2_transform_key,
    .transform_query = ksort_avx2_transform_query,
    .restore_value = ksort_avx2_restore_value,
    .encode_transformed = ksort_avx2_encode_transformed,
    .store_f16 = ksort_avx2_store_f16,
    .store_bf16 = ksort_avx2_store_bf16,
    .scores_bfp_by_bfp = ksort_avx2_scores_bfp_by_bfp,
    .scores_bfp_by_f32 = ksort_avx2_scores_bfp_by_f32,
    .scores_float = ksort_avx2_scores_float,
    .softmax_tile = ksort_avx2_softmax_tile,
    .accumulate_float = ksort_avx2_accumulate_float,
    .accumulate_bfp = ksort_avx2_accumulate_bfp,
};
