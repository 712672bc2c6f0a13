/* Packing with AVX-512, one head of one token a call, 16 channels a register:
 *
 *     x [16] f32 --> block maximum (integer compare of magnitudes) --> exponent
 *     x [16] f32 --> x / step --> i32, ties to even --> clamp --> i8 [16]
 *
 * Bytes moved: 4 head_dim in, head_dim + blocks out (to the stack; the words follow from there).
 */
#include <immintrin.h>

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

void ksort_avx512_round_bfp(const float *x, uint32_t head_dim, uint32_t block_size, uint32_t mantissa_bits,
                            int8_t *mantissas, uint8_t *exponents)
{
    const __m512i limit = _mm512_set1_epi32((1 << (mantissa_bits - 1)) - 1);
    const __m512i lowest = _mm512_sub_epi32(_mm512_setzero_si512(), limit);
    for (uint32_t begin = 0; begin < head_dim; begin += block_size) {
        uint32_t end = (uint32_t)min_size(begin + block_size, head_dim);
        uint32_t exponent = ksort_avx512_max_magnitude(x + begin, end - begin) >> 23;
        *exponents++ = (uint8_t)exponent;
        if (exponent == 0) {
            memset(mantissas + begin, 0, end - begin);
            continue;
        }
        struct step_inverse inverse = step_inverse_of(exponent, mantissa_bits);
        const __m512 first = _mm512_set1_ps(inverse.first), second = _mm512_set1_ps(inverse.second);
        for (uint32_t c = begin; c < end; c += 16) {
            __mmask16 lanes = first_lanes(end - c);
            __m512 scaled = _mm512_mul_ps(_mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, x + c), first), second);
            __m512i rounded = _mm512_cvtps_epi32(scaled);
            rounded = _mm512_max_epi32(_mm512_min_epi32(rounded, limit), lowest);
            _mm512_mask_cvtepi32_storeu_epi8(mantissas + c, lanes, rounded);
        }
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
