/* The x86-64 levels. Contracts are in kernels.h.
 *   table                    instructions           its functions
 *   ksort_kernels_avx2       AVX2, FMA, F16C        ksort_avx2_
 *   ksort_kernels_avx512bw   AVX-512 F, BW, VL, DQ  ksort_avx512_
 *   ksort_kernels_avx512     and VNNI               ksort_avx512vnni_, otherwise ksort_avx512_
 */
#ifndef KSORT_X86_H
#define KSORT_X86_H

#include "kernels.h"

extern const struct kernels ksort_kernels_avx2, ksort_kernels_avx512bw, ksort_kernels_avx512;

max_magnitude_function ksort_avx2_max_magnitude;
rope_function ksort_avx2_rope;
round_function ksort_avx2_round_bfp, ksort_avx2_round_sbfp;
transform_function ksort_avx2_transform_key, ksort_avx2_transform_query;
restore_function ksort_avx2_restore_value;
encode_function ksort_avx2_encode_transformed;
store_function ksort_avx2_store_f16, ksort_avx2_store_bf16;
score_function ksort_avx2_scores_bfp_by_bfp, ksort_avx2_scores_bfp_by_f32, ksort_avx2_scores_float;
softmax_function ksort_avx2_softmax_tile;
accumulate_function ksort_avx2_accumulate_float, ksort_avx2_accumulate_bfp;

max_magnitude_function ksort_avx512_max_magnitude;
rope_function ksort_avx512_rope;
round_function ksort_avx512_round_bfp, ksort_avx512_round_sbfp;
transform_function ksort_avx512_transform_key, ksort_avx512_transform_query;
restore_function ksort_avx512_restore_value;
encode_function ksort_avx512_encode_transformed;
store_function ksort_avx512_store_f16, ksort_avx512_store_bf16;
score_function ksort_avx512_scores_bfp_by_bfp, ksort_avx512_scores_bfp_by_f32, ksort_avx512_scores_float;
softmax_function ksort_avx512_softmax_tile;
accumulate_function ksort_avx512_accumulate_float, ksort_avx512_accumulate_bfp;

score_function ksort_avx512vnni_scores_bfp_by_bfp;
accumulate_function ksort_avx512vnni_accumulate_bfp;

#endif /* KSORT_X86_H */
