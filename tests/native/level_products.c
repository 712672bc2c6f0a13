/* The part of `levels` for what a transformer block does around attention: products agree within twice the bound of one
 * level, sums are the same. */
#include "ksort_run.h"
#include "levels.h"

/* A finite weight, random or the type's largest. f16 and bf16: the bits. */
static void set_weight(rng *r, uint32_t type, int is_largest, void *weights, size_t i) {
    float value = rng_float(r);
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (type == KSORT_F32) ((float *)weights)[i] = is_largest ? 0x1.FFFFFEp60f : value;
    else if (type == KSORT_BF16) ((uint16_t *)weights)[i] = (uint16_t)(is_largest ? 0x5DFF : bits >> 16);
    else ((uint16_t *)weights)[i] = (uint16_t)(is_largest ? 0x7BFF : rng_between(r, 0, 0x7BFF) | (bits >> 31) << 15);
}

static double weight_at(uint32_t type, const void *weights, size_t i) {
    if (type == KSORT_F32) return ((const float *)weights)[i];
    uint16_t half = ((const uint16_t *)weights)[i];
    if (type == KSORT_BF16) {
        uint32_t bits = (uint32_t)half << 16;
        float value;
        memcpy(&value, &bits, sizeof value);
        return value;
    }
    int exponent = half >> 10 & 31, mantissa = half & 0x3FF;
    double value = ldexp(exponent ? mantissa + 1024 : mantissa, (exponent ? exponent : 1) - 25);
    return half >> 15 ? -value : value;
}

/* Sums of n_in products in any order, fused or not, and the bias differ by at most 2 (n_in + 1) u times the sum of
 * magnitudes, and by what is lost below the normal numbers. */
static void check_products(const ksort_linear_args *args, const float *got, const float *expected) {
    for (uint32_t row = 0; row < args->n_rows; row++)
        for (size_t o = 0; o < args->n_out; o++) {
            double sum = fabs((double)args->bias[o]);
            for (size_t i = 0; i < args->n_in; i++) {
                double weight = weight_at(args->type, args->weights, o * args->n_in + i);
                sum += fabs(weight * args->x[row * args->x_row_stride + i]);
            }
            double limit = 2 * (double)(args->n_in + 1) * (HALF_ULP * sum + 0x1p-149);
            size_t at = row * args->y_row_stride + o;
            CHECK(fabs((double)got[at] - expected[at]) <= limit);
        }
}

static void compare_linear(rng *r) {
    uint32_t type = rng_between(r, KSORT_F32, KSORT_BF16), nth = rng_between(r, 1, 4), n_rows = rng_between(r, 1, 30);
    size_t n_out = rng_between(r, 1, 70), n_in = rng_between(r, 1, rng_next(r) >> 63 ? 80 : 2100);
    size_t x_stride = n_in + rng_between(r, 0, 5), y_stride = n_out + rng_between(r, 0, 5);
    size_t n_y = strided_floats(n_rows, y_stride, n_out), n_x = strided_floats(n_rows, x_stride, n_in);
    int at_end = (int)rng_between(r, 0, 1), is_largest = rng_between(r, 0, 3) == 0;
    guarded weights = guarded_new(n_out * n_in * (type == KSORT_F32 ? 4 : 2), at_end);
    guarded bias = guarded_new(n_out * sizeof(float), at_end), x = guarded_new(n_x * sizeof(float), at_end);
    guarded y = guarded_new(n_y * sizeof(float), at_end);
    for (size_t i = 0; i < n_out * n_in; i++) set_weight(r, type, is_largest, weights.data, i);
    rng_floats(r, bias.data, n_out);
    fill(r, rng_between(r, RANDOM, N_KINDS - 1), 0x1.FFFFFEp50f, x.data, n_x); /* 2100 products fit */
    ksort_linear_args args = {sizeof args, weights.data, x.data, y.data, x_stride, y_stride,
                              n_out, n_in, n_rows, type, bias.data};
    float *expected = malloc(n_y * sizeof *expected);
    CHECK(expected);
    for (int i = -1; i < N_LEVELS; i++) {
        if (ksort_select_kernels(i < 0 ? "scalar" : LEVELS[i]) != KSORT_OK) continue;
        memset(y.data, 0xFF, n_y * sizeof(float));
        for (uint32_t ith = 0; ith < nth; ith++) CHECK_OK(ksort_linear(&args, ith, nth));
        if (i < 0) memcpy(expected, y.data, n_y * sizeof *expected);
        check_products(&args, y.data, expected);
        check_rows(y.data, expected, n_rows, y_stride, n_out, INFINITY);
    }
    free(expected);
    guarded_free(y);
    guarded_free(x);
    guarded_free(bias);
    guarded_free(weights);
}

/* What rounds a sum and a product each on its own: x += scale * added, the same at every level. */
static void add_scaled(float *x, const float *added, float scale, size_t n) {
    for (size_t i = 0; i < n; i++) {
        volatile float product = scale * added[i];
        x[i] += product;
    }
}

/* x [n_rows, heads, n] after it, by args with one head a call and added_scale, where 1 is meant, left 0. */
static void normalize_heads_alone(ksort_rms_norm_args args) {
    ksort_rms_norm_args one = args;
    one.heads = 0;
    if (one.added_scale == 1.0f) one.added_scale = 0.0f;
    for (uint32_t head = 0; head < args.heads; head++) {
        size_t at = (size_t)head * args.n;
        one.x = args.x + at, one.y = args.y + at, one.added = args.added ? args.added + at : NULL;
        CHECK_OK(ksort_rms_norm(&one, 0, 1));
    }
}

/* y is off by what a sum of n squares may be, half of that after the square root, and by 5 roundings. Heads in one row
 * have the bits of heads alone. */
static void compare_rms_norm(rng *r) {
    uint32_t n = rng_between(r, 1, 300), n_rows = rng_between(r, 1, 5), nth = rng_between(r, 1, 4);
    uint32_t heads = rng_next(r) >> 63 ? 1 : rng_between(r, 2, 5);
    size_t row = (size_t)heads * n, stride = row + rng_between(r, 0, 5), n_x = strided_floats(n_rows, stride, row);
    int at_end = (int)rng_between(r, 0, 1), has_added = (int)rng_between(r, 0, 1);
    guarded x = guarded_new(n_x * sizeof(float), at_end), added = guarded_new(n_x * sizeof(float), at_end);
    guarded gain = guarded_new(n * sizeof(float), at_end), y = guarded_new(n_x * sizeof(float), at_end);
    float *before = malloc(n_x * sizeof *before), *sum = malloc(n_x * sizeof *sum), *alone = malloc(n_x * sizeof *alone);
    float *expected = malloc(n_x * sizeof *expected), scale = rng_next(r) >> 63 ? 1.0f : 0.22f;
    CHECK(before && sum && alone && expected);
    fill(r, rng_between(r, RANDOM, N_KINDS - 1), 0x1.FFFFFEp50f, before, n_x);
    rng_floats(r, added.data, n_x);
    rng_floats(r, gain.data, n);
    ksort_rms_norm_args args = {sizeof args, x.data, gain.data, y.data, stride, stride, n, n_rows, 1e-5f, heads,
                                has_added ? added.data : NULL, stride, scale};
    memcpy(sum, before, n_x * sizeof *before);
    for (size_t i = 0; has_added && i < n_rows; i++)
        add_scaled(sum + i * stride, (float *)added.data + i * stride, scale, row);
    for (int i = -1; i < N_LEVELS; i++) {
        if (ksort_select_kernels(i < 0 ? "scalar" : LEVELS[i]) != KSORT_OK) continue;
        memcpy(x.data, before, n_x * sizeof *before);
        memset(y.data, 0xFF, n_x * sizeof(float));
        normalize_heads_alone(args);
        memcpy(alone, y.data, n_x * sizeof *alone);
        memcpy(x.data, before, n_x * sizeof *before);
        memset(y.data, 0xFF, n_x * sizeof(float));
        for (uint32_t ith = 0; ith < nth; ith++) CHECK_OK(ksort_rms_norm(&args, ith, nth));
        CHECK(memcmp(x.data, sum, n_x * sizeof *sum) == 0 && memcmp(y.data, alone, n_x * sizeof *alone) == 0);
        if (i < 0) memcpy(expected, y.data, n_x * sizeof *expected);
        for (size_t at = 0; at < n_x; at++)
            if (at % stride < row) {
                double limit = 2 * (n / 2 + 5) * HALF_ULP * fabs((double)expected[at]) + 0x1p-148;
                CHECK(fabs((double)((float *)y.data)[at] - expected[at]) <= limit);
            }
        check_rows(y.data, expected, n_rows, stride, row, INFINITY);
    }
    free(before), free(sum), free(alone), free(expected);
    guarded_free(y);
    guarded_free(gain);
    guarded_free(added);
    guarded_free(x);
}

/* Off by an ulp of exp and 5 roundings. Where exp(-gate) is cut to 2^-125, the product is that much too large. */
static void compare_swiglu(rng *r) {
    uint32_t n = rng_between(r, 1, 300), n_rows = rng_between(r, 1, 5), nth = rng_between(r, 1, 4);
    size_t stride = n + rng_between(r, 0, 5), n_x = strided_floats(n_rows, stride, n);
    int at_end = (int)rng_between(r, 0, 1);
    guarded gate = guarded_new(n_x * sizeof(float), at_end), up = guarded_new(n_x * sizeof(float), at_end);
    guarded y = guarded_new(n_x * sizeof(float), at_end);
    float *gates = gate.data, *ups = up.data, *expected = malloc(n_x * sizeof *expected);
    CHECK(expected);
    fill(r, rng_between(r, RANDOM, N_KINDS - 1), 100.0f, gates, n_x);
    if (rng_next(r) >> 63)
        for (size_t i = 0; i < n_x; i++) gates[i] *= 60.0f;
    rng_floats(r, ups, n_x);
    ksort_swiglu_args args = {sizeof args, gates, ups, y.data, stride, stride, n, n_rows};
    for (int i = -1; i < N_LEVELS; i++) {
        if (ksort_select_kernels(i < 0 ? "scalar" : LEVELS[i]) != KSORT_OK) continue;
        memset(y.data, 0xFF, n_x * sizeof(float));
        for (uint32_t ith = 0; ith < nth; ith++) CHECK_OK(ksort_swiglu(&args, ith, nth));
        if (i < 0) memcpy(expected, y.data, n_x * sizeof *expected);
        for (size_t at = 0; at < n_x; at++)
            if (at % stride < n) {
                double limit = 2 * 7 * HALF_ULP * fabs((double)expected[at]);
                limit += fabs((double)gates[at] * ups[at]) * 0x1p-125 + 0x1p-148;
                CHECK(fabs((double)((float *)y.data)[at] - expected[at]) <= limit);
            }
        check_rows(y.data, expected, n_rows, stride, n, INFINITY);
    }
    free(expected);
    guarded_free(y);
    guarded_free(up);
    guarded_free(gate);
}

void compare_products(rng *r) {
    compare_linear(r);
    compare_rms_norm(r);
    compare_swiglu(r);
}
