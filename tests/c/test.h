/* What the C tests share: numbers at random, comparison, and a count of failures. */
#ifndef SA_TEST_H
#define SA_TEST_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/half.h"
#include "core/integers.h"
#include "sinkattn.h"

extern int failures;

#define EXPECT(condition, ...)                                         \
    do {                                                               \
        if (!(condition)) {                                            \
            failures++;                                                \
            printf("%s:%d: %s: ", __FILE__, __LINE__, #condition);     \
            printf(__VA_ARGS__);                                       \
            printf("\n");                                              \
        }                                                              \
    } while (0)

static const sa_poll no_poll = {NULL, NULL};

static inline void *allocate(int64_t bytes)
{
    void *memory = calloc(1, (size_t)max_i64(bytes, 1));
    if (memory == NULL) {
        printf("out of memory\n");
        exit(2);
    }
    return memory;
}

static inline uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

/* About normal: a sum of four uniform numbers, of variance 1. */
static inline float normal(uint64_t *state)
{
    double sum = -2.0;
    for (int i = 0; i < 4; i++) {
        sum += (double)(next_random(state) >> 40) / (double)(1 << 24);
    }
    return (float)(sum * 1.7320508);
}

static inline double element(sa_dtype dtype, const void *data, int64_t i)
{
    switch (dtype) {
    case SA_F32: return (double)((const float *)data)[i];
    case SA_F16: return (double)sa_f16_to_f32(((const uint16_t *)data)[i]);
    default: return (double)sa_bf16_to_f32(((const uint16_t *)data)[i]);
    }
}

static inline void set_element(sa_dtype dtype, void *data, int64_t i, float value)
{
    switch (dtype) {
    case SA_F32: ((float *)data)[i] = value; break;
    case SA_F16: ((uint16_t *)data)[i] = sa_f32_to_f16(value); break;
    default: ((uint16_t *)data)[i] = sa_f32_to_bf16(value); break;
    }
}

/* [d0, d1, d2, d3] of normal numbers; rows are `gap` elements apart beyond their own. */
static inline sa_tensor new_tensor(sa_dtype dtype, int64_t d0, int64_t d1, int64_t d2, int64_t d3, int64_t gap, uint64_t *random)
{
    sa_tensor t = {.shape = {d0, d1, d2, d3}, .rank = 4, .dtype = dtype};
    t.stride[3] = 1;
    t.stride[2] = d3 + gap;
    t.stride[1] = d2 * t.stride[2];
    t.stride[0] = d1 * t.stride[1];
    const int64_t count = d0 * t.stride[0];
    t.data = allocate(count * sa_dtype_size(dtype));
    for (int64_t i = 0; i < count; i++) {
        set_element(dtype, t.data, i, normal(random));
    }
    return t;
}

/* Relative L2 of dense arrays where `expected` is finite; infinity where they differ in what is not. */
static inline double relative_error(sa_dtype dtype, const void *got, const void *expected, int64_t count)
{
    double difference = 0.0, norm = 0.0;
    for (int64_t i = 0; i < count; i++) {
        const double a = element(dtype, got, i), b = element(dtype, expected, i);
        if (!isfinite(b) || !isfinite(a)) {
            if (!(a == b)) {
                return INFINITY;
            }
            continue;
        }
        difference += (a - b) * (a - b);
        norm += b * b;
    }
    return sqrt(difference) / fmax(sqrt(norm), 1e-30);
}

/* Bounds of tests/tolerance.py. */
static inline double bound_of(sa_dtype dtype)
{
    return dtype == SA_F32 ? 2e-6 : dtype == SA_F16 ? 1e-3 : 8e-3;
}

int64_t test_core(void);    /* calls checked */
int64_t test_cache(void);   /* with the table in use */
int64_t test_kernels(void); /* the table in use against the reference, or the reference against a plain statement */

#endif
