/* libksort_run: the engine of the project's own runner: what a transformer block does around attention, and a pool of
 * threads, so that a step needs no other threads than attention's. Private: it goes with the Python package and the
 * libksort of the same build, and may change with every version.
 *
 * ksort.h's conventions hold here too. Everything is float32; NaN and infinity are not looked for: they go through as in
 * any float arithmetic. Kernels are of the level that ksort_kernels() names.
 */
#ifndef KSORT_RUN_H
#define KSORT_RUN_H

#include "ksort.h"

#ifdef __cplusplus
extern "C" {
#endif

#define KSORT_RUN_ABI_VERSION 1

/* The version of the loaded library: equals KSORT_RUN_ABI_VERSION of the header it was built with. Thread-safe. */
uint32_t ksort_run_abi_version(void);

/* y = x W^T + bias. The last mandatory field is type. Products and sums are float32, whatever the weights' type; an output is summed by one part, in an
 * order that depends on the kernel level, on n_in and on whether n_rows is more than 4. For few rows, as in a decode
 * step, it is bound by reading the weights, which happens once. */
typedef struct ksort_linear_args {
    size_t struct_size;
    const void *weights; /* [n_out, n_in], rows contiguous */
    const float *x;      /* [n_rows, n_in] */
    float *y;            /* [n_rows, n_out] */
    size_t x_row_stride; /* floats between rows, at least n_in */
    size_t y_row_stride; /* floats between rows, at least n_out */
    size_t n_out;
    size_t n_in;
    uint32_t n_rows;
    uint32_t type;     /* of the weights: KSORT_F32, KSORT_F16 or KSORT_BF16 */
    const float *bias; /* [n_out], or NULL */
} ksort_linear_args;

/* Returns KSORT_OK, _ARGUMENT, _STRUCT_SIZE, _TYPE, _KERNELS. */
ksort_status ksort_linear(const ksort_linear_args *args, uint32_t ith, uint32_t nth);

/* x += added_scale * added, then y = gain * x / sqrt(mean of x^2 + epsilon) (RMSNorm, arXiv 1910.07467), for each vector.
 * A row holds `heads` vectors of n values one after another, which share the gain: one, or the heads of q or k in a row
 * of q, k and v. y may be x. The last mandatory field is epsilon. */
typedef struct ksort_rms_norm_args {
    size_t struct_size;
    float *x;            /* [n_rows, heads, n]; only read where added is NULL */
    const float *gain;   /* [n] */
    float *y;            /* [n_rows, heads, n] */
    size_t x_row_stride; /* floats between rows, at least heads * n; the other strides likewise */
    size_t y_row_stride;
    uint32_t n;
    uint32_t n_rows;
    float epsilon;
    uint32_t heads;     /* 0: 1 */
    const float *added; /* [n_rows, heads, n], or NULL */
    size_t added_row_stride;
    float added_scale; /* 0: 1. The product is rounded before it is added */
} ksort_rms_norm_args;

/* Returns KSORT_OK, _ARGUMENT, _STRUCT_SIZE, _KERNELS. */
ksort_status ksort_rms_norm(const ksort_rms_norm_args *args, uint32_t ith, uint32_t nth);

/* y = silu(gate) * up, silu(g) = g / (1 + exp(-g)) (SwiGLU, arXiv 2002.05202), for each row. y may be gate or up.
 * All fields are mandatory: the last is n_rows. */
typedef struct ksort_swiglu_args {
    size_t struct_size;
    const float *gate;   /* [n_rows, n] */
    const float *up;     /* [n_rows, n] */
    float *y;            /* [n_rows, n] */
    size_t row_stride;   /* of gate and of up: floats between rows, at least n */
    size_t y_row_stride; /* likewise */
    uint32_t n;
    uint32_t n_rows;
} ksort_swiglu_args;

/* Returns KSORT_OK, _ARGUMENT, _STRUCT_SIZE, _KERNELS. */
ksort_status ksort_swiglu(const ksort_swiglu_args *args, uint32_t ith, uint32_t nth);

/* Threads. A pool may be used by one thread at a time. */
typedef struct ksort_pool ksort_pool;

/* Starts n_threads - 1 threads (the caller is the last one), n_threads at most 65535.
 * Returns KSORT_OK, _ARGUMENT, _THREADS. */
ksort_status ksort_pool_create(uint32_t n_threads, ksort_pool **pool);

/* Ends the threads and frees the pool. NULL is allowed. */
void ksort_pool_destroy(ksort_pool *pool);

/* One layer's step: packs k and v, then attends, each over all threads. Any of the three may be NULL; the workspace is
 * for nth = n_threads. All arguments and values, q's too, are checked before anything is written; where attend finds an
 * overflow on the way, k and v are packed.
 * Returns KSORT_OK, _ARGUMENT for a NULL pool, or what ksort_pack, ksort_attend and ksort_attend_merge return: one of
 * the statuses that are not KSORT_OK, if several parts find different ones. */
ksort_status ksort_pool_step(ksort_pool *pool, const ksort_pack_args *k, const ksort_pack_args *v,
                             const ksort_attend_args *attend);

/* ksort_linear, ksort_rms_norm and ksort_swiglu over all threads. Return KSORT_OK, _ARGUMENT for a NULL pool, or what
 * those return. */
ksort_status ksort_pool_linear(ksort_pool *pool, const ksort_linear_args *args);
ksort_status ksort_pool_rms_norm(ksort_pool *pool, const ksort_rms_norm_args *args);
ksort_status ksort_pool_swiglu(ksort_pool *pool, const ksort_swiglu_args *args);

#ifdef __cplusplus
}
#endif

#endif /* KSORT_RUN_H */
