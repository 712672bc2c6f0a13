/* Packing with AVX2, one head of one token a call, 8 channels a register; a row's rest is the scalar level's.
 *
 *     x [8] f32 --> block maximum (integer compare of magnitudes) --> exponent, or SBFP's scale
 *     x [8] f32 --> x / step --> i32, ties to even --> clamp --> i8 [8]
 *
 * Bytes moved: 4 head_dim in, head_dim + blocks out (to the stack; the words follow from there).
 */
#include <immintrin.h>

#include "half.h"
#include "rounding.h"
#include "scalar/scalar.h"
#include "x86/x86.h"

uint32_t ksort_avx2_max_magnitude(const float *x, size_t n)
{
    const __m256i magnitude_bits = _mm256_set1_epi32(0x7FFFFFFF);
    __m256i maxima[4] = {0};
    size_t i = 0;
    for (; i + 32 <= n; i += 32) /* one maximum would wait for the one before */
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
            __m256i bits = _mm256_loadu_si256((const __m256i *)(x + i + 8 * k));
            maxima[k] = _mm256_max_epu32(maxima[k], _mm256_and_si256(bits, magnitude_bits));
        }
    __m256i max = _mm256_max_epu32(_mm256_max_epu32(maxima[0], maxima[1]), _mm256_max_epu32(maxima[2], maxima[3]));
    for (; i + 8 <= n; i += 8) {
        __m256i bits = _mm256_loadu_si256((const __m256i *)(x + i));
        max = _mm256_max_epu32(max, _mm256_and_si256(bits, magnitude_bits));
    }
    __m128i half = _mm_max_epu32(_mm256_castsi256_si128(max), _mm256_extracti128_si256(max, 1));
    half = _mm_max_epu32(half, _mm_shuffle_epi32(half, _MM_SHUFFLE(1, 0, 3, 2)));
    half = _mm_max_epu32(half, _mm_shuffle_epi32(half, _MM_SHUFFLE(2, 3, 0, 1)));
    uint32_t of_registers = (uint32_t)_mm_cvtsi128_si32(half);
    uint32_t of_rest = ksort_scalar_max_magnitude(x + i, n - i);
    return of_registers > of_rest ? of_registers : of_rest;
}

/* Eight channels in units of a block's step: times its inverse, or divided by `first`, an SBFP scale before rounding. */
typedef __m256 units_function(const float *x, struct step_inverse inverse);

ALWAYS_INLINE __m256 units_of_exponent(const float *x, struct step_inverse inverse)
{
    __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(x), _mm256_set1_ps(inverse.first));
    return _mm256_mul_ps(scaled, _mm256_set1_ps(inverse.second));
}

ALWAYS_INLINE __m256 units_of_scale(const float *x, struct step_inverse scale)
{
    return _mm256_div_ps(_mm256_loadu_ps(x), _mm256_set1_ps(scale.first));
}

/* Rounded and clamped to -limit .. limit, as bytes. */
ALWAYS_INLINE int64_t round_eight(__m256 units, int32_t limit)
{
    __m256i rounded = _mm256_cvtps_epi32(units);
    rounded = _mm256_min_epi32(rounded, _mm256_set1_epi32(limit));
    rounded = _mm256_max_epi32(rounded, _mm256_set1_epi32(-limit));
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
    return _mm_cvtsi128_si64(_mm_packs_epi16(words, words));
}

/* Channels of one block that is not stored as zeros. */
ALWAYS_INLINE void round_block(const float *x, uint32_t n, struct step_inverse inverse, units_function *units,
                               int32_t limit, int8_t *mantissas)
{
    uint32_t c = 0;
    for (; c + 8 <= n; c += 8) {
        int64_t bytes = round_eight(units(x + c, inverse), limit);
        memcpy(mantissas + c, &bytes, 8);
    }
    if (c < n) {
        float rest[8] = {0};
        memcpy(rest, x + c, (n - c) * sizeof *x);
        int64_t bytes = round_eight(units(rest, inverse), limit);
        memcpy(mantissas + c, &bytes, n - c);
    }
}

void ksort_avx2_round_bfp(const float *x, uint32_t head_dim, uint32_t block_size, uint32_t mantissa_bits,
                          int8_t *mantissas, uint8_t *exponents)
{
    const int32_t limit = (1 << (mantissa_bits - 1)) - 1;
    for (uint32_t begin = 0; begin < head_dim; begin += block_size) {
        uint32_t n = (uint32_t)min_size(block_size, head_dim - begin);
        uint32_t exponent = ksort_avx2_max_magnitude(x + begin, n) >> 23;
        *exponents++ = (uint8_t)exponent;
        if (exponent == 0)
            memset(mantissas + begin, 0, n);
        else
            round_block(x + begin, n, step_inverse_of(exponent, mantissa_bits), units_of_exponent, limit,
                        mantissas + begin);
    }
}

void ksort_avx2_round_sbfp(const float *x, uint32_t head_dim, uint32_t block_size, uint32_t mantissa_bits,
                           int8_t *mantissas, uint8_t *codes)
{
    const int32_t limit = (1 << (mantissa_bits - 1)) - 1;
    for (uint32_t begin = 0; begin < head_dim; begin += block_size) {
        uint32_t n = (uint32_t)min_size(block_size, head_dim - begin);
        float scale = bits_float(ksort_avx2_max_magnitude(x + begin, n)) / (float)limit;
        *codes = scale_of_float(scale);
        if (*codes++ == 0)
            memset(mantissas + begin, 0, n);
        else
            round_block(x + begin, n, (struct step_inverse){scale, 1.0f}, units_of_scale, limit, mantissas + begin);
    }
}

void ksort_avx2_store_f16(const float *x, uint32_t n, uint16_t *out)
{
    uint32_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm_storeu_si128((__m128i *)(out + i), halves);
    }
    ksort_scalar_store_f16(x + i, n - i, out + i);
}

/* bits + 0x7FFF + (lowest kept bit), then the upper half: half.h. */
void ksort_avx2_store_bf16(const float *x, uint32_t n, uint16_t *out)
{
    const __m256i half = _mm256_set1_epi32(0x7FFF), one = _mm256_set1_epi32(1);
    uint32_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256i bits = _mm256_loadu_si256((const __m256i *)(x + i));
        __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
        bits = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, half), odd), 16);
        __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
        _mm_storeu_si128((__m128i *)(out + i), halves);
    }
    ksort_scalar_store_bf16(x + i, n - i, out + i);
}
