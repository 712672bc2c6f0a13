/* The AArch64 kernels, level "neon": Advanced SIMD with the dot product instructions of ARMv8.2 (SDOT), 32 registers of
 * 128 bits. Contracts are in kernels.h. */
#ifndef KSORT_ARM_H
#define KSORT_ARM_H

#include "kernels.h"

uint32_t ksort_neon_max_magnitude(const float *x, size_t n);
void ksort_neon_rope(const struct rope_row *rope, const float *x, uint32_t head_dim, float *y);
void ksort_neon_round_bfp(const float *x, uint32_t head_dim, uint32_t block_size, uint32_t mantissa_bits,
                          int8_t *mantissas, uint8_t *exponents);
void ksort_neon_transform_key(const struct head_transform *transform, uint32_t head_dim, float *y);
void ksort_neon_transform_query(const struct head_transform *transform, uint32_t head_dim, float *q);
void ksort_neon_restore_value(const struct head_transform *transform, const uint16_t *places, uint32_t head_dim,
                              float *out);
void ksort_neon_encode_transformed(const struct head_transform *transform, const struct head_layout *layout,
                                   uint32_t n_tokens, float (*heads)[KSORT_MAX_HEAD_DIM],
                                   struct encoded_head *encoded);
void ksort_neon_store_f16(const float *x, uint32_t n, uint16_t *out);
void ksort_neon_store_bf16(const float *x, uint32_t n, uint16_t *out);
score_function ksort_neon_scores_bfp_by_bfp, ksort_neon_scores_bfp_by_f32, ksort_neon_scores_float;
softmax_function ksort_neon_softmax_tile;
accumulate_function ksort_neon_accumulate_float, ksort_neon_accumulate_bfp;
void ksort_neon_linear(const struct linear_block *block);
void ksort_neon_rms_norm(float *x, const float *added, const float *gain, uint32_t n, float epsilon, float *y);
void ksort_neon_swiglu(const float *gate, const float *up, uint32_t n, float *y);
void ksort_neon_rms_norm(float *x, const float *added, const float *gain, uint32_t n, float epsilon, float *y);
void ksort_neon_swiglu(const float *gate, const float *up, uint32_t n, float *y);

#endif /* KSORT_ARM_H */
