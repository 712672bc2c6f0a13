/* Integer scores with VNNI: vpdpbusd adds four products of an unsigned key byte (mantissa + 2^(mantissa_bits-1)) and a
 * signed query byte to each lane, without saturation. The surplus is in the offset that a block's sum starts from.
 * Partition and bytes: strip_avx512.h.
 */
#include "x86/strip_avx512.h"

ALWAYS_INLINE __m512i dot_quad_vnni(__m512i sum, __m512i key, int32_t query)
{
    return _mm512_dpbusd_epi32(sum, key, _mm512_set1_epi32(query));
}

void ksort_avx512vnni_scores_bfp_by_bfp(const struct tile_span *keys, const struct query_rows *queries,
                                        float (*scores)[KSORT_TILE_TOKENS])
{
    scores_by_bfp(keys, queries, dot_quad_vnni, false, scores);
}
