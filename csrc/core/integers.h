/* Small integer helpers, and sizes that refuse to overflow. */
#ifndef SA_INTEGERS_H
#define SA_INTEGERS_H

#include <stdbool.h>
#include <stdint.h>

static inline int64_t min_i64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static inline int64_t max_i64(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

static inline int64_t clamp_i64(int64_t value, int64_t low, int64_t high)
{
    return value < low ? low : value > high ? high : value;
}

static inline int64_t ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

static inline int64_t round_up(int64_t value, int64_t multiple)
{
    return ceil_div(value, multiple) * multiple;
}

/* product = a * b; false where it does not fit. */
static inline bool product_fits(int64_t a, int64_t b, int64_t *product)
{
    return !__builtin_mul_overflow(a, b, product);
}

#endif
