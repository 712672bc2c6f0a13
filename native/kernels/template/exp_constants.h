/* exp(x) for x in [-87, 0]: x = n ln 2 + r with n whole and |r| <= ln(2)/2, exp(x) = 2^n * (1 + r + r^2 P(r)).
 *
 * P is the minimax polynomial of degree 4 for the relative error (Lawson's iteration, coefficients then rounded to
 * float32). Its own error is 3.1e-9; evaluated with fused multiply-adds the result is within 1 ulp of exp(x). ln 2 is
 * the sum of two floats, the first with 16 bits so that n times it is exact.
 */
#ifndef KSORT_EXP_CONSTANTS_H
#define KSORT_EXP_CONSTANTS_H

#define EXP_LOWEST (-87.0f) /* 2^n stays normal; smaller weights, below 2^-125, count as 0 */
#define EXP_LOG2_E 0x1.715476p+0f
#define EXP_LN2_HIGH 0x1.62e4p-1f
#define EXP_LN2_LOW 0x1.7f7d1cp-20f
#define EXP_P0 0x1.fffffcp-2f
#define EXP_P1 0x1.555492p-3f
#define EXP_P2 0x1.5558f2p-5f
#define EXP_P3 0x1.123a2p-7f
#define EXP_P4 0x1.6a23dp-10f

#endif /* KSORT_EXP_CONSTANTS_H */
