/* The one place that chooses kernels: a table, filled from scalar upward until the chosen level is reached. */
#include <pthread.h>
#include <stdlib.h>

#include "kernels.h"
#include "scalar/scalar.h"
#ifdef KSORT_X86_64
#include <cpuid.h>

#include "x86/x86.h"

enum level { LEVEL_SCALAR, LEVEL_AVX2, LEVEL_AVX512BW, LEVEL_AVX512, N_LEVELS };

static const char *const level_names[N_LEVELS] = {"scalar", "avx2", "avx512bw", "avx512"};
#elif defined(KSORT_AARCH64)
#include <asm/hwcap.h>
#include <sys/auxv.h>

#include "arm/arm.h"

enum level { LEVEL_SCALAR, LEVEL_NEON, N_LEVELS };

static const char *const level_names[N_LEVELS] = {"scalar", "neon"};
#else
enum level { LEVEL_SCALAR, N_LEVELS };

static const char *const level_names[N_LEVELS] = {"scalar"};
#endif

static struct kernels table;
static bool table_is_set;
static pthread_once_t first_use = PTHREAD_ONCE_INIT;

static void fill_table(enum level level)
{
    table = (struct kernels){
        .level = level_names[level],
        .max_magnitude = ksort_scalar_max_magnitude,
        .rope = ksort_scalar_rope,
        .round_bfp = ksort_scalar_round_bfp,
        .transform_key = ksort_scalar_transform_key,
        .transform_query = ksort_scalar_transform_query,
        .restore_value = ksort_scalar_restore_value,
        .encode_transformed = ksort_scalar_encode_transformed,
        .store_f16 = ksort_scalar_store_f16,
        .store_bf16 = ksort_scalar_store_bf16,
        .scores_bfp_by_bfp = ksort_scalar_scores_bfp_by_bfp,
        .scores_bfp_by_f32 = ksort_scalar_scores_bfp_by_f32,
        .scores_float = ksort_scalar_scores_float,
        .softmax_tile = ksort_scalar_softmax_tile,
        .accumulate_float = ksort_scalar_accumulate_float,
        .accumulate_bfp = ksort_scalar_accumulate_bfp,
        .linear = ksort_scalar_linear,
        .rms_norm = ksort_scalar_rms_norm,
        .swiglu = ksort_scalar_swiglu,
    };
    table_is_set = true;
    if (level == LEVEL_SCALAR)
        return;
#ifdef KSORT_X86_64
    table.max_magnitude = ksort_avx2_max_magnitude;
    table.rope = ksort_avx2_rope;
    table.round_bfp = ksort_avx2_round_bfp;
    table.transform_key = ksort_avx2_transform_key;
    table.transform_query = ksort_avx2_transform_query;
    table.restore_value = ksort_avx2_restore_value;
    table.encode_transformed = ksort_avx2_encode_transformed;
    table.store_f16 = ksort_avx2_store_f16;
    table.store_bf16 = ksort_avx2_store_bf16;
    table.scores_bfp_by_bfp = ksort_avx2_scores_bfp_by_bfp;
    table.scores_bfp_by_f32 = ksort_avx2_scores_bfp_by_f32;
    table.scores_float = ksort_avx2_scores_float;
    table.softmax_tile = ksort_avx2_softmax_tile;
    table.accumulate_float = ksort_avx2_accumulate_float;
    table.accumulate_bfp = ksort_avx2_accumulate_bfp;
    table.linear = ksort_avx2_linear;
    table.rms_norm = ksort_avx2_rms_norm;
    table.swiglu = ksort_avx2_swiglu;
    if (level == LEVEL_AVX2)
        return;

    table.max_magnitude = ksort_avx512_max_magnitude;
    table.rope = ksort_avx512_rope;
    table.round_bfp = ksort_avx512_round_bfp;
    table.transform_key = ksort_avx512_transform_key;
    table.transform_query = ksort_avx512_transform_query;
    table.restore_value = ksort_avx512_restore_value;
    table.encode_transformed = ksort_avx512_encode_transformed;
    table.store_f16 = ksort_avx512_store_f16;
    table.store_bf16 = ksort_avx512_store_bf16;
    table.scores_bfp_by_bfp = ksort_avx512_scores_bfp_by_bfp;
    table.scores_bfp_by_f32 = ksort_avx512_scores_bfp_by_f32;
    table.scores_float = ksort_avx512_scores_float;
    table.softmax_tile = ksort_avx512_softmax_tile;
    table.accumulate_float = ksort_avx512_accumulate_float;
    table.accumulate_bfp = ksort_avx512_accumulate_bfp;
    table.linear = ksort_avx512_linear;
    table.rms_norm = ksort_avx512_rms_norm;
    table.swiglu = ksort_avx512_swiglu;
    if (level == LEVEL_AVX512BW)
        return;

    table.scores_bfp_by_bfp = ksort_avx512vnni_scores_bfp_by_bfp;
    table.accumulate_bfp = ksort_avx512vnni_accumulate_bfp;
#elif defined(KSORT_AARCH64)
    table.max_magnitude = ksort_neon_max_magnitude;
    table.rope = ksort_neon_rope;
    table.round_bfp = ksort_neon_round_bfp;
    table.transform_key = ksort_neon_transform_key;
    table.transform_query = ksort_neon_transform_query;
    table.restore_value = ksort_neon_restore_value;
    table.encode_transformed = ksort_neon_encode_transformed;
    table.store_f16 = ksort_neon_store_f16;
    table.store_bf16 = ksort_neon_store_bf16;
    table.scores_bfp_by_bfp = ksort_neon_scores_bfp_by_bfp;
    table.scores_bfp_by_f32 = ksort_neon_scores_bfp_by_f32;
    table.scores_float = ksort_neon_scores_float;
    table.softmax_tile = ksort_neon_softmax_tile;
    table.accumulate_float = ksort_neon_accumulate_float;
    table.accumulate_bfp = ksort_neon_accumulate_bfp;
    table.linear = ksort_neon_linear;
    table.rms_norm = ksort_neon_rms_norm;
    table.swiglu = ksort_neon_swiglu;
#endif
}

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
        fill_table(best);
        return true;
    }
#ifdef KSORT_X86_64
    if (best == LEVEL_AVX512BW && strcmp(name, level_names[LEVEL_AVX512]) == 0)
        name = level_names[best]; /* "avx512" asks for VNNI only where it is present */
#endif
    for (enum level level = LEVEL_SCALAR; level <= best; level++)
        if (strcmp(name, level_names[level]) == 0) {
            fill_table(level);
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
    return table_is_set ? &table : NULL;
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
