/* The scalar level: complete, and the oracle of the others. Contracts are in kernels.h. */
#ifndef KSORT_SCALAR_H
#define KSORT_SCALAR_H

#include "kernels.h"

uint32_t ksort_scalar_max_magnitude(const float *x, size_t n);
void ksort_scalar_rope(const struct rope_row *rope, const float *x, uint32_t head_dim, float *y);
void ksort_scalar_round_bfp(const float *x, uint32_t head_dim, uint32_t block_size, uint32_t mantissa_bits,
                            int8_t *mantissas, uint8_t *exponents);
void ksort_scalar_transform_key(const struct head_transform *transform, uint32_t head_dim, float *y);
void ksort_scalar_transform_query(const struct head_transform *transform, uint32_t head_dim, float *q);
void ksort_scalar_restore_value(const struct head_transform *transform, const uint16_t *places, uint32_t head_dim,
                                float *out);
void ksort_scalar_encode_transformed(const struct head_transform *transform, const struct head_layout *layout,
                                     uint32_t n_tokens, float (*heads)[KSORT_MAX_HEAD_DIM],
                                     struct encoded_head *encoded);
void ksort_scalar_store_f16(const float *x, uint32_t n, uint16_t *out);
void ksort_scalar_store_bf16(const float *x, uint32_t n, uint16_t *out);

score_function ksort_scalar_scores_bfp_by_bfp, ksort_scalar_scores_bfp_by_f32, ksort_scalar_scores_float;

softmax_function ksort_scalar_softmax_tile;
accumulate_function ksort_scalar_accumulate_float, ksort_scalar_accumulate_bfp;
void ksort_scalar_linear(const struct linear_block *block);
void ksort_scalar_rms_norm(float *x, const float *added, const float *gain, uint32_t n, float epsilon, float *y);
void ksort_scalar_swiglu(const float *gate, const float *up, uint32_t n, float *y);

#endif /* KSORT_SCALAR_H */
