/* The AArch64 level "neon": Advanced SIMD with the dot product instructions of ARMv8.2 (SDOT), 32 registers of 128 bits.
 * Contracts are in kernels.h. */
#ifndef KSORT_ARM_H
#define KSORT_ARM_H

#include "kernels.h"

extern const struct kernels ksort_kernels_neon;

max_magnitude_function ksort_neon_max_magnitude;
rope_function ksort_neon_rope;
round_function ksort_neon_round_bfp, ksort_neon_round_sbfp;
transform_function ksort_neon_transform_key, ksort_neon_transform_query;
restore_function ksort_neon_restore_value;
encode_function ksort_neon_encode_transformed;
store_function ksort_neon_store_f16, ksort_neon_store_bf16;
score_function ksort_neon_scores_bfp_by_bfp, ksort_neon_scores_bfp_by_f32, ksort_neon_scores_float;
softmax_function ksort_neon_softmax_tile;
accumulate_function ksort_neon_accumulate_float, ksort_neon_accumulate_bfp;

#endif /* KSORT_ARM_H */
