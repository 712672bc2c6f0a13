/* RoPE with AVX2, 8 channels a register:
 *
 *     y[c] = x[c] * cos[frequency[c]] + (sign[c] * x[partner[c]]) * sin[frequency[c]]
 *                   lookup                         lookup           lookup
 *
 * Lookups are loads (lanes_avx2.h). The last register of a head begins so early that it is whole.
 * Bytes moved: 4 head_dim in and out, 5 head_dim of tables from L1, 8 n_frequencies of cos and sin.
 */
#include "scalar/scalar.h"
#include "x86/lanes_avx2.h"

/* Frequencies of 8 channels. Those of channels that don't turn may be any: they become one that exists. */
ALWAYS_INLINE void load_frequencies(const struct rope_row *rope, uint32_t c, uint16_t frequencies[LANES])
{
    const __m128i last = _mm_set1_epi16((int16_t)min_size(rope->n_frequencies - 1, UINT16_MAX));
    __m128i eight = _mm_loadu_si128((const __m128i *)(rope->frequency + c));
    _mm_storeu_si128((__m128i *)frequencies, _mm_min_epu16(eight, last));
}

ALWAYS_INLINE void rope_eight(const struct rope_row *rope, const float *x, uint32_t c, float *y)
{
    uint16_t frequencies[LANES];
    load_frequencies(rope, c, frequencies);
    __m256i signs = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(rope->sign + c)));
    __m256i stays = _mm256_cmpeq_epi32(signs, _mm256_setzero_si256());
    __m256i sign_bits = _mm256_and_si256(signs, _mm256_set1_epi32(INT32_MIN));
    __m256 own = _mm256_loadu_ps(x + c);
    __m256 turned = _mm256_xor_ps(look_up_eight(x, rope->partner + c), _mm256_castsi256_ps(sign_bits));
    __m256 sum = own * look_up_eight(rope->cos, frequencies) + turned * look_up_eight(rope->sin, frequencies);
    _mm256_storeu_ps(y + c, _mm256_blendv_ps(sum, own, _mm256_castsi256_ps(stays)));
}

void ksort_avx2_rope(const struct rope_row *rope, const float *x, uint32_t head_dim, float *y)
{
    if (head_dim < LANES) {
        ksort_scalar_rope(rope, x, head_dim, y);
        return;
    }
    for (uint32_t c = 0; c < head_dim; c += LANES)
        rope_eight(rope, x, (uint32_t)min_size(c, head_dim - LANES), y);
}
