/* The one place that chooses kernels: the table of a level that the CPU supports. */
#include <pthread.h>
#include <stdlib.h>

#include "kernels.h"
#include "scalar/scalar.h"
#ifdef KSORT_X86_64
#include <cpuid.h>

#include "x86/x86.h"

enum level { LEVEL_SCALAR, LEVEL_AVX2, LEVEL_AVX512BW, LEVEL_AVX512, N_LEVELS };

static const struct kernels *const tables[N_LEVELS] = {&ksort_kernels_scalar, &ksort_kernels_avx2,
                                                       &ksort_kernels_avx512bw, &ksort_kernels_avx512};
#elif defined(KSORT_AARCH64)
#include <asm/hwcap.h>
#include <sys/auxv.h>

#include "arm/arm.h"

enum level { LEVEL_SCALAR, LEVEL_NEON, N_LEVELS };

static const struct kernels *const tables[N_LEVELS] = {&ksort_kernels_scalar, &ksort_kernels_neon};
#else
enum level { LEVEL_SCALAR, N_LEVELS };

static const struct kernels *const tables[N_LEVELS] = {&ksort_kernels_scalar};
#endif

static const struct kernels *table; /* in use */
static pthread_once_t first_use = PTHREAD_ONCE_INIT;

#ifdef KSORT_X86_64
/* Asked of the processor itself: clang 14's __builtin_cpu_supports does not know "f16c". */
static bool cpu_has_f16c(void)
{
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

/* __builtin_cpu_supports asks the operating system's XCR0 too: a level is only reported if its registers are saved. */
static enum level best_level(void)
{
#ifdef KSORT_X86_64
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && cpu_has_f16c()))
        return LEVEL_SCALAR;
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")))
        return LEVEL_AVX2;
    return __builtin_cpu_supports("avx512vnni") ? LEVEL_AVX512 : LEVEL_AVX512BW;
#elif defined(KSORT_AARCH64)
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP ? LEVEL_NEON : LEVEL_SCALAR;
#else
    return LEVEL_SCALAR;
#endif
}

/* NULL means the best level. False: unknown or unsupported, and nothing changed. */
static bool select_level(const char *name)
{
    enum level best = best_level();
    if (!name) {
        table = tables[best];
        return true;
    }
#ifdef KSORT_X86_64
    if (best == LEVEL_AVX512BW && strcmp(name, ksort_kernels_avx512.level) == 0)
        name = ksort_kernels_avx512bw.level; /* "avx512" asks for VNNI only where it is present */
#endif
    for (enum level level = LEVEL_SCALAR; level <= best; level++)
        if (strcmp(name, tables[level]->level) == 0) {
            table = tables[level];
            return true;
        }
    return false;
}

static void select_from_environment(void)
{
    const char *name = getenv("KSORT_KERNELS");
    select_level(name && *name ? name : NULL);
}

const struct kernels *ksort_kernel_table(void)
{
    pthread_once(&first_use, select_from_environment);
    return table;
}

const char *ksort_kernels(void)
{
    const struct kernels *kernels = ksort_kernel_table();
    return kernels ? kernels->level : "unsupported";
}

ksort_status ksort_select_kernels(const char *level)
{
    ksort_kernel_table(); /* the first use, or it would undo this choice later */
    return select_level(level) ? KSORT_OK : KSORT_ERR_KERNELS;
}
