/* What the harnesses share: a fuzzer's bytes as numbers, tensors in memory of exactly their size, and comparison.
 *
 * A harness is LLVMFuzzerTestOneInput alone: clang links it with libFuzzer, any compiler with replay.c. It stops the process (FUZZ_REQUIRE)
 * where a property does not hold; the sanitizers stop it where memory or arithmetic is at fault. */
#ifndef SA_FUZZ_H
#define SA_FUZZ_H

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../csrc/core/half.h"
#include "../../csrc/core/integers.h"
#include "../../csrc/sinkattn.h"

#define FUZZ_REQUIRE(condition)                                                              \
    do {                                                                                     \
        if (!(condition)) {                                                                  \
            fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition);   \
            abort();                                                                         \
        }                                                                                    \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* --- bytes as numbers; past the end all are zero ---------------------------------------------------------------------------------- */

typedef struct fuzz_input {
    const uint8_t *data;
    size_t size;
} fuzz_input;

static inline uint8_t fuzz_byte(fuzz_input *in)
{
    if (in->size == 0) {
        return 0;
    }
    in->size--;
    return *in->data++;
}

static inline int64_t fuzz_range(fuzz_input *in, int64_t low, int64_t high)
{
    return low + fuzz_byte(in) % (high - low + 1);
}

static inline uint64_t fuzz_word(fuzz_input *in)
{
    uint64_t word = 0;
    for (int i = 0; i < 8; i++) {
        word = word << 8 | fuzz_byte(in);
    }
    return word;
}

/* Small numbers, numbers at the edges of every width, or any. */
static inline int64_t fuzz_hostile(fuzz_input *in)
{
    static const int64_t edges[] = {-1, INT64_MAX, INT64_MIN, INT64_MAX / 2, INT64_MAX / 4, INT64_MAX / 4 + 1, INT32_MAX, INT32_MIN, 1LL << 31,
                                    1LL << 32, 1LL << 40, 1LL << 48, 1LL << 52, 1LL << 57, 1LL << 58, 1LL << 60, 1LL << 61, 1LL << 62,
                                    -(1LL << 61), 29946013106671351 /* 2^64 over the bytes of a row */};
    const uint8_t kind = fuzz_byte(in);
    if (kind < 180) {
        return kind % 6;
    }
    return kind < 240 ? edges[(size_t)kind % (sizeof edges / sizeof edges[0])] : (int64_t)fuzz_word(in);
}

/* Extents where everything is an edge, and those around the edges of blocks. */
static inline int64_t fuzz_length(fuzz_input *in)
{
    static const int64_t edges[] = {31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 130, 200, 255, 256, 257, 300, 513};
    const uint8_t kind = fuzz_byte(in);
    return kind < 204 ? kind % 13 : edges[(size_t)kind % (sizeof edges / sizeof edges[0])];
}

static inline int64_t fuzz_depth(fuzz_input *in)
{
    static const int64_t edges[] = {15, 16, 17, 31, 32, 33, 48, 64, 65, 80, 96, 128, 160, 192, 255, 256};
    const uint8_t kind = fuzz_byte(in);
    return kind < 128 ? 1 + kind % 12 : edges[kind % 16];
}

/* --- random contents ---------------------------------------------------------------------------------------------------------------- */

static inline uint32_t fuzz_random(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 32);
}

static inline float fuzz_uniform(uint64_t *state)
{
    return (float)((int32_t)fuzz_random(state)) * 0x1p-31f;
}

static inline void fuzz_store(sa_dtype dtype, void *data, int64_t i, float value)
{
    switch (dtype) {
    case SA_F32: ((float *)data)[i] = value; break;
    case SA_F16: ((uint16_t *)data)[i] = sa_f32_to_f16(value); break;
    default: ((uint16_t *)data)[i] = sa_f32_to_bf16(value); break;
    }
}

static inline double fuzz_load(sa_dtype dtype, const void *data, int64_t i)
{
    switch (dtype) {
    case SA_F32: return (double)((const float *)data)[i];
    case SA_F16: return (double)sa_f16_to_f32(((const uint16_t *)data)[i]);
    default: return (double)sa_bf16_to_f32(((const uint16_t *)data)[i]);
    }
}

/* Memory of exactly `count` items: the sanitizer sees the first byte behind it. Never NULL. */
static inline void *fuzz_memory(int64_t count, size_t size)
{
    void *memory = calloc(count > 0 ? (size_t)count : 1, count > 0 ? size : 1);
    FUZZ_REQUIRE(memory != NULL);
    return memory;
}

/* --- tensors ------------------------------------------------------------------------------------------------------------------------ */

typedef struct fuzz_tensor {
    sa_tensor tensor;
    void *memory;
    int64_t count; /* elements of the memory, gaps included */
} fuzz_tensor;

enum { FUZZ_FILLER = 0xa5 };

static inline int64_t fuzz_element(const sa_tensor *tensor, const int64_t index[4])
{
    int64_t at = 0;
    for (int axis = 0; axis < tensor->rank; axis++) {
        at += index[axis] * tensor->stride[axis];
    }
    return at;
}

static inline bool fuzz_next(const sa_tensor *tensor, int64_t index[4])
{
    for (int axis = tensor->rank - 1; axis >= 0; axis--) {
        if (++index[axis] < tensor->shape[axis]) {
            return true;
        }
        index[axis] = 0;
    }
    return false;
}

static inline bool fuzz_is_empty(const sa_tensor *tensor)
{
    bool empty = false;
    for (int axis = 0; axis < tensor->rank; axis++) {
        empty = empty || tensor->shape[axis] == 0;
    }
    return empty;
}

/* Axes in any order, with gaps, reversed, and (inputs) broadcast; the last axis dense. */
static inline fuzz_tensor fuzz_make_tensor(fuzz_input *in, sa_dtype dtype, int rank, const int64_t *shape, bool may_repeat)
{
    fuzz_tensor out = {.tensor = {.rank = rank, .dtype = dtype}};
    const uint8_t layout = fuzz_byte(in), signs = fuzz_byte(in);
    int64_t reach = shape[rank - 1] + (layout & 3), first = 0, last = shape[rank - 1] - 1;
    out.tensor.shape[rank - 1] = shape[rank - 1];
    out.tensor.stride[rank - 1] = 1;
    for (int step = 0; step < rank - 1; step++) {
        const int axis = (rank - 2 - step + (layout >> 2)) % (rank - 1);
        const bool repeated = may_repeat && (signs >> axis & 9) == 9;
        const int64_t stride = repeated ? 0 : signs >> (axis + 3) & 1 ? -reach : reach, span = stride * max_i64(shape[axis] - 1, 0);
        out.tensor.shape[axis] = shape[axis];
        out.tensor.stride[axis] = stride;
        first += min_i64(span, 0);
        last += max_i64(span, 0);
        reach = repeated ? reach : reach * max_i64(shape[axis], 1) + (layout >> 6) * (step == 0);
    }
    out.count = fuzz_is_empty(&out.tensor) ? 0 : last - first + 1;
    const size_t size = (size_t)sa_dtype_size(dtype);
    out.memory = fuzz_memory(out.count, size);
    memset(out.memory, FUZZ_FILLER, (size_t)out.count * size);
    out.tensor.data = out.count > 0 ? (char *)out.memory + (size_t)-first * size : signs & 1 ? out.memory : NULL;
    return out;
}

/* `wild` of 256 elements are infinite, NaN or huge. */
static inline void fuzz_fill(fuzz_tensor *t, uint64_t *random, int wild)
{
    static const float extremes[] = {INFINITY, -INFINITY, NAN, 3e38f, -3e38f, 65504.0f, 1e-40f, -0.0f};
    for (int64_t i = 0; i < t->count; i++) {
        const uint32_t bits = fuzz_random(random);
        fuzz_store(t->tensor.dtype, t->memory, i, (int)(bits & 255) < wild ? extremes[bits >> 8 & 7] : fuzz_uniform(random));
    }
}

/* Every byte that is no element still holds the filler. */
static inline void fuzz_require_gaps(const fuzz_tensor *t)
{
    const size_t size = (size_t)sa_dtype_size(t->tensor.dtype);
    uint8_t *copy = fuzz_memory(t->count, size);
    memcpy(copy, t->memory, (size_t)t->count * size);
    int64_t index[4] = {0};
    const int64_t first = ((char *)t->tensor.data - (char *)t->memory) / (int64_t)size;
    if (!fuzz_is_empty(&t->tensor)) {
        do {
            memset(copy + (size_t)(first + fuzz_element(&t->tensor, index)) * size, FUZZ_FILLER, size);
        } while (fuzz_next(&t->tensor, index));
    }
    for (int64_t i = 0; i < t->count * (int64_t)size; i++) {
        FUZZ_REQUIRE(copy[i] == FUZZ_FILLER);
    }
    free(copy);
}

/* --- comparison --------------------------------------------------------------------------------------------------------------------- */

static inline bool fuzz_close(double got, double expected, double bound)
{
    if (isnan(expected) || isnan(got)) {
        return isnan(expected) && isnan(got);
    }
    return got == expected || fabs(got - expected) <= bound * fmax(1.0, fabs(expected));
}

static inline void fuzz_require_close(const fuzz_tensor *got, const fuzz_tensor *expected, double bound)
{
    int64_t index[4] = {0};
    if (fuzz_is_empty(&got->tensor)) {
        return;
    }
    do {
        const double a = fuzz_load(got->tensor.dtype, got->tensor.data, fuzz_element(&got->tensor, index));
        const double b = fuzz_load(expected->tensor.dtype, expected->tensor.data, fuzz_element(&expected->tensor, index));
        if (!fuzz_close(a, b, bound)) {
            fprintf(stderr, "[%d %d %d %d] %g instead of %g\n", (int)index[0], (int)index[1], (int)index[2], (int)index[3], a, b);
        }
        FUZZ_REQUIRE(fuzz_close(a, b, bound));
    } while (fuzz_next(&got->tensor, index));
}

static inline void fuzz_require_floats(const float *got, const float *expected, int64_t count, double bound)
{
    for (int64_t i = 0; i < count; i++) {
        if (!fuzz_close((double)got[i], (double)expected[i], bound)) {
            fprintf(stderr, "[%d] %g instead of %g\n", (int)i, (double)got[i], (double)expected[i]);
        }
        FUZZ_REQUIRE(fuzz_close((double)got[i], (double)expected[i], bound));
    }
}

/* Bounds of a run of a kernel table against the scalar reference, values within [-1, 1]. */
static inline double fuzz_bound(sa_dtype dtype)
{
    return dtype == SA_F32 ? 2e-5 : dtype == SA_F16 ? 2e-3 : 2e-2;
}

#endif
