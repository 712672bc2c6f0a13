/* Packing with AVX-512, one head of one token a call, 16 channels a register:
 *
 *     x [16] f32 --> block maximum (integer compare of magnitudes) --> exponent, or SBFP's scale
 *     x [16] f32 --> x / step --> i32, ties to even --> clamp --> i8 [16]
 *
 * Bytes moved: 4 head_dim in, head_dim + blocks out (to the stack; the words follow from there).
 */
#include <immintrin.h>

#include "half.h"
#include "rounding.h"
#include "x86/x86.h"

/* The first n of 16 lanes, all for n >= 16. */
ALWAYS_INLINE __mmask16 first_lanes(size_t n)
{
    return (__mmask16)(n < 16 ? (1u << n) - 1 : 0xFFFFu);
}

ALWAYS_INLINE __m512i magnitudes(__mmask16 lanes, const float *x)
{
    return _mm512_and_si512(_mm512_maskz_loadu_epi32(lanes, x), _mm512_set1_epi32(0x7FFFFFFF));
}

uint32_t ksort_avx512_max_magnitude(const float *x, size_t n)
{
    __m512i max = _mm512_setzero_si512();
    for (size_t i = 0; i < n; i += 16)
        max = _mm512_max_epu32(max, magnitudes(first_lanes(n - i), x + i));
    return _mm512_reduce_max_epu32(max);
}

/* 16 channels in units of a block's step: times its inverse, or divided by `first`, an SBFP scale before rounding. */
typedef __m512 units_function(__m512 x, struct step_inverse inverse);

ALWAYS_INLINE __m512 units_of_exponent(__m512 x, struct step_inverse inverse)
{
    return _mm512_mul_ps(_mm512_mul_ps(x, _mm512_set1_ps(inverse.first)), _mm512_set1_ps(inverse.second));
}

ALWAYS_INLINE __m512 units_of_scale(__m512 x, struct step_inverse scale)
{
    return _mm512_div_ps(x, _mm512_set1_ps(scale.first));
}

/* Channels of one block that is not stored as zeros. */
ALWAYS_INLINE void round_block(const float *x, uint32_t n, struct step_inverse inverse, units_function *units,
                               int32_t limit, int8_t *mantissas)
{
    const __m512i highest = _mm512_set1_epi32(limit), lowest = _mm512_set1_epi32(-limit);
    for (uint32_t c = 0; c < n; c += 16) {
        __mmask16 lanes = first_lanes(n - c);
        __m512i rounded = _mm512_cvtps_epi32(units(_mm512_maskz_loadu_ps(lanes, x + c), inverse));
        rounded = _mm512_max_epi32(_mm512_min_epi32(rounded, highest), lowest);
        _mm512_mask_cvtepi32_storeu_epi8(mantissas + c, lanes, rounded);
    }
}

void ksort_avx512_round_bfp(const float *x, uint32_t head_dim, uint32_t block_size, uint32_t mantissa_bits,
                            int8_t *mantissas, uint8_t *exponents)
{
    const int32_t limit = (1 << (mantissa_bits - 1)) - 1;
    for (uint32_t begin = 0; begin < head_dim; begin += block_size) {
        uint32_t n = (uint32_t)min_size(block_size, head_dim - begin);
        uint32_t exponent = ksort_avx512_max_magnitude(x + begin, n) >> 23;
        *exponents++ = (uint8_t)exponent;
        if (exponent == 0)
            memset(mantissas + begin, 0, n);
        else
            round_block(x + begin, n, step_inverse_of(exponent, mantissa_bits), units_of_exponent, limit,
                        mantissas + begin);
    }
}

void ksort_avx512_round_sbfp(const float *x, uint32_t head_dim, uint32_t block_size, uint32_t mantissa_bits,
                             int8_t *mantissas, uint8_t *codes)
{
    const int32_t limit = (1 << (mantissa_bits - 1)) - 1;
    for (uint32_t begin = 0; begin < head_dim; begin += block_size) {
        uint32_t n = (uint32_t)min_size(block_size, head_dim - begin);
        float scale = bits_float(ksort_avx512_max_magnitude(x + begin, n)) / (float)limit;
        *codes = scale_of_float(scale);
        if (*codes++ == 0)
            memset(mantissas + begin, 0, n);
        else
            round_block(x + begin, n, (struct step_inverse){scale, 1.0f}, units_of_scale, limit, mantissas + begin);
    }
}

void ksort_avx512_store_f16(const float *x, uint32_t n, uint16_t *out)
{
    for (uint32_t i = 0; i < n; i += 16) {
        __mmask16 lanes = first_lanes(n - i);
        __m512 values = _mm512_maskz_loadu_ps(lanes, x + i);
        __m256i halves = _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm256_mask_storeu_epi16(out + i, lanes, halves);
    }
}

/* bits + 0x7FFF + (lowest kept bit), then the upper half: half.h. */
void ksort_avx512_store_bf16(const float *x, uint32_t n, uint16_t *out)
{
    const __m512i half = _mm512_set1_epi32(0x7FFF), one = _mm512_set1_epi32(1);
    for (uint32_t i = 0; i < n; i += 16) {
        __mmask16 lanes = first_lanes(n - i);
        __m512i bits = _mm512_maskz_loadu_epi32(lanes, x + i);
        __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
        bits = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, half), odd), 16);
        _mm512_mask_cvtepi32_storeu_epi16(out + i, lanes, bits);
    }
}
