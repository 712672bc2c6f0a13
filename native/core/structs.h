/* Reading a caller's struct, which a program built with an older or newer header made. */
#ifndef KSORT_STRUCTS_H
#define KSORT_STRUCTS_H

#include "common.h"

#define MAX_STRUCT_BYTES 4096 /* larger sizes cannot be meant, and are not read */

/* Copies the struct at `from`, whose first field is its size, into out, which has `bytes`. It must reach mandatory_end;
 * what it lacks behind that is zero in out, and what it has beyond out must be zero. No sizeof of such a struct ends
 * within a pointer, so no size may.
 * Fields are added behind a struct's end, padding included: old callers may have left anything in that.
 * Returns KSORT_OK, _ARGUMENT (from is NULL), _STRUCT_SIZE. */
static inline ksort_status read_struct(void *out, size_t bytes, size_t mandatory_end, const void *from)
{
    if (!from)
        return KSORT_ERR_ARGUMENT;
    size_t given;
    memcpy(&given, from, sizeof given);
    if (given == bytes) {
        memcpy(out, from, bytes);
        return KSORT_OK;
    }
    if (given < mandatory_end || given > MAX_STRUCT_BYTES || given % sizeof given)
        return KSORT_ERR_STRUCT_SIZE;
    for (size_t i = bytes; i < given; i++)
        if (((const uint8_t *)from)[i])
            return KSORT_ERR_STRUCT_SIZE;
    memset(out, 0, bytes);
    memcpy(out, from, min_size(given, bytes));
    return KSORT_OK;
}

/* `last` is the last mandatory field of *out. */
#define READ_STRUCT(out, from, last)                                                                                   \
    read_struct((out), sizeof *(out), offsetof(__typeof__(*(out)), last) + sizeof(out)->last, (from))

#endif /* KSORT_STRUCTS_H */
