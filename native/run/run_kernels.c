/* The table that goes with the level that libksort has chosen: KSORT_KERNELS and ksort_select_kernels steer both. */
#include "run_kernels.h"

static const struct {
    const char *level;
    const struct run_kernels *kernels;
} tables[] = {
    {"scalar", &ksort_run_scalar},
#ifdef KSORT_X86_64
    {"avx2", &ksort_run_avx2},
    {"avx512bw", &ksort_run_avx512},
    {"avx512", &ksort_run_avx512},
#elif defined(KSORT_AARCH64)
    {"neon", &ksort_run_neon},
#endif
};

const struct run_kernels *ksort_run_kernels(void)
{
    const char *level = ksort_kernels();
    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++)
        if (strcmp(level, tables[i].level) == 0)
            return tables[i].kernels;
    return NULL;
}
