/* What the two files of the program `levels` share: the levels, inputs, and comparing rows of floats. */
#ifndef KSORT_TEST_LEVELS_H
#define KSORT_TEST_LEVELS_H

#include <float.h>
#include <math.h>

#include "problems.h"

static const char *const LEVELS[] = {"avx2", "avx512bw", "avx512", "neon"};
enum { N_LEVELS = sizeof LEVELS / sizeof *LEVELS };

static const double HALF_ULP = 0x1p-24; /* u of native/README.md */

/* All mantissas largest (where they are wide enough to say so), with one sign or any; or numbers that no block can hold
 * but as zeros. */
typedef enum { RANDOM, SPREAD, SMALLEST, LARGEST, LARGEST_ONE_SIGN, N_KINDS } kind;

static inline void fill(rng *r, kind kind, float largest, float *x, size_t n) {
    for (size_t i = 0; i < n; i++) {
        float sign = rng_next(r) >> 63 && kind != LARGEST_ONE_SIGN ? -1.0f : 1.0f;
        if (kind == RANDOM) x[i] = rng_float(r);
        else if (kind == SPREAD) x[i] = ldexpf(rng_float(r), (int)rng_between(r, 0, 16) - 14);
        else x[i] = sign * (kind == SMALLEST ? FLT_TRUE_MIN * (float)rng_between(r, 1, 3) : largest);
    }
}

/* Rows of `row` floats that lie stride apart differ by at most `limit`, and nothing was written between them. */
static inline void check_rows(const float *got, const float *expected, uint32_t n_rows, size_t stride,
                              size_t row, double limit) {
    for (size_t i = 0; i < strided_floats(n_rows, stride, row); i++) {
        if (i % stride < row) CHECK(fabs((double)got[i] - expected[i]) <= limit);
        else CHECK(memcmp(&got[i], &expected[i], sizeof *got) == 0);
    }
}

/* One random problem each of ksort_linear, ksort_rms_norm and ksort_swiglu, at every level. */
void compare_products(rng *r);

#endif /* KSORT_TEST_LEVELS_H */
