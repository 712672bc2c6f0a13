/* The x86-64 kernels, each set overriding the one before. Contracts are in kernels.h.
 *   names              instructions            from level
 *   ksort_avx2_        AVX2, FMA, F16C         "avx2"
 *   ksort_avx512_      AVX-512 F, BW, VL, DQ   "avx512bw"
 *   ksort_avx512vnni_  and VNNI                "avx512"
 */
#ifndef KSORT_X86_H
#define KSORT_X86_H

#include "kernels.h"

uint32_t ksort_avx2_max_magnitude(const float *x, size_t n);
void ksort_avx2_rope(const struct rope_row *rope, const float *x, uint32_t head_dim, float *y);
void ksort_avx2_round_bfp(const float *x, uint32_t head_dim, uint32_t block_size, uint32_t mantissa_bits,
                          int8_t *mantissas, uint8_t *exponents);
void ksort_avx2_transform_key(const struct head_transform *transform, uint32_t head_dim, float *y);
void ksort_avx2_transform_query(const struct head_transform *transform, uint32_t head_dim, float *q);
void ksort_avx2_restore_value(const struct head_transform *transform, const uint16_t *places, uint32_t head_dim,
                              float *out);
void ksort_avx2_encode_transformed(const struct head_transform *transform, const struct head_layout *layout,
                                   uint32_t n_tokens, float (*heads)[KSORT_MAX_HEAD_DIM],
                                   struct encoded_head *encoded);
void ksort_avx2_store_f16(const float *x, uint32_t n, uint16_t *out);
void ksort_avx2_store_bf16(const float *x, uint32_t n, uint16_t *out);
score_function ksort_avx2_scores_bfp_by_bfp, ksort_avx2_scores_bfp_by_f32, ksort_avx2_scores_float;
softmax_function ksort_avx2_softmax_tile;
accumulate_function ksort_avx2_accumulate_float, ksort_avx2_accumulate_bfp;
void ksort_avx2_linear(const struct linear_block *block);
void ksort_avx2_rms_norm(float *x, const float *added, const float *gain, uint32_t n, float epsilon, float *y);
void ksort_avx2_swiglu(const float *gate, const float *up, uint32_t n, float *y);

uint32_t ksort_avx512_max_magnitude(const float *x, size_t n);
void ksort_avx512_rope(const struct rope_row *rope, const float *x, uint32_t head_dim, float *y);
void ksort_avx512_round_bfp(const float *x, uint32_t head_dim, uint32_t block_size, uint32_t mantissa_bits,
                            int8_t *mantissas, uint8_t *exponents);
void ksort_avx512_transform_key(const struct head_transform *transform, uint32_t head_dim, float *y);
void ksort_avx512_transform_query(const struct head_transform *transform, uint32_t head_dim, float *q);
void ksort_avx512_restore_value(const struct head_transform *transform, const uint16_t *places, uint32_t head_dim,
                                float *out);
void ksort_avx512_encode_transformed(const struct head_transform *transform, const struct head_layout *layout,
                                     uint32_t n_tokens, float (*heads)[KSORT_MAX_HEAD_DIM],
                                     struct encoded_head *encoded);
void ksort_avx512_store_f16(const float *x, uint32_t n, uint16_t *out);
void ksort_avx512_store_bf16(const float *x, uint32_t n, uint16_t *out);
score_function ksort_avx512_scores_bfp_by_bfp, ksort_avx512_scores_bfp_by_f32, ksort_avx512_scores_float;
softmax_function ksort_avx512_softmax_tile;
accumulate_function ksort_avx512_accumulate_float, ksort_avx512_accumulate_bfp;
void ksort_avx512_linear(const struct linear_block *block);
void ksort_avx512_rms_norm(float *x, const float *added, const float *gain, uint32_t n, float epsilon, float *y);
void ksort_avx512_swiglu(const float *gate, const float *up, uint32_t n, float *y);

score_function ksort_avx512vnni_scores_bfp_by_bfp;
accumulate_function ksort_avx512vnni_accumulate_bfp;

#endif /* KSORT_X86_H */
