/* RoPE with AVX-512, 16 channels a register:
 *
 *     x, cos, sin --copied--> aligned tables;  for 16 channels c:
 *         y[c] = x[c] * cos[frequency[c]] + (sign[c] * x[partner[c]]) * sin[frequency[c]]
 *                       lookup                         lookup           lookup
 *
 * Lookups are permutations of registers (lanes_avx512.h): gathers took as long on Zen 4 as the scalar loop.
 * Bytes moved: 4 head_dim in and out, 5 head_dim of tables from L1, 8 n_frequencies of cos and sin.
 */
#include "scalar/scalar.h"
#include "x86/lanes_avx512.h"

#define MAX_FREQUENCIES (KSORT_MAX_HEAD_DIM / 2) /* as many as a head has pairs; more are left to the scalar level */

/* table [n] as look_up takes it. */
ALWAYS_INLINE void copy_aligned(const float *from, uint32_t n, float *table)
{
    for (uint32_t i = 0; i < n; i += LANES)
        _mm512_store_ps(table + i, load_below(from, n, i));
}

ALWAYS_INLINE void rope_head(const struct rope_row *rope, const float *x, const uint32_t head_dim,
                             const uint32_t n_frequencies, float *y)
{
    const __m512i sign_bit = _mm512_set1_epi32(INT32_MIN);
    _Alignas(64) float head[KSORT_MAX_HEAD_DIM], cos[MAX_FREQUENCIES], sin[MAX_FREQUENCIES];
    copy_aligned(x, head_dim, head);
    copy_aligned(rope->cos, n_frequencies, cos);
    copy_aligned(rope->sin, n_frequencies, sin);
    for (uint32_t c = 0; c < head_dim; c += LANES) {
        lanes_mask inside = lanes_between(0, (uint32_t)min_size(LANES, head_dim - c));
        __m512i signs = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(inside, rope->sign + c));
        __m512i partner = _mm512_castps_si512(look_up(head, head_dim, rope->partner, head_dim, c));
        __m512 turned = _mm512_castsi512_ps(_mm512_xor_si512(partner, _mm512_and_si512(signs, sign_bit)));
        __m512 own = _mm512_load_ps(head + c);
        __m512 straight = _mm512_mul_ps(own, look_up(cos, n_frequencies, rope->frequency, head_dim, c));
        __m512 across = _mm512_mul_ps(turned, look_up(sin, n_frequencies, rope->frequency, head_dim, c));
        __mmask16 turns = _mm512_test_epi32_mask(signs, signs);
        store_below(y, head_dim, c, _mm512_mask_add_ps(own, turns, straight, across));
    }
}

/* The sizes of common heads are constants, so that their loops are unrolled. */
void ksort_avx512_rope(const struct rope_row *rope, const float *x, uint32_t head_dim, float *y)
{
    if (rope->n_frequencies > MAX_FREQUENCIES)
        ksort_scalar_rope(rope, x, head_dim, y);
    else if (head_dim == 64 && rope->n_frequencies == 32)
        rope_head(rope, x, 64, 32, y);
    else if (head_dim == 128 && rope->n_frequencies == 64)
        rope_head(rope, x, 128, 64, y);
    else
        rope_head(rope, x, head_dim, rope->n_frequencies, y);
}
