/* What every file of the library starts from: the public header, its functions exported (all else is hidden). */
#ifndef KSORT_COMMON_H
#define KSORT_COMMON_H

#pragma GCC visibility push(default)
#include "ksort.h"
#pragma GCC visibility pop

#include <stdbool.h>
#include <string.h>

/* For functions that CUDA kernels share. */
#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

/* For functions whose constant arguments must reach the compiler: numbers of rows, types. */
#define ALWAYS_INLINE static inline __attribute__((always_inline))

#define CACHE_LINE 64 /* bytes; for prefetching only */

/* Asks for a cache line of a tile that is one tile's work away: into L2, as two tiles of values don't fit a 32 KB L1
 * (asking into L1 gained nothing). */
#define PREFETCH_NEXT(address) __builtin_prefetch((address), 0, 2)

/* Float bits of a finite value are below this once the sign is cleared; infinity and NaN are not. */
#define FLOAT_MAGNITUDE_INF 0x7F800000u

static inline HOST_DEVICE uint32_t float_bits(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline HOST_DEVICE float bits_float(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* 2^(exponent - 127) for a stored exponent byte: exactly 0 for 0 (the format's zero block), infinity for 255. */
static inline HOST_DEVICE float exponent_scale(uint8_t exponent)
{
    return bits_float((uint32_t)exponent << 23);
}

static inline size_t min_size(size_t a, size_t b)
{
    return a < b ? a : b;
}

static inline size_t max_size(size_t a, size_t b)
{
    return a > b ? a : b;
}

/* Half-open range of items; part ith of nth gets a contiguous share, all shares together are the whole. */
struct range {
    size_t begin;
    size_t end;
};

static inline struct range share_of(size_t n_items, uint32_t ith, uint32_t nth)
{
    size_t quotient = n_items / nth, rest = n_items % nth;
    size_t begin = quotient * ith + min_size(ith, rest);
    return (struct range){begin, begin + quotient + (ith < rest ? 1 : 0)};
}

#endif /* KSORT_COMMON_H */
