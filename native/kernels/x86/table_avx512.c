#include "x86/x86.h"

const struct kernels ksort_kernels_avx512bw = {
    .level = "avx512bw",
    .max_magnitude = ksort_avx512_max_magnitude,
    .rope = ksort_avx512_rope,
    .round_bfp = ksort_avx512_round_bfp,
    .transform_key = ksort_avx512_transform_key,
    .transform_query = ksort_avx512_transform_query,
    .restore_value = ksort_avx512_restore_value,
    .encode_transformed = ksort_avx512_encode_transformed,
    .store_f16 = ksort_avx512_store_f16,
    .store_bf16 = ksort_avx512_store_bf16,
    .scores_bfp_by_bfp = ksort_avx512_scores_bfp_by_bfp,
    .scores_bfp_by_f32 = ksort_avx512_scores_bfp_by_f32,
    .scores_float = ksort_avx512_scores_float,
    .softmax_tile = ksort_avx512_softmax_tile,
    .accumulate_float = ksort_avx512_accumulate_float,
    .accumulate_bfp = ksort_avx512_accumulate_bfp,
};

const struct kernels ksort_kernels_avx512 = {
    .level = "avx512",
    .max_magnitude = ksort_avx512_max_magnitude,
    .rope = ksort_avx512_rope,
    .round_bfp = ksort_avx512_round_bfp,
    .transform_key = ksort_avx512_transform_key,
    .transform_query = ksort_avx512_transform_query,
    .restore_value = ksort_avx512_restore_value,
    .encode_transformed = ksort_avx512_encode_transformed,
    .store_f16 = ksort_avx512_store_f16,
    .store_bf16 = ksort_avx512_store_bf16,
    .scores_bfp_by_bfp = ksort_avx512vnni_scores_bfp_by_bfp,
    .scores_bfp_by_f32 = ksort_avx512_scores_bfp_by_f32,
    .scores_float = ksort_avx512_scores_float,
    .softmax_tile = ksort_avx512_softmax_tile,
    .accumulate_float = ksort_avx512_accumulate_float,
    .accumulate_bfp = ksort_avx512vnni_accumulate_bfp,
};
